"""What charts are made of: tables, axes, and the rows that stand for a curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tessera.tracking.report.content import Curve, Point
from tessera.tracking.report.words import count, dollars, hours, tick

ROWS = 40
"""Rows of one curve in a chart's table, at most."""


@dataclass(frozen=True)
class Table:
    """Cells of a table; ``numeric`` columns are set to the right, ``whole`` ones never broken."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A drawing, its sentence and its table.

    ``sentence`` says what the drawing shows to those who do not see it, ``caption`` stands below
    it: the figures that matter most, and what a reader should know of it.
    """

    id: str
    title: str
    unit: str
    sentence: str
    caption: str
    drawing: str
    table: Table


@dataclass(frozen=True)
class Axis:
    """What the points are drawn against; ``unit`` is one mark of ``label`` in units of ``of``."""

    id: str
    label: str
    of: Callable[[Point], float | None]
    tick: Callable[[float], str]
    words: Callable[[float], str]
    unit: float = 1.0


TOKENS = Axis("tokens", "tokens", lambda p: p.tokens, tick, lambda v: f"{count(v)} tokens")
HOURS = Axis("hours", "billed hours", lambda p: p.hours, tick, hours)
MINUTES = Axis("hours", "billed minutes", lambda p: p.hours, tick, hours, 1 / 60)
DOLLARS = Axis("dollars", "US dollars", lambda p: p.usd, lambda v: f"${tick(v)}", dollars)


def time_axis(curves: Mapping[str, Curve]) -> Axis:
    """Hours; minutes for a run of less than one and a half."""
    last = max((p.hours for c in curves.values() for p in c.points), default=0.0)
    return HOURS if last >= 1.5 else MINUTES


def sample(curve: Curve, most: int = ROWS) -> Sequence[Point]:
    """Points for a table: evenly spread, with the first, the last, the lowest and what is odd."""
    points = curve.points
    if len(points) <= most:
        return points
    step = (len(points) - 1) / (most - 6)
    kept = {round(index * step) for index in range(most - 5)}
    kept |= {index for index, point in enumerate(points) if point is curve.lowest}
    kept |= set([index for index, point in enumerate(points) if not point.finite][:3])
    return [points[index] for index in sorted(kept)]
