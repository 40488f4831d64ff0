"""A run's journal as it grows: the last records first, then only what is new.

A look costs two listings, the sizes of the open segment's copies and, if one of them grew, a read
of the longer one (4 MB at most). Of a segment that was read before only what is behind is parsed.
Closed segments are read once, and at the start only as many from the end as are asked for: a
journal of two million records shows its last lines after one or two reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tessera.errors import DamagedError, NotFoundError
from tessera.runs import Attempt, Ending, Run, read_attempt, read_ending
from tessera.tracking.records import Record, read_lines

POINT_KEY = "progress/tokens"
"""Every log point has one of these, so they are counted to know how far back to read."""
_ATTEMPTS_BACK = 4
_PATH = re.compile(
    r"/journal/(?P<attempt>\d+-[0-9a-f]+)/(?P<number>\d{6})(?P<twin>\.twin)?\.jsonl$"
)

Listing = Mapping[str, Mapping[int, Sequence[str]]]
"""The paths of each attempt's segments by number: a segment's own, then its twin's if any."""


@dataclass(frozen=True)
class News:
    """What one look brought: attempts that began or ended since the last one, and new records."""

    began: tuple[Attempt, ...]
    ended: tuple[tuple[Attempt, Ending], ...]
    records: tuple[Record, ...]


@dataclass
class RunTail:
    """Follows the newest attempt of a run; the first look brings about the last ``lines`` points.

    Raises ``StoreError``, and ``DamagedError`` for records that no copy has whole.
    """

    run: Run
    lines: int
    attempts: dict[str, Attempt] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)
    last_heard: float | None = None
    """Time of the newest attempt's last record, in seconds since the epoch; None: it left none."""
    _cursor: _Cursor | None = None

    @property
    def newest(self) -> Attempt | None:
        """The attempt that took over last; of two of one number the one with the smaller token."""
        return min(self.attempts.values(), key=lambda a: (-a.number, a.token), default=None)

    def look(self) -> News:
        """Everything that came since the last look."""
        first = not self.attempts
        began, ended = self._look_at_attempts()  # endings first: whose is there wrote all before
        listing = self._list() if self.attempts else {}
        records: list[Record] = []
        if (newest := self.newest) is not None:
            if self._cursor is None or self._cursor.attempt != newest.id:
                records += self._take_over(newest, listing, first=first)
            assert self._cursor is not None
            fresh = self._cursor.read(listing.get(newest.id, {}))
            records += fresh
            last = max((record.time for record in fresh), default=self._cursor.last_time)
            self.last_heard = self._cursor.last_time = last
        return News(began, ended, tuple(records))

    def _look_at_attempts(self) -> tuple[tuple[Attempt, ...], tuple[tuple[Attempt, Ending], ...]]:
        names = self.run.root.children(self.run.path("attempts"))
        began, ended = [], []
        for name in names:
            known = name.removesuffix(".json")
            starts = name.endswith(".json") and not name.endswith(".end.json")
            if starts and known not in self.attempts:
                self.attempts[known] = read_attempt(self.run, known)
                began.append(self.attempts[known])
        for name in names:
            known = name.removesuffix(".end.json")
            if name.endswith(".end.json") and known in self.attempts and known not in self.endings:
                self.endings[known] = read_ending(self.run, known)
                ended.append((self.attempts[known], self.endings[known]))
        began.sort(key=lambda a: (a.number, a.token))
        return tuple(began), tuple(ended)

    def _list(self) -> Listing:
        found: dict[str, dict[int, list[str]]] = {}
        for path in self.run.root.files(self.run.path("journal")):
            if match := _PATH.search(path):
                copies = found.setdefault(match["attempt"], {})
                copies.setdefault(int(match["number"]), []).append(path)
        return found

    def _take_over(self, newest: Attempt, listing: Listing, *, first: bool) -> list[Record]:
        """Move on to ``newest``; what the attempt before had left to tell, or the last lines."""
        records: list[Record] = []
        if self._cursor is not None:
            records += self._cursor.read(listing.get(self._cursor.attempt, {}))
        self._cursor = _Cursor(self.run, newest.id)
        if not first:
            return records
        before = self._cursor.read_last(listing.get(newest.id, {}), self.lines)
        earlier = sorted((a for a in self.attempts.values() if a is not newest), key=_latest_first)
        for attempt in earlier[:_ATTEMPTS_BACK]:
            missing = self.lines - _points(before)
            if missing <= 0:
                break
            older = _Cursor(self.run, attempt.id)
            before = older.read_last(listing.get(attempt.id, {}), missing) + before
        return before


