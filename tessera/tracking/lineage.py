"""A run's points one after the other: a journal of millions of records, never whole in memory.

``read_run`` goes over the journals once and keeps what a summary is made of (as few records as
``tessera.tracking.condense`` leaves, so the figures are the same) and how many points there are.
With ``Memos`` of the last time it goes on where what has not changed since ends.
``points_from`` goes over them again, from the segment on in which there can be something to send.

A point is named by its metric and step. Two of one name are possible (a segment that was uploaded
twice, an evaluation that was repeated); the one that was written first counts.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace

from tessera.ledger.traffic import DOWN_BYTES, UP_BYTES, count_bytes
from tessera.runs import Attempt, Run
from tessera.tracking.condense import EVALUATED, TRAINED, Cut
from tessera.tracking.history import RunHistory, assemble
from tessera.tracking.journal import HEARTBEAT
from tessera.tracking.records import (
    Point,
    Record,
    quick,
    read_segments,
    segment_lines,
    segments,
)
from tessera.tracking.told import HOUR

_TRANSFERS = (UP_BYTES, DOWN_BYTES)
_CHUNK = 12  # bits of a step that one integer of ``Names`` covers


class Names:
    """Which points were there already: one bit a point, whatever their order."""

    def __init__(self) -> None:
        self._bits: dict[str, dict[int, int]] = {}

    def add(self, key: str, step: int) -> bool:
        """Whether the point ``key`` at ``step`` is a new one."""
        chunks = self._bits.get(key)
        if chunks is None:
            chunks = self._bits[key] = {}
        place, bit = step >> _CHUNK, 1 << (step & ((1 << _CHUNK) - 1))
        known = chunks.get(place, 0)
        if known & bit:
            return False
        chunks[place] = known | bit
        return True

    def copy(self) -> Names:
        """Another one with the same points."""
        other = Names()
        other._bits = {key: dict(chunks) for key, chunks in self._bits.items()}
        return other


@dataclass(frozen=True)
class Reading:
    """A run as the root had it: ``history`` with few records, and what is known of its points.

    ``points`` are those of the surviving lineage, ``at_end`` of them lie at its last step.
    ``furthest`` has for each attempt the furthest step of a metric in each of its segments.
    """

    history: RunHistory
    points: int
    at_end: int
    furthest: dict[str, tuple[int, ...]]


class _Kept:
    """The few records of one attempt, collected while its journal goes by."""

    def __init__(self, attempt: Attempt, cut: Cut) -> None:
        self.attempt, self.cut = attempt.id, cut
        self.count = self.points = self.at_end = 0
        self.last_time = -math.inf
        self.furthest = -1
        self._names = Names()
        self._best: dict[str, Point] = {}
        self._all: list[Record] = []
        self._moved: dict[str, tuple[Point, int]] = {}
        self._seconds: dict[tuple[str, int], tuple[Record, array[float]]] = {}
        self._newest: Point | None = None
        self._trained: Point | None = None

    def copy(self, cut: Cut) -> _Kept:
        """Another one that has taken the same; ``cut`` must be one that ``serves`` is true for."""
        other = copy(self)
        other.cut = cut
        other.at_end = self.at_end if cut == self.cut else 0
        other._names = self._names.copy()
        other._best, other._all, other._moved = dict(self._best), [*self._all], dict(self._moved)
        other._seconds = {k: (record, all_[:]) for k, (record, all_) in self._seconds.items()}
        return other

    def serves(self, cut: Cut) -> bool:
        """Whether it would have kept the same for ``cut``, but for the points at its end."""
        further = cut.after == self.cut.after and self.furthest <= self.cut.upto < cut.upto
        return cut == self.cut or further

    def take(self, line: Point | Record) -> int:
        """One more line; the step of a metric, -1 for others."""
        self.count += 1
        if line.step > self.furthest:
            self.furthest = line.step
        if line.time > self.last_time:
            self.last_time = line.time
        if isinstance(line, Record):
            if line.kind != "metric":
                self._other(line)
                return -1
            line = Point(line.key, line.number, line.step, line.time, line.seq)
        key, _, step, _, _ = line
        if self.cut.after < step <= self.cut.upto:
            if self._names.add(key, step):
                self.points += 1
                self.at_end += step == self.cut.upto
                if key != HOUR and key not in _TRANSFERS:
                    best = self._best.get(key)
                    if key == EVALUATED:
                        self._all.append(self._record(line))
                    elif best is None or step > best.step:
                        self._best[key] = line
        elif step > self.cut.upto:
            newest = self._newest
            if newest is None or (step, line.time) > (newest.step, newest.time):
                self._newest = line
        if key == TRAINED:
            self._trained = line
        elif key == HOUR:
            self._all.append(self._record(line))
        elif key in _TRANSFERS:
            before = self._moved[key][1] if key in self._moved else 0
            self._moved[key] = line, before + count_bytes([line.number])
        return step

    def _other(self, record: Record) -> None:
        if record.kind == "span":
            place = record.key, self.cut.place(record.step)
            furthest, seconds = self._seconds.get(place, (record, array("d")))
            seconds.append(record.number)
            self._seconds[place] = max(furthest, record, key=lambda r: r.step), seconds
        elif not (record.kind == "event" and record.key == HEARTBEAT):
            self._all.append(record)

    def records(self) -> tuple[Record, ...]:
        """Records from which the same figures follow, in order of writing."""
        found = {record.seq: record for record in self._all}
        single = (self._newest, self._trained, *self._best.values())
        found |= {point.seq: self._record(point) for point in single if point is not None}
        moved = [replace(self._record(point), value=sum_) for point, sum_ in self._moved.values()]
        spans = [replace(span, value=math.fsum(all_)) for span, all_ in self._seconds.values()]
        return tuple(sorted([*found.values(), *moved, *spans], key=lambda record: record.seq))

    def _record(self, point: Point) -> Record:
        return Record("metric", point.key, _spelt(point.number), point.step, point.time,
                      self.attempt, point.seq)  # fmt: skip


def _spelt(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


@dataclass(frozen=True)
class Memo:
    """What was kept of the first segments of an attempt's journal.

    ``stamps`` says for each of them what would be another text if it had changed. ``last`` is the
    number of their last record, ``steps`` as in ``Reading.furthest``.
    """

    stamps: tuple[str, ...]
    kept: _Kept
    steps: tuple[int, ...]
    last: int


Memos = dict[str, list[Memo]]
"""By attempt, the longest beginning first."""


def read_run(
    run: Run,
    *,
    now: float | None = None,
    memos: Memos | None = None,
    stamps: Mapping[str, str] | None = None,
) -> Reading:
    """Read a run, one segment of its journals at a time.

    ``now`` (seconds since the epoch) decides which attempts are alive. ``memos`` of the last time
    (filled anew) spare the segments that ``stamps``, a listing from before this call, shows to be
    the same. Raises ``DamagedError`` as ``read_history`` does.
    """
    now = time.time() if now is None else now
    lineage = tuple(run.lineage())  # before the journals: see tessera.tracking.history
    endings = run.endings()
    attempts, points, at_end, furthest = [], 0, 0, {}
    tip = lineage[-1].upto if lineage else None
    for attempt in run.attempts():
        known = [] if memos is None else memos.get(attempt.id, [])
        cut = Cut.of(attempt, lineage)
        kept, steps, fresh = _read_attempt(run, attempt, cut, known, stamps or {})
        if memos is not None:
            memos[attempt.id] = fresh
        last = kept.last_time if kept.count else None
        records = kept.records()
        ending = endings.get(attempt.id)
        attempts.append(assemble(run, attempt, ending, records, kept.count, last, now))
        points += kept.points
        at_end += kept.at_end if kept.cut.upto == tip else 0
        furthest[attempt.id] = steps
    return Reading(RunHistory(run, lineage, tuple(attempts)), points, at_end, furthest)


def _read_attempt(
    run: Run, attempt: Attempt, cut: Cut, known: list[Memo], stamps: Mapping[str, str]
) -> tuple[_Kept, tuple[int, ...], list[Memo]]:
    """What is kept of an attempt, its segments' steps, and what can spare reading them again.

    Three beginnings are remembered: the journal as it is, the closed segments, and those that lie
    within the lineage, which stay as good when a checkpoint moves its end.
    """
    found = segments(run, attempt.id)
    told = [
        # A segment that appeared since the listing has no stamp and is not remembered.
        "" if any(path not in stamps for path in twins)
        else f"{twins is found[-1]} {[(path, stamps[path]) for path in twins]}"
        for twins in found
    ]  # fmt: skip
    memo = next((m for m in known if _begins(told, m.stamps) and m.kept.serves(cut)), None)
    if memo is None:
        memo = Memo((), _Kept(attempt, cut), (), 0)
    fresh = [memo] if memo.stamps else []
    kept, steps, last = memo.kept.copy(cut), [*memo.steps], memo.last
    within: Memo | None = None
    for place in range(len(steps), len(found)):
        newest, furthest = place == len(found) - 1, -1
        for line in segment_lines(run, found[place], last, quick, newest=newest):
            last, furthest = line.seq, max(furthest, kept.take(line))
        steps.append(furthest)
        if not all(told[: place + 1]):
            continue
        closed = place >= len(found) - 2
        if closed or kept.furthest <= cut.upto:
            now = Memo(tuple(told[: place + 1]), kept.copy(cut), tuple(steps), last)
            if closed:
                fresh.append(now)
            else:
                within = now
    fresh += [within] if within else []
    fresh += [m for m in known if m is not memo and _begins(told, m.stamps)]
    return kept, tuple(steps), _best(fresh, cut)


def _begins(told: list[str], stamps: tuple[str, ...]) -> bool:
    return bool(stamps) and told[: len(stamps)] == list(stamps)


def _best(memos: list[Memo], cut: Cut) -> list[Memo]:
    """The two longest of those that serve now, and the longest that lies within the lineage."""
    ordered = sorted(memos, key=lambda memo: -len(memo.stamps))
    good = [memo for memo in ordered if memo.kept.serves(cut)]
    within = [memo for memo in good if memo.kept.furthest <= cut.upto]
    return good[:2] + [memo for memo in within[:1] if memo not in good[:2]]


def points_from(reading: Reading, step: int | None) -> Iterator[Point]:
    """The points of the surviving lineage at ``step`` and beyond (None: all), oldest first.

    Segments in which there is nothing of that are not fetched.
    """
    history = reading.history
    attempts = {item.attempt.id: item.attempt for item in history.attempts}
    for segment in history.lineage:
        cut = Cut.of(attempts[segment.attempt], history.lineage)
        if step is not None and cut.upto < step:
            continue
        known = reading.furthest[segment.attempt]

        def skip(place: int, known: tuple[int, ...] = known) -> bool:
            # The last one that was known may have grown since.
            return step is not None and place < len(known) - 1 and known[place] < step

        names, after = Names(), cut.after if step is None else max(cut.after, step - 1)
        for lines in read_segments(history.run, segment.attempt, quick, skip=skip):
            for line in lines:
                if not after < line.step <= cut.upto:
                    continue
                if isinstance(line, Record):
                    if line.kind != "metric":
                        continue
                    line = Point(line.key, line.number, line.step, line.time, line.seq)
                if names.add(line.key, line.step):
                    yield line
