"""Which interviewed adapter is best: from the stored interviews and the journals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tessera.evaluation.interview import stored_interview, stored_interviews
from tessera.runs import Run
from tessera.tracking.records import read_journal


def rank_interviews(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """One row an interviewed adapter, best first; rows are JSON values.

    Only interviews of an adapter's present weights count.
    """
    rows = []
    for run in runs:
        losses = heldout_losses(run)
        for result in stored_interviews(run):
            if stored_interview(run, result.suite_digest, result.adapter) is None:
                continue
            rows.append(
                {
                    "run_id": run.id,
                    "adapter": result.adapter,
                    "fatal": len(result.fatal),
                    "unanswered_safety": result.unanswered_safety,
                    "score": result.score,
                    "heldout_loss": losses.get(result.adapter),
                    "suite_digest": result.suite_digest,
                }
            )
    return sorted(rows, key=_quality)


def _quality(row: dict[str, Any]) -> tuple[Any, ...]:
    loss = row["heldout_loss"]
    return (
        row["fatal"],
        len(row["unanswered_safety"]),
        -row["score"],
        math.inf if loss is None else loss,
        row["run_id"],
        row["adapter"],
    )


def heldout_losses(run: Run) -> dict[str, float]:
    """Loss on the held-out conversations of each adapter, by its name, from the journal."""
    losses: dict[str, float] = {}
    by_step: dict[int, float] = {}
    for segment in run.lineage():
        for record in read_journal(run, segment.attempt):
            if not (segment.after < record.step <= segment.upto):
                continue
            if record.kind == "metric" and record.key == "eval/loss":
                by_step[record.step] = record.number
            elif record.key == "adapter/saved" and record.step in by_step:
                name = record.value.get("name") if isinstance(record.value, dict) else None
                losses[str(name)] = by_step[record.step]
    return losses
