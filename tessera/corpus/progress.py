"""How a long step tells how far it is; the command line draws it, tests ignore it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` bytes of one stage; ``total`` is None where it cannot be known."""

    stage: str
    done: int
    total: int | None


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Adds up what a stage reports and passes it on."""

    def __init__(self, callback: ProgressCallback | None, stage: str, total: int | None) -> None:
        self._callback = callback
        self._stage = stage
        self._total = total
        self._done = 0
        self(0)

    def __call__(self, count: int) -> None:
        """``count`` more bytes are done."""
        self._done += count
        if self._callback is not None:
            self._callback(Progress(self._stage, self._done, self._total))
