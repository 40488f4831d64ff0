"""What MLflow's page of the experiment shows beside its runs: saved views and a note."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.tracking.conclusions import Shown, write_note
from tessera.tracking.saved_views import provision
from tessera.tracking.server import Server

__all__ = ["Shown", "present"]


def present(server: Server, whole: Sequence[Shown] | None) -> tuple[str, ...]:
    """Bring views and note up to date; returns what a person should know, in sentences.

    ``whole`` are all runs of the root; None leaves the note as it is. Call inside ``sentences``.
    """
    without = provision(server)
    remarks = [without]
    if whole is not None:
        remarks.append(write_note(server, whole, views=without is None))
    return tuple(remark for remark in remarks if remark is not None)
