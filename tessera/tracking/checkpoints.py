"""What saving has cost a run so far: how many checkpoints, how much waiting, how many bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tessera.tracking.history import RunHistory
from tessera.tracking.records import Record

STALL, PUBLISHED, FAILED = "checkpoint/stall_s", "checkpoint/published", "checkpoint/failed"


@dataclass(frozen=True)
class CheckpointSummary:
    """Checkpoints of all attempts, the lost ones too.

    ``stall_s`` are the seconds that training stood still for saves, local ones included;
    ``stall_share`` is their share of the seconds spent training, None if there were none. ``bytes``
    went to the root over the network for ``usd`` dollars of traffic.
    """

    published: int
    bytes: int
    stall_s: float
    stall_share: float | None
    usd: float


def summarise_checkpoints(history: RunHistory) -> CheckpointSummary:
    """Count what the attempts of a run saved and what that cost."""
    whole: dict[tuple[str, int], bool] = {}
    stall = trained = 0.0
    for item in history.attempts:
        for record in item.records:
            if record.kind == "event" and record.key in (PUBLISHED, FAILED):
                # "published" is written before the last write of all, which may still fail.
                whole[item.attempt.id, record.step] = record.key == PUBLISHED
            elif record.kind == "metric" and record.key == STALL:
                stall += _seconds(record)
            elif record.kind == "span" and record.key == "train":
                trained += _seconds(record)
    return CheckpointSummary(
        published=sum(whole.values()),
        bytes=sum(item.traffic_bytes for item in history.attempts),
        stall_s=stall,
        stall_share=stall / trained if trained > 0 else None,
        usd=sum((item.upload_usd for item in history.attempts), 0.0),
    )


def _seconds(record: Record) -> float:
    return record.number if math.isfinite(record.number) else 0.0
