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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from tessera.errors import DamagedError
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


_RECORD = TypeAdapter(Record)


def segment_path(run: Run, attempt: str, number: int, *, twin: bool = False) -> str:
    """Where segment ``number`` (from 0) of an attempt lies, or its twin."""
    return run.path("journal", attempt, f"{number:06d}{'.twin' if twin else ''}.jsonl")


def read_journal(run: Run, attempt: str) -> Iterator[Record]:
    """The records of one attempt that are in the root, in order of writing.

    A torn last line of the last segment is left out, and so is what comes behind damage in one of
    two twins. Any other broken line, or a record that is missing between two others, is a
    ``DamagedError``.
    """
    last = 0
    segments = _segments(run, attempt)
    for twins in segments:
        read = [_read(run, path, last, newest=twins is segments[-1]) for path in twins]
        damage = [found.damage for found in read if found.damage is not None]
        if len(damage) == len(read):
            raise damage[0]
        records = max((found.records for found in read), key=len)
        yield from records
        last = records[-1].seq if records else last


def last_record_time(run: Run, attempt: str) -> float | None:
    """When an attempt was last heard of: the time of its last record in the root."""
    for twins in reversed(_segments(run, attempt)):
        times = [time for path in twins if (time := _last_time(run, path)) is not None]
        if times:
            return max(times)
    return None


def _segments(run: Run, attempt: str) -> list[list[str]]:
    """The paths of each segment in order: one, or it and its twin."""
    found = [(m[1], path) for path in run.root.files(run.path("journal", attempt))
             if (m := _SEGMENT.search(path))]  # fmt: skip
    return [
        [path for _, path in group] for _, group in groupby(sorted(found), lambda pair: pair[0])
    ]


@dataclass(frozen=True)
class _Read:
    """The records of a segment that were not read yet, up to its damage if there is any."""

    records: list[Record]
    damage: DamagedError | None


def _read(run: Run, path: str, last: int, *, newest: bool) -> _Read:
    """What ``path`` has beyond record ``last``; of the ``newest`` segment the end may be torn."""
    records: list[Record] = []
    lines = run.root.read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = _record(line)
        except ValueError as error:
            if number == len(lines) and newest:
                break
            damage = DamagedError(
                f"{path} in {run.root.url} is damaged at line {number} ({error}); restore the "
                "segment from a backup."
            )
            damage.__cause__ = error
            return _Read(records, damage)
        if record.seq > last + 1:
            damage = DamagedError(
                f"{path} in {run.root.url} goes on with record {record.seq} at line {number}, "
                f"but of those before it only {last} are there; restore the attempt's segments "
                "from a backup."
            )
            return _Read(records, damage)
        if record.seq > last:
            last = record.seq
            records.append(record)
    return _Read(records, None)


def _record(line: bytes) -> Record:
    """One line, checked: a ``ValueError`` says in one clause what is wrong with it."""
    try:
        record = _RECORD.validate_python(json.loads(line))
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


def _last_time(run: Run, path: str) -> float | None:
    for line in reversed(run.root.read_bytes(path).split(b"\n")):
        try:
            return float(json.loads(line)["time"])
        except (ValueError, KeyError, TypeError):
            continue  # the empty end, or a torn line
    return None
