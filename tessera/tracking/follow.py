"""Sync again and again: beside a trainer, or on a laptop that looks on.

Servers go away and come back. A pass that fails is told once and tried again at the next beat;
nothing is thrown away, since a pass begins with what the root and MLflow say then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tessera.errors import RetryElsewhereError

EVERY_S = 30.0
T = TypeVar("T")


def follow(
    once: Callable[[], T],
    *,
    every_s: float = EVERY_S,
    over: threading.Event | None = None,
    is_last: Callable[[T], bool] = lambda _: False,
    tell: Callable[[T], str | None] = lambda _: None,
    say: Callable[[str], None] = print,
) -> bool:
    """Call ``once`` every ``every_s`` seconds until its answer ``is_last`` or ``over`` is set.

    A pass that begins after ``over`` was set is the last. Returns whether the last pass succeeded.
    ``tell`` makes a line of an answer, None where it is not worth one. Errors that another moment
    may mend (a server or store that does not answer, a damaged record) pause it and are said once;
    others are raised.
    """
    over = over or threading.Event()
    trouble: str | None = None
    while True:
        begun, last = time.monotonic(), over.is_set()
        try:
            answer = once()
        except RetryElsewhereError as error:
            if str(error) != trouble:
                trouble = str(error)
                say(f"Paused: {trouble}")
            if last:
                return False
        else:
            if trouble is not None:
                say("It goes on.")
                trouble = None
            if (line := tell(answer)) is not None:
                say(line)
            if last or is_last(answer):
                return True
        over.wait(max(0.0, every_s - (time.monotonic() - begun)))
