"""From the records of a run to curves that can be drawn: each point with what it had cost by then.

The rule of thinning: a curve of more than ``MOST`` points is cut into stretches of equally many;
of each the lowest, the highest and the first that is no number stay, and so do the first and the
last of all. So no spike is lost, and none is made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tessera.tracking.records import Record
from tessera.tracking.report.content import Curve, Point
from tessera.tracking.report.spend import Floats, Spending

MOST = 1000
"""Points of one curve on the page, at most."""

TRAIN, EVAL, BITS = "train/loss", "eval/loss", "eval/bits_per_byte"
SPEED, MFU, TOKENS = "train/tokens_per_s", "train/mfu", "progress/tokens"
DRAWN = (TRAIN, EVAL, BITS, SPEED, MFU)


def curves_of(points: Sequence[Record], spending: Spending) -> dict[str, Curve]:
    """The curves of the page, for those metrics that have points."""
    by_key: dict[str, list[Record]] = {key: [] for key in (*DRAWN, TOKENS)}
    for point in points:
        if point.key in by_key:
            by_key[point.key].append(point)
    for found in by_key.values():
        found.sort(key=lambda record: record.step)
    progress = [record for record in by_key[TOKENS] if record.number - record.number == 0]
    steps = np.asarray([0, *(record.step for record in progress)], dtype=float)
    tokens = np.asarray([0.0, *(record.number for record in progress)])
    known = (steps, tokens) if progress else None
    return {key: _curve(key, by_key[key], spending, known) for key in DRAWN if by_key[key]}


def _curve(
    key: str, records: Sequence[Record], spending: Spending, progress: tuple[Floats, Floats] | None
) -> Curve:
    values = np.asarray([record.number for record in records])
    kept = [records[index] for index in thin(values)]
    steps = np.asarray([record.step for record in kept], dtype=float)
    # Machines' clocks differ a little; what a run has cost never falls.
    moments = np.maximum.accumulate(np.asarray([record.time for record in kept]))
    hours, usd = spending.hours(moments), spending.usd(moments)
    tokens = np.interp(steps, *progress) if progress else None
    found = tuple(
        Point(
            step=record.step,
            at=record.time,
            tokens=None if tokens is None else float(tokens[index]),
            hours=float(hours[index]),
            usd=None if usd is None else float(usd[index]),
            value=record.number,
        )
        for index, record in enumerate(kept)
    )
    return Curve(key, found, len(records), int(np.count_nonzero(~np.isfinite(values))))


def thin(values: Floats, most: int = MOST) -> list[int]:
    """Indices of the values that stay, by the rule above; at most ``most``, which is 5 or more."""
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = (most - 2) // 3
    edges = np.linspace(0, count, stretches + 1).astype(int)
    kept = {0, count - 1}
    for start, end in pairwise(edges):
        kept.update(start + index for index in _of_stretch(values[start:end]))
    return sorted(int(index) for index in kept)


def _of_stretch(values: Floats) -> list[int]:
    finite: npt.NDArray[np.bool_] = np.isfinite(values)
    found = []
    if finite.any():
        found.append(int(np.argmin(np.where(finite, values, np.inf))))
        found.append(int(np.argmax(np.where(finite, values, -np.inf))))
    if not finite.all():
        found.append(int(np.argmin(finite)))
    return found
