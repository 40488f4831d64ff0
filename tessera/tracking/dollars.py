"""Dollars at the evaluations: the metric that MLflow draws losses against.

MLflow pairs two metrics by their steps and keeps at most some hundred points of each, so a chart
of loss against dollars needs dollars at exactly the steps of the evaluations. The trainer journals
``cost/usd`` at its log points; each evaluation gets the last figure at or before its step. That is
a point that never changes once it was sent: it depends on earlier records of the lineage alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from tessera.tracking.records import Record

SO_FAR = "cost/usd_so_far"
"""US dollars of the run, all its attempts, when it reached an evaluation."""


def with_dollars(points: Sequence[Record]) -> list[Record]:
    """``points`` with ``SO_FAR`` beside each evaluation; none before dollars were first told."""
    costs = sorted((p for p in points if p.key == "cost/usd"), key=lambda p: p.step)
    steps = [cost.step for cost in costs]
    found = []
    for point in points:
        found.append(point)
        if point.key == "eval/loss" and (place := bisect_right(steps, point.step)):
            found.append(replace(point, key=SO_FAR, value=costs[place - 1].value))
    return found
