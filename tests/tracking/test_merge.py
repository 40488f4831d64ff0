"""What people write of a run, here and in MLflow, through the stock client."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tessera.tracking import replay, sending
from tessera.tracking.annotations import Annotated, annotate, read_annotations
from tessera.tracking.known import known_runs, note_restored, restored_runs
from tessera.tracking.merge import merge
from tessera.tracking.replay import SyncReport, sync
from tessera.tracking.server import connect

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

    from tessera.runs import Run
    from tests.tracking.fabricate import Bench

NOTE = "mlflow.note.content"


class Desk:
    """A finished run, synced, with MLflow's own client beside it."""

    def __init__(self, bench: Bench) -> None:
        from mlflow import MlflowClient

        self.bench, self.run = bench, bench.finished()
        self.client = MlflowClient(bench.uri)
        self.sync()

    def sync(self) -> SyncReport:
        return sync(self.bench.root, self.bench.uri)

    def mlflow(self) -> MlflowRun:
        (found,) = known_runs(connect(self.bench.root, self.bench.uri))[self.run.id]
        return found

    @property
    def id(self) -> str:
        return str(self.mlflow().info.run_id)

    def annotated(self) -> Annotated:
        return Annotated.of(read_annotations(self.bench.root, self.run.id))

    def say(self, kind: Any, value: str | None, key: str = "") -> None:
        annotate(self.bench.root, self.run.id, kind, value, key=key)


@pytest.fixture
def desk(bench: Bench) -> Desk:
    return Desk(bench)


def test_notes_tags_and_archive_marks_of_the_root_are_shown(desk: Desk) -> None:
    desk.say("note", "warm-up too short")
    desk.say("tag", "good", "verdict")
    desk.sync()
    tags = desk.mlflow().data.tags
    assert (tags[NOTE], tags["verdict"]) == ("warm-up too short", "good")
    desk.say("archive", "yes")
    desk.sync()
    assert desk.mlflow().info.lifecycle_stage == "deleted"
    desk.say("archive", None)
    desk.say("tag", None, "verdict")
    desk.say("note", None)
    assert desk.sync().imported == 0
    found = desk.mlflow()
    assert found.info.lifecycle_stage == "active"
    assert not {NOTE, "verdict", "tessera.annotated"} & found.data.tags.keys()


def test_edits_made_in_mlflow_become_records(desk: Desk) -> None:
    desk.say("tag", "good", "verdict")
    desk.say("tag", "1", "gone")
    desk.sync()
    desk.client.set_tag(desk.id, NOTE, "typed in the UI")
    desk.client.set_tag(desk.id, "verdict", "better")
    desk.client.set_tag(desk.id, "mood", "bright")
    desk.client.delete_tag(desk.id, "gone")
    report = desk.sync()
    assert (report.imported, report.not_rebuilt) == (4, ())
    assert desk.annotated() == Annotated("typed in the UI", {"verdict": "better", "mood": "bright"})
    sources = {r.source for r in read_annotations(desk.bench.root, desk.run.id)[-4:]}
    assert sources == {"mlflow"}
    assert desk.sync().imported == 0
    desk.client.set_tag(desk.id, NOTE, "")
    desk.sync()
    assert desk.annotated().note is None


def test_deleted_and_restored_in_mlflow_is_archived_and_not(desk: Desk) -> None:
    desk.client.delete_run(desk.id)
    assert desk.sync().imported == 1
    assert desk.annotated().archived
    assert desk.sync().imported == 0
    assert desk.mlflow().info.lifecycle_stage == "deleted"
    desk.client.restore_run(desk.id)
    assert desk.sync().imported == 1
    assert not desk.annotated().archived
    assert desk.mlflow().info.lifecycle_stage == "active"


def test_an_archived_run_still_gets_its_points(bench: Bench) -> None:
    run = bench.create(steps=20)
    writer = bench.launch(run)
    writer.steps(1, 10)
    writer.checkpoint(10)
    annotate(bench.root, run.id, "archive", "yes")
    sync(bench.root, bench.uri)
    writer.steps(11, 20)
    writer.checkpoint(20)
    writer.end("FINISHED", 20)
    assert sync(bench.root, bench.uri).points == 20
    server = connect(bench.root, bench.uri)
    (found,) = known_runs(server)[run.id]
    assert found.info.lifecycle_stage == "deleted"
    assert found.info.status == "FINISHED"
    assert len(server.client.get_metric_history(found.info.run_id, "train/loss")) == 20
    assert restored_runs(server) == set()


def test_a_sync_that_dies_with_an_archived_run_restored_does_not_unarchive_it(desk: Desk) -> None:
    desk.say("archive", "yes")
    desk.sync()
    note_restored(connect(desk.bench.root, desk.bench.uri), desk.id, True)
    desk.client.restore_run(desk.id)  # and here it is killed
    assert desk.sync().imported == 0
    assert desk.annotated().archived
    assert desk.mlflow().info.lifecycle_stage == "deleted"
    assert restored_runs(connect(desk.bench.root, desk.bench.uri)) == set()


