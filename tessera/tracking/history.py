"""What the root says about a run, read once: its attempts, its lineage, and which records count.

Everything that shows or replays a run starts here, so that the table, the web view and a promotion
can never disagree about which attempt's points survived or who paid for which second.

The order of reading matters: lineage first, journals after it. A checkpoint is complete only once
every record up to its step is in the root, so the journals read later cover at least the lineage.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

from tessera.errors import DamagedError
from tessera.ledger.invoices import Invoice
from tessera.ledger.meter import Bill, Span, Usage, bill, file_seconds
from tessera.ledger.prices import PriceChange
from tessera.ledger.traffic import DOWN_BYTES, UP_BYTES, count_bytes, traffic_usd
from tessera.runs import OUTCOMES_DONE, Attempt, Ending, Run, Segment, scan_runs
from tessera.storage import Root
from tessera.tracking.invoices import Stay, read_invoices, with_invoices
from tessera.tracking.records import Kind, Record, last_record_time, read_journal
from tessera.tracking.told import HOUR, LATE, corrected, late_quote, price_changes

ALIVE_S = 90.0
"""An attempt without an ending lives if its last record is younger; uploads come every 30 s."""

SURE_PRICES = frozenset({"provider", "TESSERA_USD_PER_HOUR"})
"""Price sources that were told for this machine; dollars from any other are an estimate."""

_READERS = 8  # object stores answer slowly but many at once


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt and its records; times in seconds since the epoch.

    ``attempt`` has the prices that its provider told late, if it did. ``ended_at`` is what it said,
    else the time of its last record in the root (its own start if it left none). ``estimated``
    marks that figure for an attempt that is neither ended nor alive.
    """

    attempt: Attempt
    ending: Ending | None
    records: tuple[Record, ...]
    ended_at: float
    alive: bool

    @property
    def estimated(self) -> bool:
        """Whether nobody said when it ended."""
        return self.ending is None and not self.alive

    @property
    def usage(self) -> Usage:
        """What the ledger wants to know of it."""
        a = self.attempt
        return Usage(
            a.id, a.provider, a.instance, a.started_at, a.billed_from, self.ended_at,
            a.usd_per_hour, self.estimated, self.prices,
        )  # fmt: skip

    @cached_property
    def prices(self) -> tuple[PriceChange, ...]:
        """When its price of an hour changed, and to what."""
        return price_changes((record.time, record.number) for record in self._metrics(HOUR))

    @cached_property
    def traffic_bytes(self) -> int:
        """Bytes that it sent to the root; whatever became of the work, they are paid for."""
        return count_bytes(record.number for record in self._metrics(UP_BYTES))

    @cached_property
    def traffic_down_bytes(self) -> int:
        """Bytes that it fetched from the root."""
        return count_bytes(record.number for record in self._metrics(DOWN_BYTES))

    @property
    def upload_usd(self) -> float:
        """US dollars of what it sent; 0 where the attempt's traffic is not billed."""
        return traffic_usd(self.traffic_bytes, self.attempt.usd_per_gb_up)

    @property
    def traffic_usd(self) -> float:
        """US dollars of its traffic, both ways."""
        down = traffic_usd(self.traffic_down_bytes, self.attempt.usd_per_gb_down)
        return self.upload_usd + down

    def _metrics(self, key: str) -> Iterator[Record]:
        return (line for line in self.records if line.kind == "metric" and line.key == key)


