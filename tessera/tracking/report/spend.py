"""What a run had cost by a moment, for many moments at once: billed hours and dollars.

The dollars are those of ``spent_at``, asked wherever their slope may change; in between a bill
grows in a straight line.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tessera.ledger.meter import Bill
from tessera.tracking.history import AttemptHistory
from tessera.tracking.spending import spent_at

Floats = npt.NDArray[np.float64]


class Spending:
    """Hours and dollars of a run's attempts over time; ``own`` are ``bills_of`` the run."""

    def __init__(self, own: Sequence[tuple[AttemptHistory, Bill]]) -> None:
        bounds = {moment for _, bill in own for pair in bill.intervals for moment in pair}
        bounds |= {since for item, _ in own for since, _ in item.prices}
        self._moments = np.asarray(sorted(bounds), dtype=float)
        intervals = [interval for _, bill in own for interval in bill.intervals]
        self._hours = np.zeros(len(self._moments))
        for start, end in intervals:
            self._hours += np.clip(self._moments, start, end) - start
        told = [spent_at(own, moment) for moment in self._moments]
        self._usd = np.asarray([np.nan if usd is None else usd for usd in told], dtype=float)

    def hours(self, moments: Floats) -> Floats:
        """Billed hours up to each of ``moments`` (seconds since the epoch)."""
        return self._at(moments, self._hours) / 3600

    def usd(self, moments: Floats) -> Floats:
        """US dollars up to each of ``moments``; NaN where a price is not known."""
        return self._at(moments, self._usd)

    def _at(self, moments: Floats, values: Floats) -> Floats:
        if not len(self._moments):
            return np.zeros(len(moments))
        found: Floats = np.interp(moments, self._moments, values)
        return found
