"""One run on its way into MLflow: texts, points, annotations, status; each step can be repeated.

The tag ``tessera.synced`` says how far the points reach, with a digest of the lineage and of the
final figures they came from; it is written as an intention before they are sent and for good after.
The next sync sends what lies beyond; the mark's own step is sent again, and MLflow ignores points
that it has. Points cannot be taken back, so if another attempt overtook the lineage, or a figure
that was final changed, the MLflow run is replaced by a new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tessera.runs import Segment
from tessera.storage import canonical_json, sha256_bytes
from tessera.tracking.annotations import Annotation
from tessera.tracking.interviews import INTERVIEW
from tessera.tracking.known import (
    is_deleted,
    known_runs,
    note_restored,
    replace_run,
    restored_runs,
)
from tessera.tracking.lineage import Reading, points_from
from tessera.tracking.merge import (
    BASE,
    Merged,
    Shown,
    base_after,
    base_of,
    base_text,
    merge,
    note_and_tags,
    renamed,
)
from tessera.tracking.queries import RunSummary
from tessera.tracking.server import Server
from tessera.tracking.view import (
    NOTE,
    OURS,
    REPLACED,
    RUN_ID,
    SYNCED,
    dataset_input,
    finals,
    params,
    tags,
)

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric
    from mlflow.entities import Run as MlflowRun

BATCH = 1000  # MLflow's own limits for log_batch: metrics, then params and tags
BATCH_TEXTS = 100
PARENT = "mlflow.parentRunId"
_OURS_TO_KEEP = (RUN_ID, SYNCED)
_TRIES = 4

_STATUS = {
    "finished": "FINISHED", "budget": "FINISHED", "running": "RUNNING",
    "failed": "FAILED", "diverged": "FAILED", "died": "KILLED", "preempted": "KILLED",
}  # fmt: skip


@dataclass(frozen=True)
class RunSync:
    """What one sync did for one run; ``points`` counts the metric points that were new.

    ``imported`` counts edits of MLflow's that became records; ``told`` are sentences about those
    that did not.
    """

    run_id: str
    mlflow_run_id: str
    created: bool
    rebuilt: bool
    points: int
    imported: int = 0
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Look:
    """What MLflow shows of a run at one moment; ``noted``: a sync restored it for a moment."""

    run: MlflowRun
    shown: Shown
    noted: bool


class Sending:
    """One run on its way into MLflow."""

    def __init__(
        self,
        server: Server,
        reading: Reading,
        summary: RunSummary,
        parent: str | None,
        annotations: list[Annotation] | None,
    ) -> None:
        """``parent`` is the MLflow run of the base; ``annotations`` None: leave them as they are"""
        self._server, self._client = server, server.client
        self._reading, self._history, self._summary = reading, reading.history, summary
        self._annotations = annotations
        self._texts = tags(self._history, summary)
        if parent is not None:
            self._texts[PARENT] = parent
        self._finals = finals(summary)
        self.interview = self._texts.get(INTERVIEW)
        self._run_id = ""
        self._imported = 0
        self._told: dict[str, None] = {}  # in order, each once

    def sync(self, known: list[MlflowRun], restored: set[str]) -> RunSync:
        """Bring MLflow up to the root.

        ``known`` are the runs that MLflow has of it, ``restored`` those that a sync restored for
        a moment. If another sync chose another run of several meanwhile, this one follows.
        """
        from mlflow.exceptions import MlflowException

        for left in reversed(range(_TRIES)):
            try:
                return self._sync(known, restored)
            except MlflowException:
                if not left or not self._taken_away():
                    raise
            known = known_runs(self._server, self._history.run.id).get(self._history.run.id, [])
            restored = restored_runs(self._server)
        raise AssertionError("unreachable")

    def _taken_away(self) -> bool:
        """Whether another sync deleted the run that this one was writing to."""
        if not self._run_id:
            return False
        run = self._client.get_run(self._run_id)
        archived_by_another = self._run_id in restored_runs(self._server) or BASE in run.data.tags
        return is_deleted(run) and (REPLACED in run.data.tags or archived_by_another)

    def _sync(self, known: list[MlflowRun], restored: set[str]) -> RunSync:
        for spare in known[1:]:
            replace_run(self._server, spare)
        run = known[0] if known else None
        self._run_id = run.info.run_id if run is not None else ""
        look, merged = None, self._merge(Shown(), {}) if run is None else None
        if run is not None:
            look = self._look(run, noted=self._run_id in restored)
            merged = self._merge(look.shown, base_of(look.run))
        state = state_of(None if look is None else look.run)
        rebuilt = look is not None and bool(state) and not self._continues(state)
        if look is not None and (rebuilt or REPLACED in look.run.data.tags):
            look, merged = self._look_again(look, merged)
            replace_run(self._server, look.run)
            look, state = None, {}
        created = look is None
        if look is None:
            mine = self._create(merged).info.run_id
            # Somebody may have created it at the same moment.
            found = known_runs(self._server, self._history.run.id)[self._history.run.id]
            run = found[0]
            for spare in found[1:]:
                replace_run(self._server, spare)
            self._run_id = run.info.run_id
            if self._run_id != mine:
                created, state = False, state_of(run)
                rebuilt = False
            look = self._look(run, noted=False)
            merged = self._merge(look.shown, base_of(look.run))
        points = self._write(look, state, merged)
        return RunSync(
            self._history.run.id, self._run_id, created and not rebuilt, rebuilt, points,
            self._imported, tuple(self._told),
        )  # fmt: skip

    # -- what people did to it ---------------------------------------------------------------------

    def _look(self, run: MlflowRun, *, noted: bool) -> _Look:
        """What ``run`` shows; ``noted`` is whether it was to be deleted again when it was read."""
        if not is_deleted(run) and not noted and "archive" in base_of(run):
            # Somebody restored it, or a sync did that was at work when it was read and is done by
            # now: then it is deleted again, and that before its mark goes.
            noted = self._run_id in restored_runs(self._server)
            run = self._get()
        # With the mark and not deleted: a sync died, or is at work, before it deleted it again.
        archived = is_deleted(run) or (noted and "archive" in base_of(run))
        return _Look(run, Shown.of(run, archived=archived), noted)

    def _get(self) -> MlflowRun:
        """The run as it is now; one that another sync replaced is no longer to be written to."""
        from mlflow.exceptions import MlflowException

        run = self._client.get_run(self._run_id)
        if is_deleted(run) and REPLACED in run.data.tags:
            raise MlflowException(f"Run {self._run_id} was replaced by another sync.")
        return run

    def _merge(self, shown: Shown, base: Mapping[str, str]) -> Merged | None:
        """What counts of notes, tags and archive marks; None where a record cannot be read."""
        if self._annotations is None:
            return None
        run = self._history.run
        merged = merge(run.root, run.id, base, shown, self._annotations)
        self._annotations = [*self._annotations, *merged.imported]
        self._imported += len(merged.imported)
        self._told |= dict.fromkeys(merged.told)
        return merged

    def _look_again(self, look: _Look, merged: Merged | None) -> tuple[_Look, Merged | None]:
        """Right before something is written over: what was typed since ``look`` counts too."""
        now = self._look(self._get(), noted=look.noted)
        if merged is not None and now.shown != look.shown:
            merged = self._merge(now.shown, base_after(look.shown, merged, base_of(look.run)))
        return now, merged

    # -- what is there and what should be ----------------------------------------------------------

    def _mark(self) -> dict[str, Any]:
        upto = self._history.upto
        return {
            "step": upto,
            "lineage": None if upto is None else _lineage_digest(self._history.lineage, upto),
            "points": self._reading.points,
            "at": self._reading.at_end,
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

    def _create(self, merged: Merged | None) -> MlflowRun:
        name = self._history.run.id
        kept = {} if merged is None else {**merged.foreign, **note_and_tags(merged.state)}
        # It is not archived until it is deleted: else it would look like one that was restored.
        base = None if merged is None else base_text(replace(merged.state, archived=False))
        return self._client.create_run(
            self._server.experiment_id,
            # Not of the first attempt: a run may be synced before it has one, and this stays.
            start_time=_ms(self._history.run.record.created_at),
            tags={**kept, **({} if base is None else {BASE: base}), RUN_ID: name},
            run_name=name,
        )

    # -- writing -----------------------------------------------------------------------------------

    def _write(self, look: _Look, state: dict[str, Any], merged: Merged | None) -> int:
        """Everything that MLflow lacks; returns how many points were new.

        A deleted run takes nothing, so it is restored for that and deleted again; an experiment's
        tag says so meanwhile, or else it would look like somebody's who wanted it back.
        """
        mark = self._mark()
        unlike = merged is not None and is_deleted(look.run) != merged.state.archived
        if unlike or state != mark or self._lacks(look.run, merged):
            look, merged = self._look_again(look, merged)
        run, noted = look.run, look.noted
        if merged is not None and (name := renamed(self._history.run.id, run)) is not None:
            self._told[name] = None
        set_, gone = self._changed_texts(run, merged)
        deleted = is_deleted(run)
        archive = deleted if merged is None else merged.state.archived
        new_params = self._new_params(run)
        dataset = self._new_dataset(run)
        busy = state != mark or self._lacks(run, merged)
        if deleted and archive and not busy:
            if noted:
                note_restored(self._server, self._run_id, False)
            return 0
        if archive:  # noted or not: who noted it may have taken that back meanwhile
            note_restored(self._server, self._run_id, True)
        if deleted:
            self._client.restore_run(self._run_id)
        self._log_texts(new_params, set_, gone)
        if dataset is not None:
            self._client.log_inputs(self._run_id, [dataset])
        points = 0 if state == mark else self._log_points(state, mark)
        self._finish(run)
        if archive:
            self._client.delete_run(self._run_id)
        if archive or noted:
            note_restored(self._server, self._run_id, False)
        return points

    def _changed_texts(
        self, run: MlflowRun, merged: Merged | None
    ) -> tuple[dict[str, str], list[str]]:
        """Tags to set, and those to take away."""
        has = run.data.tags
        wanted = dict(self._texts)
        keep = {BASE} if merged is None else set(merged.foreign)
        if merged is not None:
            wanted |= {k: v for k, v in note_and_tags(merged.state).items() if k not in keep}
            if (base := base_text(merged.state)) is not None:
                wanted[BASE] = base

        def is_gone(key: str) -> bool:
            if key in wanted or key in keep or key in _OURS_TO_KEEP:
                return False
            if key.startswith(OURS) or key == PARENT:
                return True
            return merged is not None and (key == NOTE or not key.startswith("mlflow."))

        gone = [key for key in has if is_gone(key)]
        return {key: value for key, value in wanted.items() if has.get(key) != value}, gone

    def _lacks(self, run: MlflowRun, merged: Merged | None) -> bool:
        """Whether there is more to write than points."""
        texts = any(self._changed_texts(run, merged)) or self._new_params(run)
        return bool(texts) or self._ends(run) or self._new_dataset(run) is not None

    def _new_dataset(self, run: MlflowRun) -> DatasetInput | None:
        there = run.inputs is not None and run.inputs.dataset_inputs
        return None if there else self._dataset

    @cached_property
    def _dataset(self) -> DatasetInput | None:
        return dataset_input(self._history)

    def _new_params(self, run: MlflowRun) -> dict[str, str]:
        has = run.data.params
        wanted = params(self._history.run.record)
        return {key: value for key, value in wanted.items() if key not in has}

    def _log_texts(self, new_params: dict[str, str], set_: dict[str, str], gone: list[str]) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        # The base last: until it is written, what is new counts as agreed.
        ordered = sorted(set_, key=lambda key: key == BASE)
        all_params = [Param(key, value) for key, value in new_params.items()]
        all_tags = [RunTag(key, set_[key]) for key in ordered]
        for key in gone:
            try:
                self._client.delete_tag(self._run_id, key)
            except MlflowException as error:  # another sync was faster
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        for start in range(0, max(len(all_params), len(all_tags)), BATCH_TEXTS):
            part = slice(start, start + BATCH_TEXTS)
            self._client.log_batch(self._run_id, params=all_params[part], tags=all_tags[part])

    def _log_points(self, state: dict[str, Any], mark: dict[str, Any]) -> int:
        self._client.set_tag(self._run_id, SYNCED, json.dumps({**state, "sending": mark}))
        done = state.get("step")
        sent = self._send(done)
        if self._summary.ended_at is not None and state.get("final") is None:
            self._send_finals(self._summary.ended_at)
        if done is not None and "at" in state:
            below = int(state["points"]) - int(state["at"])
            if int(mark["points"]) - sent != below:
                # A dead attempt's last records came from its machine after that sync.
                self._send(None)
        self._client.set_tag(self._run_id, SYNCED, json.dumps(mark))
        return int(mark["points"]) - int(state.get("points", 0))

    def _send(self, start: int | None) -> int:
        """Send the points from step ``start`` on (None: all); returns how many."""
        sent = 0
        for batch in self._batches(start):
            self._client.log_batch(self._run_id, metrics=batch)
            sent += len(batch)
        return sent

    def _batches(self, start: int | None) -> Iterator[list[Metric]]:
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for key, value, step, time, _ in points_from(self._reading, start):
            batch.append(Metric(key, value, round(time * 1000), step))
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _send_finals(self, ended_at: float) -> None:
        from mlflow.entities import Metric

        step = self._summary.step or 0
        metrics = [Metric(key, value, _ms(ended_at), step) for key, value in self._finals.items()]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def _ends(self, run: MlflowRun) -> bool:
        """Whether MLflow has another status or end of the run."""
        ended = self._summary.ended_at
        at = run.info.end_time if ended is None else _ms(ended)
        return bool((run.info.status, run.info.end_time) != (_STATUS[self._summary.status], at))

    def _finish(self, run: MlflowRun) -> None:
        if not self._ends(run):
            return
        status = _STATUS[self._summary.status]
        if self._summary.ended_at is None:
            self._client.update_run(self._run_id, status=status)
        else:
            ended = _ms(self._summary.ended_at)
            self._client.set_terminated(self._run_id, status=status, end_time=ended)


def state_of(run: MlflowRun | None) -> dict[str, Any]:
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