@dataclass(frozen=True)
class RunHistory:
    """One run as the root has it at one moment."""

    run: Run
    lineage: tuple[Segment, ...]
    attempts: tuple[AttemptHistory, ...]

    @property
    def upto(self) -> int | None:
        """The last step that is recorded for good; None before the first checkpoint."""
        return self.lineage[-1].upto if self.lineage else None

    @property
    def done(self) -> Ending | None:
        """The ending that completed the run (the earliest, as in ``Run.finished``)."""
        endings = [
            a.ending for a in self.attempts if a.ending and a.ending.outcome in OUTCOMES_DONE
        ]
        return min(endings, key=lambda ending: ending.ended_at, default=None)

    @cached_property
    def points(self) -> tuple[Record, ...]:
        """The metrics of the surviving lineage, one for each key and step, oldest first.

        Step s of a segment counts if after < s <= upto; step 0 belongs to the first segment.
        """
        seen: set[tuple[str, int]] = set()
        points = []
        for record in self.kept("metric"):
            if (record.key, record.step) not in seen:
                seen.add((record.key, record.step))
                points.append(record)
        return tuple(points)

    def kept(self, kind: Kind) -> Iterator[Record]:
        """Records of ``kind`` in the surviving lineage, oldest first."""
        by_id = {item.attempt.id: item for item in self.attempts}
        for number, segment in enumerate(self.lineage):
            after = -1 if number == 0 else segment.after
            for record in by_id[segment.attempt].records:
                if record.kind == kind and after < record.step <= segment.upto:
                    yield record

    @property
    def live(self) -> Record | None:
        """The newest metric of a living attempt beyond the lineage, or None."""
        newest = None
        for item in self.attempts:
            if item.alive:
                for record in item.records:
                    beyond = self.upto is None or record.step > self.upto
                    if record.kind == "metric" and beyond:
                        newest = record if newest is None else max(newest, record, key=_place)
        return newest

    def kept_upto(self, item: AttemptHistory) -> int | None:
        """The step above which the attempt's work was or must be done again; None: nothing was.

        A living attempt at the tip may still publish what it has done, so nothing of it is lost
        unless a later attempt already goes over the same steps.
        """
        names = [segment.attempt for segment in self.lineage]
        later = any(other.attempt.number > item.attempt.number for other in self.attempts)
        if item.attempt.id in names:
            segment = self.lineage[names.index(item.attempt.id)]
            tip = segment is self.lineage[-1]
            done = item.ending is not None and item.ending.outcome in OUTCOMES_DONE
            return None if tip and (done or (item.alive and not later)) else segment.upto
        if item.alive and not later:
            return None
        return item.attempt.resumed_from.step if item.attempt.resumed_from else 0


def _place(record: Record) -> tuple[int, float]:
    return record.step, record.time


def read_history(run: Run, *, now: float | None = None, records: bool = True) -> RunHistory:
    """Read one run. ``now`` (seconds since the epoch) decides which attempts are alive.

    Without ``records`` only the time at which a silent attempt was last heard of is read. Raises
    ``StoreError`` for a damaged journal or a missing attempt.
    """
    now = time.time() if now is None else now
    lineage = tuple(run.lineage())
    endings = run.endings()
    attempts = []
    for attempt in run.attempts():
        ending = endings.get(attempt.id)
        lines = tuple(read_journal(run, attempt.id)) if records else ()
        last = max((line.time for line in lines), default=None)
        if ending is None and not records:
            last = last_record_time(run, attempt.id)
        count = len(lines) if records else None
        attempts.append(assemble(run, attempt, ending, lines, count, last, now))
    return RunHistory(run, lineage, tuple(attempts))


def assemble(
    run: Run,
    attempt: Attempt,
    ending: Ending | None,
    lines: tuple[Record, ...],
    count: int | None,
    last: float | None,
    now: float,
) -> AttemptHistory:
    """One attempt from its records.

    ``count`` is how many are in the root (None: not looked at), ``last`` when the latest of them
    was written, ``now`` decides whether it is alive (all in seconds since the epoch).
    """
    said = ending.records if ending else None
    if count is not None and said is not None and count < said:
        raise DamagedError(
            f"Attempt {attempt.id} of run {run.id} has {count} of {said} records in "
            f"{run.root.url}; restore its journal from a backup."
        )
    last = attempt.started_at if last is None else last
    alive = ending is None and now - last < ALIVE_S
    ended_at = ending.ended_at if ending else last
    return AttemptHistory(_as_told(attempt, lines), ending, lines, ended_at, alive)


def _as_told(attempt: Attempt, lines: Iterable[Record]) -> Attempt:
    """``attempt`` with what its provider said later than at its start."""
    told = (late_quote(r.value) for r in lines if r.kind == "event" and r.key == LATE)
    quote = next((quote for quote in told if quote is not None), None)
    return attempt if quote is None else corrected(attempt, quote)


