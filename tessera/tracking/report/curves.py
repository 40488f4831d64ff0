"""From the records of a run to curves that can be drawn: each point with what it had cost by then.

The rule of thinning: a curve of more than ``MOST`` points is cut into stretches of equally many;
of each the lowest, the highest and the first that is no number stay, and so do the first and the
last of all. So no spike is lost, and none is made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tessera.tracking.report.content import Curve, Point
from tessera.tracking.report.reading import Track
from tessera.tracking.report.spend import Floats, Spending

MOST = 1000
"""Points of one curve on the page, at most."""

TRAIN, EVAL, BITS = "train/loss", "eval/loss", "eval/bits_per_byte"
SPEED, MFU, TOKENS = "train/tokens_per_s", "train/mfu", "progress/tokens"
BEYOND = "train/loss beyond the last checkpoint"
DRAWN = (TRAIN, EVAL, BITS, SPEED, MFU)


def curves_of(
    tracks: Mapping[str, Track], beyond: Mapping[str, Track], spending: Spending
) -> dict[str, Curve]:
    """The curves of the page, for those metrics that have points.

    ``BEYOND`` is the training loss above the lineage.
    """
    progress = _progress(tracks[TOKENS], beyond[TOKENS])
    named = {key: tracks[key] for key in DRAWN} | {BEYOND: beyond[TRAIN]}
    return {
        key: _curve(key, track, spending, progress) for key, track in named.items() if track.steps
    }


def _progress(*tracks: Track) -> tuple[Floats, Floats] | None:
    """Steps and the tokens seen until then; None where nothing was counted."""
    columns = [track.sorted() for track in tracks]
    steps = np.concatenate([steps for steps, _, _ in columns])
    tokens = np.concatenate([tokens for _, _, tokens in columns])
    known = np.isfinite(tokens)
    if not known.any():
        return None
    return np.append(0.0, steps[known]), np.append(0.0, tokens[known])


def _curve(
    key: str, track: Track, spending: Spending, progress: tuple[Floats, Floats] | None
) -> Curve:
    all_steps, all_times, all_values = track.sorted()
    kept = thin(all_values)
    steps, times, values = all_steps[kept], all_times[kept], all_values[kept]
    # Machines' clocks differ a little; what a run has cost never falls.
    moments = np.maximum.accumulate(times)
    hours, usd = spending.hours(moments), spending.usd(moments)
    tokens = np.full(len(kept), np.nan) if progress is None else np.interp(steps, *progress)
    columns = zip(steps, times, tokens, hours, usd, values, strict=True)
    found = tuple(
        Point(int(step), float(at), _known(t), float(h), _known(d), float(value))
        for step, at, t, h, d, value in columns
    )
    return Curve(key, found, len(all_values), int(np.count_nonzero(~np.isfinite(all_values))))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


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
