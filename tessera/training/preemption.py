"""Being told to go: SIGTERM from the provider, Ctrl-C from a person.

The first signal sets a deadline, ``preemption.grace_s`` from now, and lets the loop finish its
micro-step, bring the journal to the root and save. A watchdog thread leaves with 75 when the time
is over, whatever hangs then; a second signal leaves at once. What was written to the local disk is
whole either way, and the next attempt takes it from there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from tessera.errors import RetryElsewhereError

RETRY = 75


class StoppedEarlyError(RetryElsewhereError):
    """A signal came before the training began: nothing was recorded, nothing is lost."""


@dataclass
class StopRequest:
    """Set from a signal handler. ``deadline`` is of ``time.monotonic``; ``preparing`` until the
    attempt is recorded, while there is nothing to save.
    """

    grace_s: float
    signal: str | None = None
    deadline: float | None = None
    preparing: bool = True

    def left_s(self) -> float:
        """Seconds of the grace period that are left."""
        deadline = time.monotonic() + self.grace_s if self.deadline is None else self.deadline
        return max(0.0, deadline - time.monotonic())


@contextmanager
def listening(stop: StopRequest) -> Iterator[None]:
    """SIGTERM and Ctrl-C become ``stop``; outside of the main thread nothing is caught."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wakes, bell = os.pipe()
    watchdog = threading.Thread(
        target=_leave_when_over, args=(wakes, stop), name="grace-period", daemon=True
    )
    watchdog.start()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            os._exit(RETRY)
        stop.deadline = time.monotonic() + stop.grace_s
        stop.signal = signal.Signals(number).name
        # os.write: a handler may not take the locks of print, of the progress line or of a thread
        os.write(bell, b"!")
        if stop.preparing:
            raise StoppedEarlyError(
                f"Stopped by {stop.signal} before the training began; nothing is lost, and the "
                "same command starts it."
            )
        if os.environ.get("LOCAL_RANK", "0") == "0":  # each worker of a machine hears it
            _tell(b"\nstopping after this micro-step and saving; once more leaves at once\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(bell)
        watchdog.join()
        os.close(wakes)


def _tell(text: bytes) -> None:
    """To stderr, if somebody reads it."""
    try:
        os.write(2, text)
    except OSError:
        pass


def _leave_when_over(wakes: int, stop: StopRequest) -> None:
    """Wait for the bell; then leave at the end of the grace period unless it is closed first."""
    if not os.read(wakes, 1):
        return
    over = threading.Thread(target=os.read, args=(wakes, 1), daemon=True)
    over.start()
    over.join(stop.left_s())
    if over.is_alive():
        _tell(b"\nthe grace period is over: leaving now\n")
        os._exit(RETRY)
