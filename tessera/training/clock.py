"""Where the loop's seconds go: every one of them is filed under one category of the ledger."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from tessera.tracking.journal import Journal

_BEGAN = time.time() - time.monotonic()


def now() -> float:
    """Seconds since the epoch by the clock as it was when this process began to train.

    A clock that is set meanwhile, by days perhaps, neither spends money nor gives any back.
    """
    return _BEGAN + time.monotonic()


class SpanClock:
    """Files wall time under the current category; ``train`` unless another is entered.

    Nested categories take their seconds away from the outer one, so the sum is the time that
    passed.
    """

    def __init__(self, journal: Journal, start: float | None = None) -> None:
        self._journal = journal
        self._category = "train"
        self._since = time.monotonic() if start is None else start
        self._filed: defaultdict[str, float] = defaultdict(float)
        self.train_seconds = 0.0

    @contextmanager
    def filing(self, category: str) -> Iterator[None]:
        """Seconds inside belong to ``category``."""
        outer = self._category
        self._switch(category)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, category: str) -> None:
        now = time.monotonic()
        self._filed[self._category] += now - self._since
        self._category, self._since = category, now

    def report(self, step: int) -> None:
        """Write what was filed since the last report as spans that end at ``step``."""
        self._switch(self._category)
        for category, seconds in self._filed.items():
            if seconds > 0:
                self._journal.span(category, seconds, step)
                if category in ("train", "data_wait"):
                    self.train_seconds += seconds
        self._filed.clear()