@dataclass(frozen=True)
class Histories:
    """All runs of a root: those that can be read whole, oldest first, and what became of others.

    ``damaged`` says by run id, or path of an invoice, what is wrong; ``billable`` are damaged runs
    without their records, as far as the bills of the whole ones need them.
    """

    whole: tuple[RunHistory, ...]
    billable: tuple[RunHistory, ...]
    damaged: dict[str, DamagedError]
    invoices: Mapping[tuple[str, str], Invoice]

    @cached_property
    def bills(self) -> dict[str, Bill]:
        """Bills of all attempts, with what was billed where that is recorded."""
        return bill_all([*self.whole, *self.billable], self.invoices)


def read_histories(root: Root, *, now: float | None = None) -> Histories:
    """Every run of the root; one that is damaged does not hide the others."""
    runs, damaged = scan_runs(root)
    with ThreadPoolExecutor(_READERS) as pool:
        read = list(pool.map(lambda run: try_history(run, now), runs))
    damaged |= {run.id: error for run, (_, error) in zip(runs, read, strict=True) if error}
    found = [(history, error) for history, error in read if history is not None]
    invoices = read_invoices(root)
    damaged |= invoices.damaged
    return Histories(
        tuple(history for history, error in found if error is None),
        tuple(history for history, error in found if error is not None),
        dict(sorted(damaged.items())),
        invoices.found,
    )


def try_history(
    run: Run, now: float | None, *, records: bool = True
) -> tuple[RunHistory | None, DamagedError | None]:
    """The run's history, without records where they are damaged, and what is wrong with it."""
    try:
        return read_history(run, now=now, records=records), None
    except DamagedError as error:
        return (try_history(run, now, records=False)[0] if records else None), error


def read_with_neighbours(
    run: Run, *, now: float | None = None
) -> tuple[RunHistory, list[RunHistory]]:
    """One run, and of all others what ``read_neighbours`` reads."""
    neighbours = read_neighbours(run, now=now)
    return read_history(run, now=now), neighbours


def read_neighbours(run: Run, *, now: float | None = None) -> list[RunHistory]:
    """The attempts of all other runs, with no more records than the bill of ``run`` needs.

    Others that are damaged are left out. Records of one that shared an instance with this run are
    read, since an invoice of that instance is shared out by what each did there.
    """
    others = [other for other in scan_runs(run.root)[0] if other.id != run.id]
    here = {(attempt.provider, attempt.instance) for attempt in run.attempts()}

    def read(other: Run) -> RunHistory | None:
        history = try_history(other, now, records=False)[0]
        places = (
            {(i.attempt.provider, i.attempt.instance) for i in history.attempts} if history else {}
        )
        return try_history(other, now)[0] if here.intersection(places) else history

    with ThreadPoolExecutor(_READERS) as pool:
        return [found for found in pool.map(read, others) if found is not None]


def bill_all(
    histories: Iterable[RunHistory], invoices: Mapping[tuple[str, str], Invoice] | None = None
) -> dict[str, Bill]:
    """Bills of all attempts together, since one instance may have carried several runs.

    Keyed by ``run id/attempt id``: tokens of attempts are random, not unique by force. ``invoices``
    are by provider and instance; without them every figure is the ledger's.
    """
    items = {
        f"{history.run.id}/{item.attempt.id}": item
        for history in histories
        for item in history.attempts
    }
    bills = bill(replace(item.usage, attempt=name) for name, item in items.items())
    stays = {
        name: Stay(item.attempt.provider, item.attempt.instance, bills[name], item.traffic_usd)
        for name, item in items.items()
    }
    return with_invoices(stays, invoices or {})


def bills_of(history: RunHistory, bills: dict[str, Bill]) -> list[tuple[AttemptHistory, Bill]]:
    """The run's attempts with their share of ``bill_all``."""
    return [(item, bills[f"{history.run.id}/{item.attempt.id}"]) for item in history.attempts]


def file_attempt(history: RunHistory, item: AttemptHistory, own: Bill) -> dict[str, float]:
    """Seconds of one attempt by category of the ledger; they add up to its billed seconds."""
    spans = [
        Span(record.attempt, record.key, record.number, record.step)
        for record in item.records
        if record.kind == "span"
    ]
    return file_seconds(
        own,
        spans,
        started_at=item.attempt.started_at,
        setup_started_at=item.attempt.setup_started_at,
        kept_upto=history.kept_upto(item),
    )


def last_number(points: Sequence[Record], key: str) -> float | None:
    """The value of a metric at its furthest step, or None."""
    found = [point for point in points if point.key == key]
    return max(found, key=lambda point: point.step).number if found else None
