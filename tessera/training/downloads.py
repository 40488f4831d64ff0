"""Traffic the other way: what an attempt fetches from a root that is not a folder."""

from __future__ import annotations

from tessera.ledger.traffic import DOWN_BYTES
from tessera.training.cost import RunningCost
from tessera.training.workplace import Session


def count_downloads(session: Session, cost: RunningCost | None, step: int) -> None:
    """Record what all ranks fetched since the last call; every rank has to call it.

    Shards, checkpoints and the base of a fine-tuning, and records on the way.
    """
    received = sum(session.world.gather(session.root.take_received()))
    if received:
        session.journal.metric(DOWN_BYTES, received, step)
        if cost is not None:
            cost.add_download(received)
