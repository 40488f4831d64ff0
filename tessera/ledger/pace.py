"""Seconds a step takes: steps by a window of the latest ones, what comes between them by itself.

Evaluations and saves come every so many steps. Averaged over a short window they would make the
speed jump; so their own durations are kept, and spread over the steps between two of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

WINDOW = 20
"""Log intervals that are looked back upon at least."""
LOOK_BACK = 0.05
"""Share of the steps ahead that are looked back upon, if that is more."""
_ASIDES = 5  # the latest durations of each kind that are averaged


class Pace:
    """The speed of one attempt; another one may be on another machine."""

    def __init__(self) -> None:
        self._intervals: deque[tuple[int, float]] = deque()
        self._asides: dict[str, deque[float]] = {}
        self.seen = 0
        """Intervals so far. The first one, slower than the others, is forgotten after it."""

    def steps(self, steps: int, seconds: float, steps_ahead: int) -> None:
        """``steps`` took ``seconds`` without what came between them; ``steps_ahead`` are to do."""
        self.seen += 1
        if self.seen == 2:
            self._intervals.clear()
        self._intervals.append((steps, seconds))
        covered = sum(count for count, _ in self._intervals)
        while (
            len(self._intervals) > WINDOW
            and covered - self._intervals[0][0] >= LOOK_BACK * steps_ahead
        ):
            covered -= self._intervals.popleft()[0]

    def aside(self, kind: str, seconds: float) -> None:
        """One evaluation or save took ``seconds`` of the loop."""
        self._asides.setdefault(kind, deque(maxlen=_ASIDES)).append(seconds)

    def seconds_of(self, kind: str) -> float | None:
        """What one of them takes; None before the first."""
        known = self._asides.get(kind)
        return sum(known) / len(known) if known else None

    def seconds_per_step(self, every: Mapping[str, int]) -> float | None:
        """Wall seconds a step, all included; ``every`` says how many steps lie between two asides.

        None before anything was measured.
        """
        covered = sum(count for count, _ in self._intervals)
        if not covered:
            return None
        seconds = sum(taken for _, taken in self._intervals) / covered
        return seconds + sum((self.seconds_of(k) or 0.0) / n for k, n in every.items())
