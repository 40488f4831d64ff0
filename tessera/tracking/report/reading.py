"""One pass over a run's journals, of which only what the page needs is held.

Each segment is condensed as it is read (``tessera.tracking.condense``), which leaves the records
that the figures of ``tessera.tracking.queries`` follow from. Beside them stay the events, and of
the metrics that are drawn three numbers a point. So a run of millions of records takes the memory
of one segment and of those numbers.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from tessera.runs import Run
from tessera.tracking.checkpoints import STALL
from tessera.tracking.condense import Cut, condense
from tessera.tracking.history import RunHistory, assemble
from tessera.tracking.records import Record, read_segment, segments
from tessera.tracking.report.spend import Floats


@dataclass
class Track:
    """The points of one metric in the surviving lineage, as they come."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, record: Record) -> None:
        """One more point."""
        self.steps.append(record.step)
        self.times.append(record.time)
        self.values.append(record.number)

    def sorted(self) -> tuple[Floats, Floats, Floats]:
        """Steps, times and values by step; of several at one step the first that was written."""
        steps, first = np.unique(np.asarray(self.steps, dtype=float), return_index=True)
        return steps, np.asarray(self.times)[first], np.asarray(self.values)[first]


@dataclass(frozen=True)
class Reading:
    """A run with condensed records, all its events, and the tracks of the metrics asked for.

    ``beyond`` are those of the newest attempt above the lineage: not covered by a checkpoint, so
    nobody knows yet whether they will count. Empty for a run that is done.
    """

    history: RunHistory
    tracks: dict[str, Track]
    beyond: dict[str, Track]
    events: tuple[Record, ...]


def read_run(run: Run, keys: Collection[str], *, now: float | None = None) -> Reading:
    """Read ``run``; ``keys`` are metrics whose points are wanted, ``now`` as in ``read_history``.

    Raises ``DamagedError`` for a journal that is damaged or not whole.
    """
    now = time.time() if now is None else now
    lineage, endings = tuple(run.lineage()), run.endings()
    tracks, beyond = ({key: Track() for key in keys} for _ in range(2))
    top = lineage[-1].upto if lineage else -1
    events: list[Record] = []
    attempts = []
    for attempt in run.attempts():
        beyond = {key: Track() for key in keys}  # of the newest attempt alone
        kept: list[Record] = []
        cut, last, count, latest = Cut.of(attempt, lineage), 0, 0, None
        found = segments(run, attempt.id)
        for paths in found:
            records = read_segment(run, paths, last, newest=paths is found[-1])
            part = condense(records, cut, last_seq=last)
            last, count = part.last_seq, count + part.count
            latest = max(latest or part.last_time, part.last_time) if part.count else latest
            kept += _wanted(records, part.records, events)
            _track(records, cut, top, tracks, beyond)
        ending = endings.get(attempt.id)
        attempts.append(assemble(run, attempt, ending, tuple(kept), count, latest, now))
    history = RunHistory(run, lineage, tuple(attempts))
    if history.done is not None:
        beyond = {key: Track() for key in keys}
    return Reading(history, tracks, beyond, tuple(events))


def _wanted(
    records: list[Record], condensed: tuple[Record, ...], events: list[Record]
) -> list[Record]:
    """What stays of a segment; all its events go to ``events`` too."""
    own = {record.seq for record in condensed}
    stay = list(condensed)
    for record in records:
        if record.kind == "event":
            events.append(record)
        if (record.kind == "event" or record.key == STALL) and record.seq not in own:
            stay.append(record)
    return sorted(stay, key=lambda record: record.seq)


def _track(
    records: list[Record], cut: Cut, top: int, tracks: dict[str, Track], beyond: dict[str, Track]
) -> None:
    """Points to the tracks of the lineage, or to those above its last step ``top``."""
    for record in records:
        if record.kind == "metric" and record.key in tracks:
            if cut.place(record.step) == 1:
                tracks[record.key].add(record)
            elif record.step > top:
                beyond[record.key].add(record)
