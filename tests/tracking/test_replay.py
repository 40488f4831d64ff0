from __future__ import annotations

import math
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from tessera.errors import InputError, StoreError
from tessera.tracking import sending
from tessera.tracking.history import ALIVE_S
from tessera.tracking.replay import sync
from tessera.tracking.server import connect, default_uri, without_password

if TYPE_CHECKING:
    from tessera.runs import Run
    from tests.tracking.fabricate import Bench, Writer


def rolled_back(bench: Bench) -> Run:
    """Killed at step 15 after a checkpoint at 10, resumed from there, finished at 20."""
    run = bench.create("rolled", steps=20)
    first = bench.launch(run)
    first.steps(1, 10)
    first.evaluate(10, 3.0)
    first.checkpoint(10)
    first.steps(11, 15)
    first.kill()
    bench.clock.now += ALIVE_S
    second = bench.launch(run, instance="i-2")
    second.steps(11, 20)
    second.evaluate(20, 2.0)
    second.checkpoint(20)
    second.end("FINISHED", 20)
    return run


def test_a_resumed_run_shows_each_step_once(bench: Bench) -> None:
    run = rolled_back(bench)
    report = sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    values = seen.values(run.id, "train/loss")
    assert [step for step, _ in values] == list(range(1, 21))
    assert values[9][1] == repr(10 / 10 + 0.001)
    assert values[10][1] == repr(10 / 11 + 0.002)
    assert report.points == len(seen.points[run.id]) - 6  # beside the six final figures
    assert (report.created, len(report.runs)) == (1, 1)


def test_syncing_after_every_event_is_syncing_once(bench: Bench) -> None:
    run = bench.create(steps=20)

    def again(writer: Writer) -> None:
        writer.journal.flush()
        sync(bench.root, bench.uri)

    writer = bench.launch(run)
    again(writer)
    writer.evaluate(0, 6.0)
    writer.steps(1, 10)
    again(writer)
    assert bench.seen(bench.uri).points[run.id] == []
    writer.checkpoint(10)
    writer.steps(11, 13)
    again(writer)
    middle = bench.seen(bench.uri)
    assert max(step for _, step, _, _ in middle.points[run.id]) == 10
    assert middle.tags[run.id]["tessera.live"].startswith("step 13, train/loss 0.77")
    writer.evaluate(10, 3.0)  # the evaluation of a step may follow its checkpoint
    writer.kill()
    bench.clock.now += ALIVE_S
    sync(bench.root, bench.uri)
    assert bench.seen(bench.uri).runs[run.id][0] == "KILLED"
    second = bench.launch(run)
    second.steps(11, 20)
    again(second)
    assert bench.seen(bench.uri).runs[run.id][0] == "RUNNING"
    second.end("FINISHED", 20)
    sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    assert seen.values(run.id, "eval/loss") == [(0, "6.0"), (10, "3.0")]
    assert seen.runs[run.id][0] == "FINISHED"
    assert "tessera.live" not in seen.tags[run.id]
    sync(bench.root, bench.database("rebuilt"))
    assert bench.seen(bench.database("rebuilt")) == seen


def test_a_second_sync_adds_nothing_and_a_rebuilt_mlflow_is_the_same(bench: Bench) -> None:
    rolled_back(bench)
    bench.with_adapter()
    sync(bench.root, bench.uri)
    once = bench.seen(bench.uri)
    report = sync(bench.root, bench.uri)
    assert (report.points, report.created) == (0, 0)
    assert bench.seen(bench.uri) == once
    sync(bench.root, bench.database("rebuilt"))
    assert bench.seen(bench.database("rebuilt")) == once


