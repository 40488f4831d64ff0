"""Curves of a run's surviving lineage, and what two or more runs do not have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tessera.ledger.meter import Bill
from tessera.runs import RunRecord
from tessera.tracking.history import AttemptHistory, RunHistory
from tessera.tracking.records import Record, read_journal
from tessera.tracking.spending import spent_at

Axis = Literal["step", "tokens", "hours", "usd"]
TOKENS = "progress/tokens"


@dataclass(frozen=True)
class Point:
    """A metric's value at a step; ``time`` in seconds since the epoch."""

    step: int
    value: float
    time: float


def read_curves(history: RunHistory, keys: Collection[str]) -> dict[str, list[Point]]:
    """The lineage's points of these metrics by key, one a step, from the journals in the root.

    Read record by record, so that only what is asked for is held. Raises ``DamagedError``.
    """
    found: dict[str, dict[int, Point]] = {key: {} for key in keys}
    for number, segment in enumerate(history.lineage):
        after = -1 if number == 0 else segment.after
        for record in read_journal(history.run, segment.attempt):
            if record.kind == "metric" and record.key in found:
                counts = after < record.step <= segment.upto
                if counts and record.step not in found[record.key]:
                    found[record.key][record.step] = _point(record)
    return {key: [points[step] for step in sorted(points)] for key, points in found.items()}


def _point(record: Record) -> Point:
    return Point(record.step, record.number, record.time)


def along(
    points: Sequence[Point],
    axis: Axis,
    *,
    tokens: Sequence[Point] = (),
    own: Sequence[tuple[AttemptHistory, Bill]] = (),
) -> tuple[list[float], list[float]]:
    """x and y of the finite points: steps, tokens, billed hours or US dollars until then.

    ``tokens`` is the run's curve of ``progress/tokens``, ``own`` are ``bills_of`` the run; points
    whose x is not known are left out.
    """
    by_step = {point.step: point.value for point in tokens}
    per_step = max((p.value / p.step for p in tokens if p.step), default=None)
    xs, ys = [], []
    for point in points:
        if axis == "step":
            x: float | None = point.step
        elif axis == "tokens":
            x = by_step.get(point.step, None if per_step is None else point.step * per_step)
        elif axis == "hours":
            x = _hours(own, point.time)
        else:
            x = spent_at(own, point.time)
        if x is not None and math.isfinite(point.value):
            xs.append(float(x))
            ys.append(point.value)
    return xs, ys


def _hours(own: Sequence[tuple[AttemptHistory, Bill]], at: float) -> float:
    intervals = [interval for _, bill in own for interval in bill.intervals]
    return sum(max(0.0, min(end, at) - start) for start, end in intervals) / 3600


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same in all: one text a run, None where it has none of it."""

    group: str
    key: str
    values: tuple[str | None, ...]


def differences(histories: Sequence[RunHistory]) -> list[Difference]:
    """What the runs do not have in common: config, data, code and machines, in that order."""
    told = [_told(history) for history in histories]
    keys = list(dict.fromkeys(key for each in told for key in each))
    found = []
    for group, key in keys:
        values = tuple(each.get((group, key)) for each in told)
        if len(set(values)) > 1:
            found.append(Difference(group, key, values))
    order = ("config", "data", "code", "machine")
    return sorted(found, key=lambda difference: order.index(difference.group))


def _told(history: RunHistory) -> dict[tuple[str, str], str]:
    record = history.run.record
    found = {("config", key): text for key, text in _flat(record.experiment) if key != "name"}
    found |= {("data", key): text for key, text in _data(record)}
    if record.commit:
        found["code", "commit"] = record.commit
    if history.attempts:
        last = history.attempts[-1].attempt
        found["machine", "device"] = f"{last.devices} x {last.device}"
        found["machine", "provider"] = last.provider
        if last.usd_per_hour is not None:
            found["machine", "$/hour"] = f"{last.usd_per_hour:g}"
    return found


def _data(record: RunRecord) -> Iterator[tuple[str, str]]:
    yield "fingerprint", record.fingerprint
    yield from _flat(record.data)
    for key, text in (record.base or {}).items():
        yield f"base.{key}", text


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{key}", text
