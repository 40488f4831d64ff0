"""What a run had cost by a moment: billed hours and dollars of all its attempts together.

The figures are the ledger's own (``time_usd``), taken wherever the slope changes; in between the
bill grows in a straight line. Where an invoice is recorded, an attempt's dollars are stretched to
it, as everywhere else. So the end of the curve is the run's cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tessera.ledger.meter import Bill, Interval, time_usd
from tessera.ledger.traffic import DOWN_BYTES, UP_BYTES, count_bytes, traffic_usd
from tessera.tracking.history import AttemptHistory
from tessera.tracking.queries import AttemptSummary

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Line:
    """Straight between ``times``, level outside; ``jumps`` adds whole sums at once."""

    times: Floats
    values: Floats
    jump_times: Floats
    jump_sums: Floats

    def at(self, moments: Floats) -> Floats:
        grown: Floats = np.zeros(len(moments))
        if len(self.times):
            grown = np.interp(moments, self.times, self.values)
        if len(self.jump_times):
            passed = np.searchsorted(self.jump_times, moments, side="right")
            grown = grown + np.concatenate(([0.0], self.jump_sums))[passed]
        return grown


_NONE: Floats = np.zeros(0)


class Spending:
    """Hours and dollars of a run over time."""

    def __init__(self, own: Sequence[tuple[AttemptHistory, Bill, AttemptSummary]]) -> None:
        self._seconds = [_seconds_line(bill) for _, bill, _ in own]
        known = all(summary.usd is not None for _, _, summary in own)
        self._usd = [_usd_line(*each) for each in own] if known else None

    def hours(self, moments: Floats) -> Floats:
        """Billed hours up to each of ``moments`` (seconds since the epoch)."""
        return _sum(self._seconds, moments) / 3600

    def usd(self, moments: Floats) -> Floats | None:
        """US dollars up to each of ``moments``; None where a price is not known."""
        return None if self._usd is None else _sum(self._usd, moments)


def _sum(lines: Sequence[_Line], moments: Floats) -> Floats:
    total: Floats = np.zeros(len(moments))
    for line in lines:
        total = total + line.at(moments)
    return total


def _seconds_line(own: Bill) -> _Line:
    moments = sorted({moment for interval in own.intervals for moment in interval})
    passed = [sum(end - start for start, end in _until(own.intervals, at)) for at in moments]
    return _Line(np.asarray(moments), np.asarray(passed), _NONE, _NONE)


def _usd_line(item: AttemptHistory, own: Bill, summary: AttemptSummary) -> _Line:
    assert summary.usd is not None
    if not summary.ledger_usd:  # nobody told a price of it, but a bill may have come
        line = _seconds_line(own)
        seconds = max(own.seconds, 1e-9)
        return _Line(line.times, line.values * (summary.usd / seconds), _NONE, _NONE)
    scale = summary.usd / summary.ledger_usd
    bounds = {moment for interval in own.intervals for moment in interval}
    for since, _ in item.prices:
        if any(start < since < end for start, end in own.intervals):
            bounds.add(since)
    moments = sorted(bounds)
    price = item.attempt.usd_per_hour
    machine = [time_usd(_until(own.intervals, at), price, item.prices) or 0.0 for at in moments]
    sent = _traffic(item)
    return _Line(
        np.asarray(moments),
        np.asarray(machine) * scale,
        np.asarray([at for at, _ in sent]),
        np.cumsum([usd for _, usd in sent]) * scale,
    )


def _traffic(item: AttemptHistory) -> list[tuple[float, float]]:
    """When which dollars of traffic were spent, in order."""
    prices = {UP_BYTES: item.attempt.usd_per_gb_up, DOWN_BYTES: item.attempt.usd_per_gb_down}
    return sorted(
        (record.time, traffic_usd(count_bytes([record.number]), prices[record.key]))
        for record in item.records
        if record.kind == "metric" and record.key in prices
    )


def _until(intervals: Sequence[Interval], at: float) -> list[Interval]:
    return [(start, min(end, at)) for start, end in intervals if start < at]