def _latest_first(attempt: Attempt) -> tuple[int, str]:
    return -attempt.number, attempt.token


@dataclass
class _Cursor:
    """How far one attempt's journal was read: record ``seq``, ``offset`` bytes of ``segment``."""

    run: Run
    attempt: str
    segment: int = 0
    offset: int = 0
    seq: int = 0
    last_time: float | None = None
    _sizes: dict[str, int] = field(default_factory=dict)

    def read_last(self, segments: Mapping[int, Sequence[str]], points: int) -> list[Record]:
        """The end of the journal, a segment at a time, until it has so many log points."""
        found: list[Record] = []
        newest = max(segments, default=0)
        for number in sorted(segments, reverse=True):
            part = _Cursor(self.run, self.attempt, number)
            records = part._read_segment(segments[number], newest=number == newest, whole=False)
            if number == newest:  # from here on ``read`` goes on
                self.segment, self.offset, self.seq = number, part.offset, part.seq
                self._sizes = part._sizes
            found = records + found
            if _points(found) >= points:
                break
        self.last_time = max((record.time for record in found), default=None)
        return found

    def read(self, segments: Mapping[int, Sequence[str]]) -> list[Record]:
        """What is behind the place that was reached."""
        found: list[Record] = []
        newest = max(segments, default=0)
        for number in sorted(number for number in segments if number >= self.segment):
            if number > self.segment:
                self.segment, self.offset, self._sizes = number, 0, {}
            found += self._read_segment(segments[number], newest=number == newest)
        return found

    def _read_segment(
        self, copies: Sequence[str], *, newest: bool, whole: bool = True
    ) -> list[Record]:
        """New records of one segment, of the copy that has most; ``whole``: none may be missing."""
        sizes = self._look_at_sizes(copies)
        if sizes == self._sizes:
            return []
        best: list[Record] = []
        trouble: DamagedError | None = None
        offset = self.offset
        for path in sorted(sizes, key=lambda path: -sizes[path]):
            with suppress(NotFoundError):  # a twin goes when its segment is closed
                data = self.run.root.read_bytes(path)
                records, damage, end = self._parse(path, data, newest=newest, whole=whole)
                if len(records) > len(best) or damage is None:
                    best, offset = records, end
                trouble = damage
                if damage is None:
                    break
        alone = newest and len(copies) == 1 and not self.run.root.is_local
        if trouble is not None and not alone:
            raise trouble
        self._sizes, self.offset = sizes, offset
        self.seq = best[-1].seq if best else self.seq
        return best

    def _look_at_sizes(self, copies: Sequence[str]) -> dict[str, int]:
        """Bytes of each copy: each upload of an open segment is longer than the one before."""
        sizes = {}
        for path in copies:
            with suppress(NotFoundError):
                sizes[path] = self.run.root.size(path)
        return sizes

    def _parse(
        self, path: str, data: bytes, *, newest: bool, whole: bool
    ) -> tuple[list[Record], DamagedError | None, int]:
        """Records beyond ``seq``, what is wrong, and the offset behind the last whole line."""
        end = data.rfind(b"\n") + 1
        last = self.seq if whole else _first_seq(data) - 1
        records, damage = read_lines(self.run, path, data[self.offset :], last, newest=newest)
        if damage is not None and self.offset:  # another copy than before, or a line that is hurt
            records, damage = read_lines(self.run, path, data, last, newest=newest)
        return records, damage, end if damage is None else 0


def _first_seq(data: bytes) -> int:
    try:
        return int(json.loads(data.split(b"\n", 1)[0])["seq"])
    except (ValueError, KeyError, TypeError):
        return 1  # its first line is damaged, and said to be


def _points(records: Sequence[Record]) -> int:
    return sum(record.kind == "metric" and record.key == POINT_KEY for record in records)
