"""Dollars of a run while it runs: what earlier attempts left on the bill, and this one's so far."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from tessera.errors import DamagedError
from tessera.ledger.meter import Usage, bill, total_usd
from tessera.ledger.traffic import UP_BYTES, count_bytes, plus_traffic, traffic_usd
from tessera.runs import Attempt, Run, scan_runs
from tessera.tracking.journal import last_record_time

_READERS = 8  # object stores answer slowly but many at once; a segment is at most 4 MB


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
    """The run's dollars now; None as soon as one attempt's price of an hour is unknown.

    Attempts of other runs on this instance are read once, at the start: what they own of the
    instance's bill (a pretraining before this fine-tuning, say) is not this run's. So are the
    journals of this run's earlier attempts whose traffic was billed; this attempt's own traffic is
    told as it happens (``add_traffic``).
    """

    def __init__(self, run: Run, attempt: Attempt) -> None:
        here = (attempt.provider, attempt.instance)
        self._earlier: list[Usage] = []
        before: list[Attempt] = []
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
                if mine:
                    before.append(other)
        self._run, self._attempt = run, attempt
        self._traffic_before = earlier_traffic_usd(run, before)
        self._sent = 0
        self._lock = threading.Lock()

    def add_traffic(self, sent: int) -> float:
        """Count ``sent`` bytes that this attempt uploaded; returns their dollars. From any thread.

        Only what the journal records as ``traffic/up_bytes`` belongs here.
        """
        with self._lock:
            self._sent += sent
        return traffic_usd(sent, self._attempt.usd_per_gb_up)

    @property
    def usd_per_hour(self) -> float | None:
        """What an hour of this machine costs now."""
        return self._attempt.usd_per_hour

    @property
    def traffic_usd(self) -> float:
        """Dollars of the run's traffic up to now; 0 where it is not billed."""
        return self._traffic_before + traffic_usd(self._sent, self._attempt.usd_per_gb_up)

    def usd(self) -> float | None:
        """Dollars of the run up to now, for machines and traffic."""
        bills = bill([*self._earlier, usage_of(self._run, self._attempt, time.time())])
        mine = [item for name, item in bills.items() if name.startswith(f"{self._run.id}/")]
        return plus_traffic(total_usd(mine), self.traffic_usd)


def earlier_traffic_usd(run: Run, attempts: Sequence[Attempt]) -> float:
    """Dollars of all that ``attempts`` sent to the root, by their journals.

    Costs one listing an attempt and one read a segment, eight at a time, and nothing at all for
    attempts whose traffic was free. A line is parsed only if it names the metric: a segment of
    4 MB takes milliseconds. Broken lines are passed over; ``tessera-exp`` names such damage.
    """
    billed = [attempt for attempt in attempts if attempt.usd_per_gb_up > 0]
    if not billed:
        return 0.0
    with ThreadPoolExecutor(_READERS) as pool:
        listed = list(pool.map(lambda a: run.root.files(run.path("journal", a.id)), billed))
        read = [pool.map(lambda path: _uploads(run.root.read_bytes(path)), p) for p in listed]
        total = 0.0
        for attempt, segments in zip(billed, read, strict=True):
            sent = {number: value for found in segments for number, value in found.items()}
            total += traffic_usd(count_bytes(sent.values()), attempt.usd_per_gb_up)
    return total


def _uploads(segment: bytes) -> dict[int, float]:
    """Bytes of each upload that a journal segment tells of, by the record's sequence number."""
    found: dict[int, float] = {}
    for line in _lines_with(segment, f'"{UP_BYTES}"'.encode()):
        try:
            record = json.loads(line)
            if record["kind"] == "metric" and record["key"] == UP_BYTES:
                found[int(record["seq"])] = float(record["value"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a torn last line, or damage
    return found


def _lines_with(data: bytes, text: bytes) -> Iterator[bytes]:
    """The lines of ``data`` that contain ``text``; the others are not even cut out."""
    at = data.find(text)
    while at >= 0:
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        yield data[data.rfind(b"\n", 0, at) + 1 : end]
        at = data.find(text, end)
