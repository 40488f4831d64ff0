"""``sync``: replay the runs of a root into MLflow, as often as one likes.

MLflow is a view; the root is the record. A synced MLflow is the one that a rebuilt one would be,
so:

* Only points of the surviving lineage that a published checkpoint covers are sent (all, once the
  run is complete); what is newer shows in the tag ``tessera.live``.
* Every run carries the tag ``tessera.run_id`` and is looked up by it before it is created, since a
  late answer to ``create_run`` would otherwise make two.
* The tag ``tessera.synced`` says how far the points reach, with a digest of the lineage and of the
  final figures they came from; it is written as an intention before they are sent and for good
  after. The next sync sends what lies beyond; the mark's own step is sent again, and MLflow ignores
  points that it has. Points cannot be taken back, so if another attempt overtook the lineage, or a
  figure that was final changed, the MLflow run is deleted and made again.

What changes between attempts (GPU, price, status) goes into tags, since MLflow refuses to change a
param.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tessera.runs import Segment
from tessera.storage import Root, canonical_json, sha256_bytes
from tessera.tracking.history import RunHistory, read_histories
from tessera.tracking.interviews import INTERVIEW
from tessera.tracking.pages import Shown, present
from tessera.tracking.queries import RunSummary, summarise_history
from tessera.tracking.server import Server, connect, quiet, sentences
from tessera.tracking.view import (
    OURS,
    RUN_ID,
    SYNCED,
    dataset_input,
    finals,
    foreign_tags,
    params,
    tags,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

BATCH = 1000  # MLflow's own limits for log_batch: metrics, then params and tags
BATCH_TEXTS = 100

_STATUS = {
    "finished": "FINISHED", "budget": "FINISHED", "running": "RUNNING",
    "failed": "FAILED", "diverged": "FAILED", "died": "KILLED", "preempted": "KILLED",
}  # fmt: skip

Progress = Callable[[int, int, str], None]
"""Called with (runs done, runs in all, run id) before each run."""


@dataclass(frozen=True)
class RunSync:
    """What one sync did for one run; ``points`` counts the metric points that were new."""

    run_id: str
    mlflow_run_id: str
    created: bool
    rebuilt: bool
    points: int


@dataclass(frozen=True)
class SyncReport:
    """What a sync did; ``seconds`` of wall-clock time.

    ``damaged`` are sentences about the runs of the root that could not be read and were left out,
    ``remarks`` what else a person should know.
    """

    tracking_uri: str
    experiment: str
    runs: tuple[RunSync, ...]
    seconds: float
    damaged: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        """New metric points of all runs."""
        return sum(run.points for run in self.runs)

    @property
    def created(self) -> int:
        """Runs that MLflow did not have."""
        return sum(run.created for run in self.runs)


def sync(
    root: Root,
    tracking_uri: str | None = None,
    progress: Progress | None = None,
    *,
    only: Collection[str] | None = None,
) -> SyncReport:
    """Bring MLflow up to what the root says; a second call adds nothing.

    ``only`` names run ids (the bases of fine-tunings among them come along). ``tracking_uri``: see
    ``tessera.tracking.server.default_uri``. Raises ``StoreError`` for a server that does not
    answer, within seconds; what arrived stays and the next call continues. A damaged run is left
    out and told in the report; one that ``only`` needs is an error.
    """
    started = time.monotonic()
    read = read_histories(root)
    bases = {history.run.id: history.run.record.base for history in read.whole}
    chosen = bases.keys() if only is None else {*only, *(_base_id(bases.get(i)) for i in only)}
    for name, error in read.damaged.items():
        if only is not None and name in chosen:
            raise error
    wanted = [history for history in read.whole if history.run.id in chosen]
    server = connect(root, tracking_uri)
    synced: dict[str, RunSync] = {}
    shown: list[Shown] = []
    with quiet(), sentences(server.uri):
        known = known_runs(server)
        for number, history in enumerate(sorted(wanted, key=_bases_first)):
            if progress is not None:
                progress(number, len(wanted), history.run.id)
            summary = summarise_history(history, read.bills)
            parent = synced.get(summary.base or "")
            parent_id = parent.mlflow_run_id if parent else None
            replayed = _Replayed(server, history, summary, parent_id)
            synced[history.run.id] = replayed.sync(known)
            shown.append(Shown(history.run.record, summary, replayed.interview))
        remarks = present(server, shown if only is None else None)
    runs = tuple(synced.values())
    damaged = () if only is not None else tuple(str(error) for error in read.damaged.values())
    return SyncReport(
        server.shown, server.experiment, runs, time.monotonic() - started, damaged, remarks
    )


def _base_id(base: dict[str, str] | None) -> str | None:
    return (base or {}).get("run_id")


def _bases_first(history: RunHistory) -> tuple[bool, float]:
    return history.run.record.base is not None, history.run.record.created_at


def known_runs(server: Server) -> dict[str, list[MlflowRun]]:
    """The MLflow runs of the experiment by our run id; call inside ``sentences``."""
    found: dict[str, list[MlflowRun]] = {}
    token = None
    while True:
        page = server.client.search_runs([server.experiment_id], max_results=1000, page_token=token)
        for run in page:
            if run_id := run.data.tags.get(RUN_ID):
                found.setdefault(run_id, []).append(run)
        token = page.token
        if not token:
            return found


class _Replayed:
    """One run on its way into MLflow."""

    def __init__(
        self, server: Server, history: RunHistory, summary: RunSummary, parent: str | None
    ) -> None:
        self._server, self._client = server, server.client
        self._history, self._summary = history, summary
        self._tags = tags(history, summary)
        if parent is not None:
            self._tags["mlflow.parentRunId"] = parent
        self._finals = finals(summary)
        self.interview = self._tags.get(INTERVIEW)

    def sync(self, known: dict[str, list[MlflowRun]]) -> RunSync:
        found = known.get(self._history.run.id, [])
        # Two syncs at once may both have created it: the one that got furthest stays.
        found = sorted(found, key=lambda run: (SYNCED not in run.data.tags, run.info.run_id))
        for spare in found[1:]:
            self._client.delete_run(spare.info.run_id)
        run = found[0] if found else None
        state = _state(run)
        kept: dict[str, str] = {}
        rebuilt = run is not None and bool(state) and not self._continues(state)
        if rebuilt and run is not None:
            kept = foreign_tags(run.data.tags)
            self._client.delete_run(run.info.run_id)
            run, state = None, {}
        created = run is None
        if run is None:
            run = self._create(kept)
        run_id = run.info.run_id
        self._log_texts(run, created)
        points = self._log_points(run_id, state)
        self._finish(run)
        return RunSync(self._history.run.id, run_id, created and not rebuilt, rebuilt, points)

    # -- the mark and the writing ------------------------------------------------------------------

    def _mark(self) -> dict[str, Any]:
        upto = self._history.upto
        return {
            "step": upto,
            "lineage": None if upto is None else _lineage_digest(self._history.lineage, upto),
            "points": len(self._history.points),
            "final": sha256_bytes(repr(self._finals).encode()) if self._finals else None,
        }

    def _continues(self, state: dict[str, Any]) -> bool:
        """Whether what MLflow has is a beginning of what it should have."""
        step, now = state.get("step"), self._mark()
        if "sending" in state and not self._continues(state["sending"]):
            return False  # the last sync died on points that no longer count
        if state.get("final") not in (None, now["final"]):
            return False
        if step is None:
            return True
        if now["step"] is None or now["step"] < step:
            return False
        return bool(state.get("lineage") == _lineage_digest(self._history.lineage, step))

    def _create(self, kept: dict[str, str]) -> MlflowRun:
        name = self._history.run.id
        return self._client.create_run(
            self._server.experiment_id,
            start_time=_ms(self._summary.started_at),
            tags={**kept, RUN_ID: name},
            run_name=name,
        )

    def _log_texts(self, run: MlflowRun, created: bool) -> None:
        from mlflow.entities import Param, RunTag

        has = run.data.params
        new_params = [
            Param(key, value)
            for key, value in params(self._history.run.record).items()
            if key not in has
        ]
        new_tags = [
            RunTag(key, value)
            for key, value in self._tags.items()
            if run.data.tags.get(key) != value
        ]
        run_id = run.info.run_id
        for start in range(0, max(len(new_params), len(new_tags)), BATCH_TEXTS):
            part = slice(start, start + BATCH_TEXTS)
            self._client.log_batch(run_id, params=new_params[part], tags=new_tags[part])
        for key in run.data.tags:
            if key.startswith(OURS) and key not in self._tags and key not in (RUN_ID, SYNCED):
                self._client.delete_tag(run_id, key)
        if created and (dataset := dataset_input(self._history)) is not None:
            self._client.log_inputs(run_id, [dataset])

    def _log_points(self, run_id: str, state: dict[str, Any]) -> int:
        mark, done = self._mark(), state.get("step")
        if state == mark:
            return 0
        self._client.set_tag(run_id, SYNCED, json.dumps({**state, "sending": mark}))
        batch: list[Metric] = []
        for metric in self._unsent(done, final=state.get("final") is None):
            batch.append(metric)
            if len(batch) == BATCH:
                self._client.log_batch(run_id, metrics=batch)
                batch = []
        if batch:
            self._client.log_batch(run_id, metrics=batch)
        self._client.set_tag(run_id, SYNCED, json.dumps(mark))
        return int(mark["points"]) - int(state.get("points", 0))

    def _unsent(self, done: int | None, *, final: bool) -> Iterator[Metric]:
        from mlflow.entities import Metric

        for point in self._history.points:
            # The mark's own step again: an evaluation may follow the checkpoint of its step.
            if done is None or point.step >= done:
                yield Metric(point.key, point.number, _ms(point.time), point.step)
        if final and self._summary.ended_at is not None:
            at = _ms(self._summary.ended_at)
            for key, value in self._finals.items():
                yield Metric(key, value, at, self._summary.step or 0)

    def _finish(self, run: MlflowRun) -> None:
        status, info = _STATUS[self._summary.status], run.info
        if self._summary.ended_at is None:
            if info.status != status:
                self._client.update_run(info.run_id, status=status)
            return
        ended = _ms(self._summary.ended_at)
        if (info.status, info.end_time) != (status, ended):
            self._client.set_terminated(info.run_id, status=status, end_time=ended)


def _state(run: MlflowRun | None) -> dict[str, Any]:
    """The mark that the last sync left; empty if there is none that can be read."""
    try:
        state = json.loads(run.data.tags.get(SYNCED, "{}")) if run is not None else {}
    except ValueError:
        state = {}
    return state if isinstance(state, dict) else {}


def _lineage_digest(lineage: tuple[Segment, ...], step: int) -> str:
    """Which attempts the points up to ``step`` came from; long lineages do not fit a tag."""
    parts = [
        [segment.attempt, segment.after, min(segment.upto, step)]
        for number, segment in enumerate(lineage)
        if number == 0 or segment.after < step
    ]
    return sha256_bytes(canonical_json(parts))[:16]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
