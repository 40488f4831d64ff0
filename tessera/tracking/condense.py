"""A journal in few records: what the figures of ``tessera.tracking.queries`` are made of, no more.

And what ``tessera.tracking.alerts`` are made of: the steps that were not applied, the rollbacks.

A run of six days leaves hundreds of thousands of records, of which its row in a table needs some
dozens. ``condense`` takes a stretch of an attempt's records and leaves others from which the same
figures follow: of each metric of the lineage the furthest point, every evaluation's loss, prices,
the bytes of all transfers as one, and the seconds of each category as one.

What counts depends on where the lineage enters and leaves the attempt (``Cut``), so the condensed
records of a stretch are good for that cut only, or for any that has the stretch on the same side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tessera.ledger.traffic import DOWN_BYTES, UP_BYTES, count_bytes
from tessera.runs import Attempt, Segment
from tessera.tracking.records import Record
from tessera.tracking.told import HOUR, LATE

BUDGET_PLANNED = "budget/planned"
"""The journal event with which a run that a budget ends says where its end is."""
EVALUATED = "eval/loss"
TRAINED = "train/loss"
SKIPPED = "stability/skipped"
ROLLED_BACK = "run/rolled_back"
_EVENTS = frozenset({BUDGET_PLANNED, LATE, SKIPPED, ROLLED_BACK})
_TRANSFERS = frozenset({UP_BYTES, DOWN_BYTES})


@dataclass(frozen=True)
class Cut:
    """Steps above ``after`` up to ``upto`` of an attempt are the lineage's."""

    after: int
    upto: int

    @classmethod
    def of(cls, attempt: Attempt, lineage: Sequence[Segment]) -> Cut:
        """Where the lineage enters and leaves ``attempt``; nowhere if it has no part in it."""
        for number, segment in enumerate(lineage):
            if segment.attempt == attempt.id:
                return cls(-1 if number == 0 else segment.after, segment.upto)
        start = attempt.resumed_from.step if attempt.resumed_from else 0
        return cls(start, start)

    def place(self, step: int) -> int:
        """0 before the lineage enters, 1 within it, 2 beyond it."""
        return 0 if step <= self.after and step <= self.upto else 1 if step <= self.upto else 2


@dataclass(frozen=True)
class Stretch:
    """Condensed records of a stretch that had ``count``, the last one numbered ``last_seq``.

    ``first_step`` and ``last_step`` span what was condensed for ``cut``; ``last_time`` is its
    latest record's, in seconds since the epoch (-inf where it had none).
    """

    records: tuple[Record, ...]
    cut: Cut
    count: int
    last_seq: int
    first_step: int
    last_step: int
    last_time: float

    def serves(self, cut: Cut) -> bool:
        """Whether it is what condensing for ``cut`` would give."""
        if cut == self.cut or not self.count:
            return True
        # Every record lies at the same place under both cuts: none changes sides.
        ends = (self.first_step, self.last_step)
        places = {self.cut.place(step) for step in ends} | {cut.place(step) for step in ends}
        return len(places) == 1


def condense(records: Sequence[Record], cut: Cut, *, last_seq: int = 0) -> Stretch:
    """The stretch's records in few; ``last_seq`` is the number before them."""
    steps = [record.step for record in records]
    return Stretch(
        tuple(sorted(_needed(records, cut), key=lambda record: record.seq)),
        cut,
        len(records),
        records[-1].seq if records else last_seq,
        min(steps, default=0),
        max(steps, default=0),
        max((record.time for record in records), default=-math.inf),
    )


def _needed(records: Sequence[Record], cut: Cut) -> Iterable[Record]:
    metrics = [record for record in records if record.kind == "metric"]
    yield from _furthest(record for record in metrics if cut.place(record.step) == 1)
    yield from _telling(metrics, cut)
    yield from _transfers(metrics)
    yield from _seconds((record for record in records if record.kind == "span"), cut)
    yield from (r for r in records if r.kind == "event" and r.key in _EVENTS)


def _furthest(points: Iterable[Record]) -> Iterable[Record]:
    """Of each metric the first point at its furthest step; every evaluation's loss."""
    found: dict[str, Record] = {}
    for point in points:
        if point.key in _TRANSFERS or point.key == HOUR:
            continue
        if point.key == EVALUATED:
            found[f"{EVALUATED} {point.seq}"] = point
        elif point.key not in found or point.step > found[point.key].step:
            found[point.key] = point
    return found.values()


def _telling(metrics: Sequence[Record], cut: Cut) -> Iterable[Record]:
    """Prices of an hour; beyond the lineage the newest point, and the last training loss."""
    found = {record.seq: record for record in metrics if record.key == HOUR}
    beyond = [record for record in metrics if cut.place(record.step) == 2]
    trained = [record for record in metrics if record.key == TRAINED]
    if beyond:
        newest = max(beyond, key=lambda record: (record.step, record.time))
        found[newest.seq] = newest
    if trained and cut.place(trained[-1].step) != 1:
        found[trained[-1].seq] = trained[-1]
    return found.values()


def _transfers(metrics: Sequence[Record]) -> Iterable[Record]:
    for key in sorted(_TRANSFERS):
        own = [record for record in metrics if record.key == key]
        if own:
            yield replace(own[-1], value=count_bytes(record.number for record in own))


def _seconds(spans: Iterable[Record], cut: Cut) -> Iterable[Record]:
    """Of each category one span before, one within and one beyond the lineage."""
    found: dict[tuple[str, int], list[Record]] = {}
    for span in spans:
        found.setdefault((span.key, cut.place(span.step)), []).append(span)
    for own in found.values():
        furthest = max(own, key=lambda span: span.step)
        yield replace(furthest, value=math.fsum(span.number for span in own))