def test_a_sync_that_dies_halfway_is_finished_by_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolled_back(bench)
    sync(bench.root, bench.database("whole"))
    from mlflow import MlflowClient

    real, calls = MlflowClient.log_batch, 0

    def dying(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError("connection reset")
        return real(self, *arguments, **named)

    monkeypatch.setattr(sending, "BATCH", 7)
    monkeypatch.setattr(MlflowClient, "log_batch", dying)
    with pytest.raises(StoreError, match="connection reset"):
        sync(bench.root, bench.uri)
    assert calls == 4
    sync(bench.root, bench.uri)
    assert bench.seen(bench.uri) == bench.seen(bench.database("whole"))


def test_points_of_an_overtaken_attempt_are_taken_back(bench: Bench) -> None:
    run = bench.create()
    first = bench.launch(run)
    first.steps(1, 10)
    first.checkpoint(10)
    second = bench.launch(run, instance="i-2")
    first.steps(11, 20)
    first.checkpoint(20)
    sync(bench.root, bench.uri)
    assert bench.seen(bench.uri).values(run.id, "train/loss")[-1] == (20, repr(10 / 20 + 0.001))
    second.steps(11, 30)
    second.checkpoint(30)
    report = sync(bench.root, bench.uri)
    assert [r.rebuilt for r in report.runs] == [True]
    values = bench.seen(bench.uri).values(run.id, "train/loss")
    assert [step for step, _ in values] == list(range(1, 31))
    assert values[10][1] == repr(10 / 11 + 0.002)
    first.kill()
    second.kill()


def test_notes_of_people_outlive_a_rebuild(bench: Bench) -> None:
    from mlflow import MlflowClient

    run = bench.create()
    first = bench.launch(run)
    first.steps(1, 10)
    first.end("FAILED", 10, exit_code=1)
    report = sync(bench.root, bench.uri)
    client = MlflowClient(bench.uri)
    client.set_tag(report.runs[0].mlflow_run_id, "mlflow.note.content", "too hot")
    client.set_tag(report.runs[0].mlflow_run_id, "mood", "bad")
    second = bench.launch(run)
    second.steps(1, 20)
    second.end("FINISHED", 20)
    assert sync(bench.root, bench.uri).runs[0].rebuilt  # the final cost was not final
    tags = bench.seen(bench.uri).tags[run.id]
    assert (tags["mlflow.note.content"], tags["mood"]) == ("too hot", "bad")


def test_nan_and_infinities_survive(bench: Bench) -> None:
    run = bench.create()
    writer = bench.launch(run)
    for step, value in ((1, math.nan), (2, math.inf), (3, -math.inf)):
        writer.journal.metric("train/grad_norm", value, step)
    writer.evaluate(3, math.nan)
    writer.checkpoint(3)
    writer.end("DIVERGED", 3, exit_code=3)
    sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    largest = 1.7976931348623157e308  # how MLflow stores an infinity
    expected = [(1, "NaN"), (2, repr(largest)), (3, repr(-largest))]
    assert seen.values(run.id, "train/grad_norm") == expected
    assert seen.values(run.id, "final/loss") == [(3, "NaN")]
    assert seen.runs[run.id][0] == "FAILED"
    sync(bench.root, bench.uri)
    assert bench.seen(bench.uri) == seen


def test_a_killed_run_ends_at_its_last_record_and_says_that_this_is_an_estimate(
    bench: Bench,
) -> None:
    run = bench.create()
    started = bench.clock()
    writer = bench.launch(run)
    writer.steps(1, 30)
    writer.kill()
    bench.clock.now += 10 * ALIVE_S
    sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    status = ("KILLED", round(started * 1000), round((started + 30) * 1000), None)
    assert seen.runs[run.id] == status
    assert seen.tags[run.id]["tessera.cost_estimated"] == "true"
    assert float(seen.tags[run.id]["tessera.cost_usd"]) == pytest.approx(0.03)


def test_what_mlflow_shows_of_a_run(bench: Bench) -> None:
    from mlflow import MlflowClient

    voice = bench.with_adapter()
    report = sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    base_id = next(name for name in seen.runs if name.startswith("base-"))
    assert seen.runs[voice.id][3] == base_id
    assert seen.params[base_id]["optimizer.lr"] == "0.001"
    assert seen.params[base_id]["tokens"] == "20000"
    tags = seen.tags[voice.id]
    assert tags["tessera.kind"] == "sft"
    assert tags["tessera.gpu"] == "1 x H200"
    assert tags["tessera.usd_per_hour"] == "3.6"
    assert tags["tessera.commit"] == "abc123"
    assert len(tags["tessera.adapter.ep1"]) == 64
    finals = {key: v for key, _, v, _ in seen.points[base_id] if key.startswith(("final", "best"))}
    assert finals["final/loss"] == finals["best/loss"] == "2.5"
    assert float(finals["final/cost_usd"]) == pytest.approx(0.02)
    assert float(finals["final/wall_s"]) == pytest.approx(20)
    assert float(finals["final/usd_per_mtok"]) == pytest.approx(1)
    by_name = {run.run_id: run.mlflow_run_id for run in report.runs}
    inputs = MlflowClient(bench.uri).get_run(by_name[base_id]).inputs
    assert inputs is not None
    (dataset,) = inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("sample", "f" * 32)


def test_traffic_shows_like_the_other_figures(bench: Bench) -> None:
    run = bench.create(steps=20)
    first = bench.launch(run, usd_per_gb_up=0.02)
    first.steps(1, 10)
    first.checkpoint(10)
    first.journal.metric("traffic/up_bytes", 1e9, 10)  # written just after the checkpoint
    first.kill()
    sync(bench.root, bench.uri)
    tags = bench.seen(bench.uri).tags[run.id]
    assert (tags["tessera.traffic_usd"], tags["tessera.traffic_bytes"]) == (
        "0.020000",
        "1000000000",
    )
    assert tags["tessera.usd_per_gb_up"] == "0.02"
    assert float(tags["tessera.cost_usd"]) == pytest.approx(0.03)
    lost = bench.launch(run, instance="i-2", usd_per_gb_up=0.02)
    lost.steps(11, 15)
    lost.journal.metric("traffic/up_bytes", 5e9, 15)
    lost.end("ROLLED_BACK", 15)
    last = bench.launch(run, instance="i-3", usd_per_gb_up=0.02)
    last.steps(11, 20)
    last.checkpoint(20)
    sync(bench.root, bench.uri)
    last.journal.metric("traffic/up_bytes", 1e9, 20)  # its heartbeat came after that sync
    last.end("FINISHED", 20)
    sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    gigabyte = repr(1e9)
    assert seen.values(run.id, "traffic/up_bytes") == [(10, gigabyte), (20, gigabyte)]
    ((_, usd),) = seen.values(run.id, "final/traffic_usd")
    ((_, sent),) = seen.values(run.id, "final/traffic_bytes")
    ((_, cost),) = seen.values(run.id, "final/cost_usd")
    assert float(usd) == pytest.approx(0.14)
    assert float(sent) == 7e9
    assert float(cost) == pytest.approx(0.14 + 0.001 * (10 + 5 + 10))
    report = sync(bench.root, bench.uri)
    assert (report.points, report.created) == (0, 0)
    sync(bench.root, bench.database("rebuilt"))
    assert bench.seen(bench.database("rebuilt")) == bench.seen(bench.uri) == seen


def test_a_run_that_sent_nothing_has_no_figure_of_traffic(bench: Bench) -> None:
    run = bench.finished()
    sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    assert not [key for key, _, _, _ in seen.points[run.id] if "traffic" in key]
    assert not [key for key in seen.tags[run.id] if "traffic" in key or "per_gb" in key]


def test_only_one_run_brings_its_base_along(bench: Bench) -> None:
    voice = bench.with_adapter()
    bench.finished("another")
    report = sync(bench.root, bench.uri, only=[voice.id])
    assert [run.run_id.split("-")[0] for run in report.runs] == ["base", "voice"]


def test_progress_is_told_run_by_run(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.finished(name)
        bench.clock.now += 1
    told: list[tuple[int, int, str]] = []
    sync(bench.root, bench.uri, lambda done, total, run: told.append((done, total, run[:3])))
    assert told == [(0, 2, "one"), (1, 2, "two")]


def test_a_dead_server_is_one_sentence_within_seconds(bench: Bench) -> None:
    bench.finished()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(StoreError) as caught:
        sync(bench.root, f"http://ada:secret@127.0.0.1:{port}")
    assert time.monotonic() - started < 10
    text = str(caught.value)
    assert "connection refused" in text
    assert text.count(". ") == 0
    assert "\n" not in text
    assert "secret" not in text


@pytest.mark.parametrize("uri", ["nonsense://here", "file:///tmp/old-store", "no-uri"])
def test_a_uri_that_mlflow_cannot_use_is_bad_input(bench: Bench, uri: str) -> None:
    bench.finished()
    with pytest.raises(InputError, match="MLflow cannot use"):
        sync(bench.root, uri)


def test_where_mlflow_lives_by_default(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_uri(bench.root) == f"sqlite:///{bench.root.url}/mlflow.db"
    from tessera.storage import Root

    assert default_uri(Root("memory://r")) == f"sqlite:///{bench.folder}/.tessera/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_uri(bench.root) == "http://tracking:5000"


def test_passwords_are_not_printed() -> None:
    assert without_password("postgresql://ada:pw@db/x") == "postgresql://ada:***@db/x"
    assert without_password("http://db:5000/x") == "http://db:5000/x"
    for password in ("pa/ss+w0rd=", "p@ss", "a:b"):
        assert without_password(f"postgresql://ada:{password}@db/x") == "postgresql://ada:***@db/x"


def test_a_relative_database_is_the_one_beside_the_user(bench: Bench) -> None:
    bench.finished()
    bench.database("mlflow")  # its schema, copied: making it takes seconds
    (bench.folder / "mlflow" / "mlflow.db").rename(bench.folder / "mine.db")
    server = connect(bench.root, "sqlite:///mine.db")
    assert server.uri == f"sqlite:///{bench.folder / 'mine.db'}"


def test_nothing_is_printed(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.finished()
    sync(bench.root, f"sqlite:///{bench.folder}/new/mlflow.db")
    assert capfd.readouterr() == ("", "")
