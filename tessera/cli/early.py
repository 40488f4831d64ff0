"""SIGTERM and Ctrl-C in the first seconds of ``tessera train``, before the training listens.

Loading torch takes seconds. Who is told to go meanwhile leaves with 75, as later, so that a managed
job is started again. ``tessera.training.preemption`` (or the launcher of several workers) puts its
own handlers in the place of these, one signal at a time, so that nothing falls between them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from tessera.errors import RetryElsewhereError

_BEFORE = "before the training began; nothing is lost, and the same command starts it"
_HANDED_OVER = (
    "just as the training began or ended; the same command starts it, continues it or says that "
    "it is done"
)


@contextmanager
def told_early() -> Iterator[Callable[[], None]]:
    """Told to go, the process leaves with 75 and a sentence; only the main thread can be told.

    Call what this yields right before the training takes over: its handlers go back to these when
    it is over, and then "before the training began" would be wrong.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    when = _BEFORE

    def handle(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":  # one of several workers speaks
            with suppress(OSError):  # nobody reads it
                os.write(2, f"Error: Stopped by {signal.Signals(number).name} {when}.\n".encode())
        # Not an exception: libraries that are being imported would swallow it. Nothing is open yet.
        os._exit(RetryElsewhereError.exit_code)

    def hand_over() -> None:
        nonlocal when
        when = _HANDED_OVER

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield hand_over
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
