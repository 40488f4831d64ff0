"""The journal's records, and how they are read back from a root.

    {"kind": "metric", "key": "train/loss", "value": 3.2, "step": 100, "time": 1.7e9, "seq": 41}

Kinds: ``metric`` (a number over steps), ``param`` and ``tag`` (a string), ``event`` (something that
happened, with details), ``span`` (seconds filed under a category of the ledger). NaN and infinities
are the strings "NaN", "Infinity", "-Infinity": JSON has no such numbers.

An attempt's records lie in numbered segments, one record a line. The one that is still written may
have a twin (``tessera.tracking.journal`` says why): both begin alike, and one may be damaged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from tessera.errors import DamagedError, NotFoundError
from tessera.runs import Run, what_is_wrong

Kind = Literal["metric", "param", "tag", "event", "span"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_SEGMENT = re.compile(r"/(\d{6})(\.twin)?\.jsonl$")


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Record:
    """One line of the journal. ``value`` is a number, a string, or an event's details."""

    kind: Kind
    key: str
    value: Any
    step: int
    time: float
    attempt: str
    seq: int

    @property
    def number(self) -> float:
        """The value of a metric or span as a float, NaN and infinities included."""
        return _NOT_FINITE[self.value] if isinstance(self.value, str) else float(self.value)


class Point(NamedTuple):
    """A metric's line as ``quick`` reads it, without what its place in the root says."""

    key: str
    number: float
    step: int
    time: float
    seq: int


class _Numbered(Protocol):
    @property
    def seq(self) -> int: ...


Line = TypeVar("Line", bound=_Numbered)
_RECORD = TypeAdapter(Record)
# A metric or span as the journal writes it. Whatever else JSON allows is read by the slow path.
_NUMBER_LINE = re.compile(
    rb'\{"kind":"(metric|span)","key":"([^"\\\x00-\x1f\x7f-\xff]+)","value":'
    rb'(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|"NaN"|"-?Infinity"),"step":(-?\d{1,18}),'
    rb'"time":(\d+(?:\.\d+)?),"attempt":"([^"\\\x00-\x1f\x7f-\xff]*)","seq":(\d{1,18})\}'
)


def segment_path(run: Run, attempt: str, number: int, *, twin: bool = False) -> str:
    """Where segment ``number`` (from 0) of an attempt lies, or its twin."""
    return run.path("journal", attempt, f"{number:06d}{'.twin' if twin else ''}.jsonl")


def read_journal(run: Run, attempt: str) -> Iterator[Record]:
    """The records of one attempt that are in the root, in order of writing.

    A torn last line of the last segment is left out. Any other broken line, or a record that is
    missing between two others, is a ``DamagedError``; but in a store, where the last segment has
    no twin yet, its first upload was damaged on its way and nobody lived to mend it: what stands
    before the damage is read, and nothing behind it was ever promised to be there.
    """
    for lines in read_segments(run, attempt, _record):
        yield from lines


def read_segments(
    run: Run,
    attempt: str,
    parse: Callable[[bytes], Line],
    *,
    skip: Callable[[int], bool] = lambda number: False,
) -> Iterator[Iterator[Line]]:
    """``read_journal`` by segment; lines come one by one, each segment's to be read to its end.

    ``parse`` makes something of a line (``quick`` is the fast one) or raises ``ValueError``.
    Segments whose place in the list ``skip`` is true for are not fetched, nor is the gap that
    they leave looked for. No more than one segment (4 MB) is in memory, and none as objects: a
    million of those would cost as much again to Python's garbage collector.
    """
    last: int | None = 0

    def lines(twins: Sequence[str], newest: bool) -> Iterator[Line]:
        nonlocal last
        for line in _lines(run, twins, last, parse, newest=newest):
            last = line.seq
            yield line

    found = segments(run, attempt)
    for place, twins in enumerate(found):
        if skip(place):
            last = None
        else:
            yield lines(twins, twins is found[-1])


def segment_lines(
    run: Run, twins: Sequence[str], last: int, parse: Callable[[bytes], Line], *, newest: bool
) -> Iterator[Line]:
    """``read_segment`` line by line, as ``read_segments`` gives them."""
    return _lines(run, twins, last, parse, newest=newest)


def read_segment(run: Run, twins: Sequence[str], last: int, *, newest: bool) -> list[Record]:
    """The records of one segment beyond record ``last``; ``read_journal`` says what is damage."""
    return list(_lines(run, twins, last, _record, newest=newest))


def last_record_time(run: Run, attempt: str) -> float | None:
    """When an attempt was last heard of: the time of its last record in the root."""
    for twins in reversed(segments(run, attempt)):
        for line in reversed(copy_of(run, twins)[1].split(b"\n")):
            try:
                return float(json.loads(line)["time"])
            except (ValueError, KeyError, TypeError):
                continue  # the empty end, or a torn line
    return None


