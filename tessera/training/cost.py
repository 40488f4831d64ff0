"""Dollars of a run while it runs: what earlier attempts left on the bill, and this one's so far."""

from __future__ import annotations

import time

from tessera.errors import DamagedError
from tessera.ledger.meter import Usage, bill, total_usd
from tessera.runs import Attempt, Run, scan_runs
from tessera.tracking.journal import last_record_time


def usage_of(run: Run, attempt: Attempt, ended_at: float | None) -> Usage:
    """The billed life of an attempt; without an ending it is estimated by the last heartbeat."""
    estimated = ended_at is None
    if ended_at is None:
        ended_at = last_record_time(run, attempt.id) or attempt.started_at
    return Usage(
        attempt=f"{run.id}/{attempt.id}",
        provider=attempt.provider,
        instance=attempt.instance,
        started_at=attempt.started_at,
        billed_from=attempt.billed_from,
        ended_at=max(ended_at, attempt.started_at),
        usd_per_hour=attempt.usd_per_hour,
        estimated=estimated,
    )


class RunningCost:
    """The run's dollars now; None as soon as one attempt's price is unknown.

    Attempts of other runs on this instance are read once, at the start: what they own of the
    instance's bill (a pretraining before this fine-tuning, say) is not this run's.
    """

    def __init__(self, run: Run, attempt: Attempt) -> None:
        here = (attempt.provider, attempt.instance)
        self._earlier: list[Usage] = []
        for other_run in scan_runs(run.root)[0]:
            try:
                endings, attempts = other_run.endings(), other_run.attempts()
            except DamagedError:
                if other_run.id == run.id:
                    raise
                continue  # another run's damage must not stop this one; tessera-exp names it
            for other in attempts:
                mine = other_run.id == run.id
                if (mine and other.id == attempt.id) or not (
                    mine or (other.provider, other.instance) == here
                ):
                    continue
                ended = endings[other.id].ended_at if other.id in endings else None
                self._earlier.append(usage_of(other_run, other, ended))
        self._run, self._attempt = run, attempt

    def usd(self) -> float | None:
        """Dollars of the run up to now."""
        bills = bill([*self._earlier, usage_of(self._run, self._attempt, time.time())])
        mine = [item for name, item in bills.items() if name.startswith(f"{self._run.id}/")]
        return total_usd(mine)
