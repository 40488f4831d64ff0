"""Dollars of a run while it runs: what earlier attempts left on the bill, and this one's so far."""

from __future__ import annotations

import time

from tessera.ledger.meter import Bill, Usage, bill
from tessera.runs import Attempt, Run
from tessera.tracking.journal import last_record_time


def usage_of(run: Run, attempt: Attempt, ended_at: float | None) -> Usage:
    """The billed life of an attempt; without an ending it is estimated by the last heartbeat."""
    estimated = ended_at is None
    if ended_at is None:
        ended_at = last_record_time(run, attempt.id) or attempt.started_at
    return Usage(
        attempt=attempt.id,
        provider=attempt.provider,
        instance=attempt.instance,
        started_at=attempt.started_at,
        billed_from=attempt.billed_from,
        ended_at=max(ended_at, attempt.started_at),
        usd_per_hour=attempt.usd_per_hour,
        estimated=estimated,
    )


class RunningCost:
    """The run's dollars now; None as soon as one attempt's price is unknown."""

    def __init__(self, run: Run, attempt: Attempt) -> None:
        endings = run.endings()
        self._earlier = [
            usage_of(run, other, endings[other.id].ended_at if other.id in endings else None)
            for other in run.attempts()
            if other.id != attempt.id
        ]
        self._run, self._attempt = run, attempt

    def bills(self) -> dict[str, Bill]:
        """Bills of all attempts of the run, this one up to now."""
        return bill([*self._earlier, usage_of(self._run, self._attempt, time.time())])

    def usd(self) -> float | None:
        """Dollars of the run up to now."""
        amounts = [item.usd for item in self.bills().values()]
        return None if any(a is None for a in amounts) else sum(a for a in amounts if a is not None)
