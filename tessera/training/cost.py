"""Dollars of a run while it runs: what earlier attempts left on the bill, and this one's so far."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tessera.errors import DamagedError
from tessera.ledger.budget import IDLE_S
from tessera.ledger.meter import Usage, bill, total_usd
from tessera.ledger.prices import PriceChange, Quote
from tessera.ledger.traffic import plus_traffic, traffic_usd
from tessera.runs import Attempt, Run, scan_runs
from tessera.tracking.records import last_record_time
from tessera.tracking.told import corrected
from tessera.training.clock import now
from tessera.training.earlier import NOTHING, Past, read_past

LOCAL = "local"
"""The provider of one's own machines, which bill nothing once an attempt is over."""


def usage_of(
    run: Run, attempt: Attempt, ended_at: float | None, prices: tuple[PriceChange, ...] = ()
) -> Usage:
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
        prices=prices,
    )


class RunningCost:
    """The run's dollars now; None as soon as one attempt's price of an hour is unknown.

    Attempts of other runs on this instance are read once, at the start: what they own of the
    instance's bill (a pretraining before this fine-tuning, say) is not this run's. So are the
    journals of this run's earlier attempts whose traffic was billed or whose price was followed;
    this attempt's own traffic and prices are told as they happen. Safe to share among threads.

    ``idle_usd`` is no part of ``usd``: an allowance for what this run's earlier rented machines
    cost from their last attempt's end until they were down, ``IDLE_S`` each at their last price.
    """

    idle_usd: float

    def __init__(self, run: Run, attempt: Attempt) -> None:
        here = (attempt.provider, attempt.instance)
        earlier: list[tuple[Run, Attempt, float | None]] = []
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
                earlier.append((other_run, other, ended))
        past = read_past(run, [other for its_run, other, _ in earlier if its_run.id == run.id])
        self._earlier = [
            usage_of(its_run, *_as_told(other, ended, past.get(other.id, NOTHING)))
            for its_run, other, ended in earlier
        ]
        ours = [usage for usage in self._earlier if usage.attempt.startswith(f"{run.id}/")]
        self.idle_usd = _idle_usd(ours, here)
        self._run, self._attempt = run, attempt
        self._traffic_before = sum(found.traffic_usd for found in past.values())
        self._sent = self._received = 0
        self._prices: tuple[PriceChange, ...] = ()
        self._lock = threading.Lock()

    # -- what happens ------------------------------------------------------------------------------

    def add_traffic(self, sent: int) -> float:
        """Count ``sent`` bytes that this attempt uploaded; returns their dollars. From any thread.

        Only what the journal records as ``traffic/up_bytes`` belongs here.
        """
        with self._lock:
            self._sent += sent
        return traffic_usd(sent, self._attempt.usd_per_gb_up)

    def add_download(self, received: int) -> None:
        """Count bytes that this attempt fetched: what is recorded as ``traffic/down_bytes``."""
        with self._lock:
            self._received += received

    def note_price(self, usd_per_hour: float, at: float) -> None:
        """From ``at`` (``clock.now``) on an hour of this machine costs so much."""
        with self._lock:
            self._prices = (*self._prices, (at, usd_per_hour))

    def correct(self, quote: Quote) -> None:
        """The provider said late what this instance costs; see ``tessera.tracking.told``."""
        with self._lock:
            self._attempt = corrected(self._attempt, quote)

    # -- what it comes to --------------------------------------------------------------------------

    @property
    def usd_per_hour(self) -> float | None:
        """What an hour of this machine costs, as far as it was last told; None: nobody told."""
        with self._lock:
            return max(self._prices)[1] if self._prices else self._attempt.usd_per_hour

    @property
    def traffic_usd(self) -> float:
        """Dollars of the run's traffic up to now, both ways; 0 where it is not billed."""
        with self._lock:
            attempt, sent, received = self._attempt, self._sent, self._received
        up = traffic_usd(sent, attempt.usd_per_gb_up)
        return self._traffic_before + up + traffic_usd(received, attempt.usd_per_gb_down)

    def usd(self) -> float | None:
        """Dollars of the run up to now, for machines and traffic."""
        with self._lock:
            attempt, prices = self._attempt, self._prices
        bills = bill([*self._earlier, usage_of(self._run, attempt, now(), prices)])
        mine = [item for name, item in bills.items() if name.startswith(f"{self._run.id}/")]
        return plus_traffic(total_usd(mine), self.traffic_usd)


def _as_told(
    attempt: Attempt, ended: float | None, past: Past
) -> tuple[Attempt, float | None, tuple[PriceChange, ...]]:
    better = attempt if past.quote is None else corrected(attempt, past.quote)
    return better, ended, past.prices


def _idle_usd(earlier: Sequence[Usage], here: tuple[str, str]) -> float:
    last: dict[tuple[str, str], Usage] = {}
    for usage in sorted(earlier, key=lambda u: u.started_at):
        last[usage.provider, usage.instance] = usage
    gone = [u for place, u in last.items() if place != here and u.provider != LOCAL]
    hours = [max(u.prices)[1] if u.prices else u.usd_per_hour or 0.0 for u in gone]
    return sum(hours) * IDLE_S / 3600


def earlier_traffic_usd(run: Run, attempts: Sequence[Attempt]) -> float:
    """Dollars of all that ``attempts`` sent and received, by their journals."""
    return sum(found.traffic_usd for found in read_past(run, attempts).values())
