"""Ctrl-C that is not lost: a library may swallow the exception, the wish stands all the same."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heard_interrupt() -> Iterator[Callable[[], None]]:
    """What it yields raises ``KeyboardInterrupt`` if Ctrl-C came since; the first one raises too.

    Python raises the exception wherever the main thread happens to be. In a destructor or another
    callback it is printed and forgotten, and an event loop's own handler may lose it.
    """
    before = signal.getsignal(signal.SIGINT)
    # A job that a shell put into the background ignores Ctrl-C: it is meant for another.
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield lambda: None
        return
    heard = False

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = True
        if callable(before):
            before(number, frame)

    def require_silence() -> None:
        if heard:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hear)
    try:
        yield require_silence
    finally:
        signal.signal(signal.SIGINT, before)