def segments(run: Run, attempt: str) -> list[list[str]]:
    """The paths of each segment in order: its own, and its twin's if it has one."""
    paths = run.root.files(run.path("journal", attempt))
    found = sorted((m[1], path) for path in paths if (m := _SEGMENT.search(path)))
    return [[path for _, path in pair] for _, pair in groupby(found, lambda item: item[0])]


def copy_of(run: Run, twins: Sequence[str]) -> tuple[str, bytes]:
    """Path and bytes of the copy of a segment that counts: of two whole ones the longer.

    A twin is deleted once its segment is closed; it is read first, so the segment that is read
    after that it was gone is the closed one.
    """
    own = twins[0]
    copies = []
    for path in twins[:0:-1]:
        with suppress(NotFoundError):
            copies.append((path, run.root.read_bytes(path)))
    data = run.root.read_bytes(own)
    if not copies:
        return own, data
    whole = [copy for copy in ((own, data), *copies) if _is_whole(copy[1])]
    return max(whole or [(own, data)], key=lambda copy: len(copy[1]))


def _is_whole(data: bytes) -> bool:
    """Whether every line is a record, and the last one complete."""
    try:
        for line in data.splitlines():
            _record(line)
    except ValueError:
        return False
    return data.endswith(b"\n")


def _lines(
    run: Run,
    twins: Sequence[str],
    last: int | None,
    parse: Callable[[bytes], Line],
    *,
    newest: bool,
) -> Iterator[Line]:
    """What a segment has beyond record ``last``; ``read_journal`` says which damage is forgiven."""
    path, data = copy_of(run, twins)
    try:
        yield from _parsed(run, path, data, last, parse, newest=newest)
    except DamagedError:
        if not (newest and len(twins) == 1 and not run.root.is_local):
            raise


def read_lines(
    run: Run, path: str, data: bytes, last: int, *, newest: bool
) -> tuple[list[Record], DamagedError | None]:
    """What ``data`` of the segment ``path`` has beyond record ``last``, up to its damage if any.

    ``data`` may begin at any line. Of the ``newest`` segment the end may be torn.
    """
    records: list[Record] = []
    try:
        for record in _parsed(run, path, data, last, _record, newest=newest):
            records.append(record)
    except DamagedError as damage:
        return records, damage
    return records, None


def _parsed(
    run: Run,
    path: str,
    data: bytes,
    last: int | None,
    parse: Callable[[bytes], Line],
    *,
    newest: bool,
) -> Iterator[Line]:
    """Line by line what ``data`` has beyond record ``last`` (None: not known).

    Raises ``DamagedError`` at its damage; of the ``newest`` segment the end may be torn.
    """
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = parse(line)
        except ValueError as error:
            if number == len(lines) and newest:
                return
            raise DamagedError(
                f"{path} in {run.root.url} is damaged at line {number} ({error}); restore the "
                "segment from a backup."
            ) from error
        seq = record.seq
        if last is None:
            last = seq - 1
        if seq > last + 1:
            raise DamagedError(
                f"{path} in {run.root.url} goes on with record {seq} at line {number}, "
                f"but of those before it only {last} are there; restore the attempt's segments "
                "from a backup."
            )
        if seq > last:
            last = seq
            yield record


def quick(line: bytes) -> Point | Record:
    """A line, five times as fast as by a model of pydantic's where it is an ordinary metric.

    A million points a run are nothing unusual. Raises ``ValueError`` for what is no record.
    """
    found = _NUMBER_LINE.fullmatch(line)
    if found is None:
        return _record(line)
    kind, key, value, step, time, attempt, seq = found.groups()
    name = _KEYS.get(key)
    if name is None:
        name = _KEYS.setdefault(key, key.decode())
    if kind == b"metric":
        number = float(value) if value[0] != _QUOTE else _NOT_FINITE[value[1:-1].decode()]
        return Point(name, number, int(step), float(time), int(seq))
    told = float(value) if value[0] != _QUOTE else value[1:-1].decode()
    return Record("span", name, told, int(step), float(time), attempt.decode(), int(seq))


_QUOTE = ord('"')
_KEYS: dict[bytes, str] = {}


def _record(line: bytes) -> Record:
    """One line, checked: a ``ValueError`` says in one clause what is wrong with it."""
    try:
        # Of bytes, json would first guess the encoding, line by line.
        record = _RECORD.validate_python(json.loads(line.decode("utf-8", "surrogatepass")))
    except ValidationError as error:
        raise ValueError(what_is_wrong(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if record.kind in ("metric", "span"):
        try:
            float(record.number)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"value: {record.value!r:.40} is not a number") from error
    return record
