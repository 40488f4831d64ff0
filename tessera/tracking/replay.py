"""``sync``: replay the runs of a root into MLflow, as often as one likes.

MLflow is a view; the root is the record. A synced MLflow is the one that a rebuilt one would be:

* Only points of the surviving lineage that a published checkpoint covers are sent (all, once the
  run is complete); what is newer shows in the tag ``tessera.live``.
* Every run carries the tag ``tessera.run_id`` and is looked up by it (``tracking/known.py``).
* How far its points reach is a tag of its own (``tracking/sending.py``).
* What people wrote on it in MLflow becomes records first (``tracking/merge.py``).

What changes between attempts (GPU, price, status) goes into tags, since MLflow refuses to change a
param. MLflow is reached through its client alone, never through its tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tessera.storage import Root
from tessera.tracking.known import known_runs, restored_runs
from tessera.tracking.lineage import Reading
from tessera.tracking.merge import Annotations
from tessera.tracking.pages import Shown, present
from tessera.tracking.queries import RunSummary, summarise_history
from tessera.tracking.readings import Reader
from tessera.tracking.sending import RunSync, Sending
from tessera.tracking.server import connect, quiet, rarely_collected, sentences

__all__ = ["Progress", "RunSync", "SyncReport", "known_runs", "sync"]

Progress = Callable[[int, int, str], None]
"""Called with (runs done, runs in all, run id) before each run."""


@dataclass(frozen=True)
class SyncReport:
    """What a sync did; ``seconds`` of wall-clock time.

    ``damaged`` are sentences about what could not be read of the root and was left out, and
    ``statuses`` says of each run that was looked at how it stands,
    ``remarks`` what else a person should know.
    """

    tracking_uri: str
    experiment: str
    runs: tuple[RunSync, ...]
    seconds: float
    damaged: tuple[str, ...] = ()
    statuses: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        """New metric points of all runs."""
        return sum(run.points for run in self.runs)

    @property
    def created(self) -> int:
        """Runs that MLflow did not have."""
        return sum(run.created for run in self.runs)

    @property
    def imported(self) -> int:
        """Edits made in MLflow that became records of the root."""
        return sum(run.imported for run in self.runs)

    @property
    def not_rebuilt(self) -> tuple[str, ...]:
        """Sentences about what is in MLflow alone, or lost against a record."""
        return tuple(sentence for run in self.runs for sentence in run.told)


def sync(
    root: Root,
    tracking_uri: str | None = None,
    progress: Progress | None = None,
    *,
    only: Collection[str] | None = None,
    annotations: Annotations | None = None,
    reader: Reader | None = None,
) -> SyncReport:
    """Bring MLflow up to what the root says; a second call adds nothing.

    ``only`` names run ids (the bases of fine-tunings among them come along). ``tracking_uri``: see
    ``tessera.tracking.server.default_uri``. ``annotations`` and ``reader`` of an earlier call
    spare reading the same again. Raises ``StoreError`` for a server that does not answer, within
    seconds; what arrived stays and the next call continues. A damaged run is left out and told in
    the report; one that ``only`` needs is an error.
    """
    with rarely_collected():
        return _sync(root, tracking_uri, progress, only, annotations, reader)


def _sync(
    root: Root,
    tracking_uri: str | None,
    progress: Progress | None,
    only: Collection[str] | None,
    annotations: Annotations | None,
    reader: Reader | None,
) -> SyncReport:
    started = time.monotonic()
    read = (reader or Reader(root)).read(only)
    server = connect(root, tracking_uri)
    annotations = Annotations(root) if annotations is None else annotations
    synced: dict[str, RunSync] = {}
    summaries: dict[str, RunSummary] = {}
    shown: list[Shown] = []
    with quiet(), sentences(server.uri):
        known, restored = known_runs(server), restored_runs(server)
        annotations.read()  # after MLflow: what is newer in the root must not look like an edit
        for number, reading in enumerate(sorted(read.wanted, key=_bases_first)):
            run_id = reading.history.run.id
            if progress is not None:
                progress(number, len(read.wanted), run_id)
            summary = summarise_history(reading.history, read.histories.bills)
            parent = synced.get(summary.base or "")
            parent_id = parent.mlflow_run_id if parent else None
            sending = Sending(server, reading, summary, parent_id, annotations.of(run_id))
            synced[run_id] = sending.sync(known.get(run_id, []), restored)
            summaries[run_id] = summary
            shown.append(Shown(reading.history.run.record, summary, sending.interview))
        remarks = present(server, shown if only is None else None)
    damaged = [] if only is not None else [str(e) for e in read.histories.damaged.values()]
    damaged += [text for name, text in annotations.damaged.items() if name in synced]
    return SyncReport(
        server.shown,
        server.experiment,
        tuple(synced.values()),
        time.monotonic() - started,
        tuple(damaged),
        tuple((name, summary.status) for name, summary in summaries.items()),
        remarks,
    )


def _bases_first(reading: Reading) -> tuple[bool, float]:
    record = reading.history.run.record
    return record.base is not None, record.created_at