def test_a_sync_that_ends_while_another_looks_does_not_unarchive(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.say("archive", "yes")
    desk.sync()
    server, run_id = connect(desk.bench.root, desk.bench.uri), desk.id
    note_restored(server, run_id, True)  # one sync is writing to it
    desk.client.restore_run(run_id)

    def ends_first(there: Any) -> set[str]:
        if restored_runs(server):
            desk.client.delete_run(run_id)
            note_restored(server, run_id, False)
        return restored_runs(there)

    monkeypatch.setattr(replay, "restored_runs", ends_first)
    assert desk.sync().imported == 0
    assert desk.annotated().archived
    assert desk.mlflow().info.lifecycle_stage == "deleted"


def test_a_kill_when_an_archived_run_was_just_created_changes_no_record(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.finished()
    annotate(bench.root, run.id, "archive", "yes")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sending.Sending, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            sync(bench.root, bench.uri)
    assert sync(bench.root, bench.uri).imported == 0
    (found,) = known_runs(connect(bench.root, bench.uri))[run.id]
    assert found.info.lifecycle_stage == "deleted"


def test_a_kill_at_any_call_of_an_archiving_changes_no_record(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    changing = (
        "set_tag", "delete_tag", "log_batch", "delete_run", "restore_run", "set_experiment_tag",
        "delete_experiment_tag", "update_run", "set_terminated", "log_inputs",
    )  # fmt: skip

    class Killed(BaseException):
        pass

    left, kills = 0, 0
    for name in changing:
        real = getattr(MlflowClient, name)

        def counted(*arguments: Any, _real: Any = real, **named: Any) -> Any:
            nonlocal left, kills
            left -= 1
            if left < 0:
                kills += 1
                raise Killed
            return _real(*arguments, **named)

        monkeypatch.setattr(MlflowClient, name, counted)
    for archived, text in ((True, "one"), (True, "two"), (False, "three")):
        desk.say("archive", "yes" if archived else None)
        desk.say("note", text)
        said = len(read_annotations(desk.bench.root, desk.run.id))
        for limit in range(12):
            left = limit
            try:
                desk.sync()
            except Killed:
                continue
            break
        else:
            raise AssertionError("the sync never got through")
        left = 1000
        assert desk.sync().imported == 0
        found = desk.mlflow()
        assert found.info.lifecycle_stage == ("deleted" if archived else "active")
        assert found.data.tags[NOTE] == text
        assert len(read_annotations(desk.bench.root, desk.run.id)) == said
    assert kills >= 8


def test_changed_on_both_sides_the_root_counts_and_nothing_is_lost(desk: Desk) -> None:
    desk.say("note", "first")
    desk.sync()
    desk.say("note", "ours")
    desk.client.set_tag(desk.id, NOTE, "theirs")
    (told,) = desk.sync().not_rebuilt
    assert "changed in MLflow and in the root" in told
    assert desk.mlflow().data.tags[NOTE] == "ours"
    notes = [r.value for r in read_annotations(desk.bench.root, desk.run.id)]
    assert notes == ["first", "theirs", "ours"]
    assert desk.sync().not_rebuilt == ()


def test_taken_away_in_the_root_and_changed_in_mlflow_the_root_counts(desk: Desk) -> None:
    desk.say("note", "first")
    desk.say("tag", "good", "verdict")
    desk.sync()
    desk.say("note", None)
    desk.say("tag", None, "verdict")
    desk.client.set_tag(desk.id, NOTE, "theirs")
    desk.client.set_tag(desk.id, "verdict", "better")
    told = desk.sync().not_rebuilt
    assert len(told) == 2
    assert all("changed in MLflow and in the root" in sentence for sentence in told)
    assert not {NOTE, "verdict"} & desk.mlflow().data.tags.keys()
    assert desk.annotated() == Annotated()
    records = read_annotations(desk.bench.root, desk.run.id)
    assert [r.value for r in records if r.kind == "note"] == ["first", "theirs", None]
    assert [r.value for r in records if r.kind == "tag"] == ["good", "better", None]
    report = desk.sync()
    assert (report.imported, report.not_rebuilt) == (0, ())


def test_what_is_typed_after_the_sync_looked_is_not_lost(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``known_runs`` is asked once for all runs, minutes before the last of them is written."""
    desk.say("note", "first")
    desk.say("tag", "good", "verdict")
    desk.sync()
    desk.say("note", "ours")
    run_id = desk.id

    def typed(there: Any) -> set[str]:
        desk.client.set_tag(run_id, NOTE, "theirs")
        desk.client.set_tag(run_id, "verdict", "better")
        return restored_runs(there)

    with monkeypatch.context() as patch:
        patch.setattr(replay, "restored_runs", typed)
        (told,) = desk.sync().not_rebuilt
    assert "changed in MLflow and in the root" in told
    records = read_annotations(desk.bench.root, desk.run.id)
    assert [r.value for r in records if r.kind == "note"] == ["first", "theirs", "ours"]
    assert desk.annotated() == Annotated("ours", {"verdict": "better"})
    tags = desk.mlflow().data.tags
    assert (tags[NOTE], tags["verdict"]) == ("ours", "better")
    report = desk.sync()
    assert (report.imported, report.not_rebuilt) == (0, ())


def test_what_is_typed_while_the_sync_merges_is_merged_too(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.client.set_tag(desk.id, NOTE, "one")
    desk.client.set_tag(desk.id, "a:b", "odd")
    run_id, real, merges = desk.id, merge, 0

    def merging(*arguments: Any) -> Any:
        nonlocal merges
        merges += 1
        merged = real(*arguments)
        if merges == 1:
            desk.client.set_tag(run_id, NOTE, "two")
            desk.client.set_tag(run_id, "mood", "bright")
        return merged

    monkeypatch.setattr(sending, "merge", merging)
    report = desk.sync()
    assert (merges, report.imported) == (2, 3)
    (told,) = report.not_rebuilt  # of the tag that no record takes, once
    assert "tag 'a:b' of MLflow is in no record" in told
    records = read_annotations(desk.bench.root, desk.run.id)
    assert [r.value for r in records if r.kind == "note"] == ["one", "two"]
    assert desk.annotated() == Annotated("two", {"mood": "bright"})
    tags = desk.mlflow().data.tags
    assert (tags[NOTE], tags["mood"], tags["a:b"]) == ("two", "bright", "odd")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("a:b", "x", "tag 'a:b' of MLflow is in no record"),
        ("long", "x" * 5001, "tag 'long' of MLflow is in no record"),
        (NOTE, "x" * 7950, "the note of MLflow is in no record"),
        ("mlflow.runName", "nicer", "is called 'nicer' in MLflow"),
    ],
)
def test_what_cannot_be_a_record_stays_and_is_told(
    desk: Desk, key: str, value: str, told: str
) -> None:
    desk.client.set_tag(desk.id, key, value)
    for _ in range(2):
        (sentence,) = desk.sync().not_rebuilt
        assert told in sentence
        assert desk.mlflow().data.tags[key] == value


def test_what_sync_deletes_itself_is_not_archived(desk: Desk) -> None:
    server = connect(desk.bench.root, desk.bench.uri)
    first = desk.id
    tags = {"tessera.run_id": desk.run.id}
    spare = server.client.create_run(server.experiment_id, tags=tags).info.run_id
    desk.sync()
    assert desk.client.get_run(spare).data.tags["tessera.replaced"] == "yes"
    assert (desk.id, desk.annotated().archived) == (first, False)
    state = json.loads(desk.mlflow().data.tags["tessera.synced"])
    desk.client.set_tag(first, "tessera.synced", json.dumps({**state, "final": "another"}))
    desk.client.set_tag(first, "mood", "bright")
    assert desk.sync().runs[0].rebuilt
    assert desk.id != first
    assert desk.mlflow().data.tags["mood"] == "bright"
    assert not desk.annotated().archived


def test_a_damaged_record_is_told_and_leaves_what_mlflow_shows(desk: Desk) -> None:
    desk.say("note", "kept")
    desk.sync()
    (record,) = read_annotations(desk.bench.root, desk.run.id)
    desk.bench.root.publish(record.path, b"{}")
    report = desk.sync()
    assert "is not an annotation" in report.damaged[0]
    assert desk.mlflow().data.tags[NOTE] == "kept"


def test_two_syncs_that_create_at_once_leave_one_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.finished()
    real = sending.Sending._create
    nested: list[bool] = []

    def create(self: Any, merged: Any) -> Any:
        if not nested:  # another sync goes through between this one's look and its creation
            nested.append(True)
            sync(bench.root, bench.uri)
        return real(self, merged)

    monkeypatch.setattr(sending.Sending, "_create", create)
    sync(bench.root, bench.uri)
    assert nested
    assert list(bench.seen(bench.uri).runs) == [run.id]
    (found,) = known_runs(connect(bench.root, bench.uri))[run.id]
    assert found.info.lifecycle_stage == "active"
    sync(bench.root, bench.database("rebuilt"))
    assert bench.seen(bench.uri) == bench.seen(bench.database("rebuilt"))


def test_records_of_a_dead_attempt_that_come_late_are_sent(bench: Bench) -> None:
    """Attempt 1 left a point of step 10 on its machine, which adopts it after step 20 is synced."""
    run: Run = bench.create(steps=20)
    first = bench.launch(run)
    first.steps(1, 10)
    first.checkpoint(10)
    second = bench.launch(run, instance="i-2")
    second.steps(11, 20)
    second.checkpoint(20)
    sync(bench.root, bench.uri)
    first.journal.metric("traffic/up_bytes", 5e6, 10)
    first.kill()
    assert sync(bench.root, bench.uri).points == 1
    assert bench.seen(bench.uri).values(run.id, "traffic/up_bytes") == [(10, repr(5e6))]
    second.kill()
