"""Saved views, interviews and the note, on SQLite; the page is in tests/full."""

from __future__ import annotations

import base64
import json
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from tessera.tracking import conclusions
from tessera.tracking.conclusions import DIGEST, NOTE
from tessera.tracking.replay import sync
from tessera.tracking.saved_views import CHARTS, SO_FAR, TABLE, left_out, page, views
from tessera.tracking.server import connect
from tests.full.voices import FINAL_LOSS, voices_root

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench


def tags(bench: Bench) -> dict[str, str]:
    """Tags of the experiment."""
    server = connect(bench.root, bench.uri)
    return dict(server.client.get_experiment(server.experiment_id).tags)


def set_tag(bench: Bench, key: str, value: str) -> None:
    server = connect(bench.root, bench.uri)
    server.client.set_experiment_tag(server.experiment_id, key, value)


def opened(value: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What MLflow's page reads from a tag: the envelope, and the state in it."""
    envelope = json.loads(value)
    packed = envelope["state"].removeprefix("deflate;")
    assert packed != envelope["state"]
    return envelope, json.loads(zlib.decompress(base64.b64decode(packed)))


def test_a_sync_brings_the_views_and_the_next_one_writes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.finished()
    assert sync(bench.root, bench.uri).remarks == ()
    found = tags(bench)
    envelope, charts = opened(found[f"mlflow.sharedViewState.{CHARTS}"])
    assert envelope["name"] == "Loss vs dollars"
    assert isinstance(envelope["createdAt"], int)  # the page refuses anything else
    line = charts["compareRunCharts"][0]
    assert (line["metricKey"], line["xAxisKey"]) == ("eval/loss", "metric")
    assert line["selectedXAxisMetricKey"] == SO_FAR
    _, table = opened(found[f"mlflow.sharedViewState.{TABLE}"])
    assert table["orderByKey"] == "metrics.`final/cost_usd`"
    assert table["selectedColumns"][:4] == [
        "metrics.`final/cost_usd`", "metrics.`final/loss`", "metrics.`final/usd_per_mtok`",
        "tags.`tessera.interview`",
    ]  # fmt: skip
    from mlflow import MlflowClient

    def refuse(*_: object) -> None:
        raise AssertionError("an unchanged view was written again")

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    sync(bench.root, bench.uri)
    assert tags(bench) == found


def test_a_view_that_somebody_spoiled_is_mended_and_a_kind_that_somebody_chose_stays(
    bench: Bench,
) -> None:
    set_tag(bench, "mlflow.experimentKind", "genai_development")
    set_tag(bench, f"mlflow.sharedViewState.{CHARTS}", "spoiled")
    sync(bench.root, bench.uri)
    found = tags(bench)
    assert opened(found[f"mlflow.sharedViewState.{CHARTS}"])[0]["name"] == "Loss vs dollars"
    assert found["mlflow.experimentKind"] == "genai_development"


@pytest.mark.parametrize("version", ["3.18.0", "4.0.0", "3.16.9", "unknown"])
def test_another_mlflow_gets_no_views_but_a_sentence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("mlflow.__version__", version)
    run = bench.finished()
    report = sync(bench.root, bench.uri)
    (sentence,) = report.remarks
    assert sentence.startswith(f"MLflow {version} gets no saved views: they were checked with 3.17")
    assert "final/cost_usd" in sentence
    assert SO_FAR in sentence
    found = tags(bench)
    assert not [key for key in found if key.startswith("mlflow.sharedViewState.")]
    assert "Saved views" not in found[NOTE]
    assert run.id in found[NOTE]
    assert bench.seen(bench.uri).values(run.id, "final/loss")  # nothing else depends on views


@pytest.mark.parametrize("version", ["3.17.0", "3.17.2", "3.17.9.dev0"])
def test_every_patch_release_of_a_checked_version_gets_them(version: str) -> None:
    assert left_out(version) is None


def test_a_view_fits_a_tag() -> None:
    assert len({view.key for view in views()}) == len(views())
    assert all(len(view.value) < 5000 for view in views())  # MLflow's limit


def test_pages_open_in_the_tab_of_the_view() -> None:
    charts, table = views()
    start = "http://127.0.0.1:5000/#/experiments/7/runs?"
    assert page("http://127.0.0.1:5000/", "7", charts).startswith(
        f"{start}viewStateShareKey={CHARTS}&compareRunsMode=CHART"
    )
    assert "compareRunsMode=TABLE" in page("http://127.0.0.1:5000", "7", table)
    assert "viewStateShareKey" not in page("http://127.0.0.1:5000", "7")


# -- interviews ------------------------------------------------------------------------------------


def test_a_voice_shows_its_best_interview(bench: Bench) -> None:
    *_, warm, curt = voices_root(bench)
    sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    assert seen.tags[warm.id]["tessera.interview"] == "1.00, 0 fatal (ep1, honest)"
    assert seen.tags[curt.id]["tessera.interview"] == "0.00, 1 fatal, 1 unanswered (ep1, honest)"
    assert sync(bench.root, bench.uri).points == 0
    bench.interview(curt, suite="kind", suite_digest="6" * 64)
    sync(bench.root, bench.uri)
    seen = bench.seen(bench.uri)
    assert seen.tags[curt.id]["tessera.interview"] == "1.00, 0 fatal (ep1, kind)"


def test_an_interview_of_other_weights_or_a_torn_one_does_not_count(bench: Bench) -> None:
    *_, warm, _ = voices_root(bench)
    bench.interview(warm, adapter_digest="0" * 64)
    torn = warm.path("interviews", "7" * 64, "ep1.json")
    bench.root.publish(torn, b'{"summary": ')
    sync(bench.root, bench.uri)
    assert "tessera.interview" not in bench.seen(bench.uri).tags[warm.id]


# -- the note --------------------------------------------------------------------------------------


def test_the_note_begins_with_the_conclusion(bench: Bench) -> None:
    *bases, warm, curt = voices_root(bench)
    sync(bench.root, bench.uri)
    note = tags(bench)[NOTE]
    small, steady, wide, hasty = (run.id for run in bases)
    assert note.startswith(
        f"**Pretraining on sample: `{wide}` reached {FINAL_LOSS['wide']:.4f} nats a token for "
        "$72.00**, the lowest loss of 4 runs."
    )
    assert f"**Fine-tuning of {wide}: `{warm.id}` reached 2.1000" in note
    table = [line for line in note.splitlines() if line.startswith("| `")]
    shown = [line.split("`")[1] for line in table]
    assert shown == [small, steady, wide, warm.id]  # `hasty` and `curt` are beaten in both
    assert hasty not in shown
    assert curt.id not in shown
    assert table[-1].endswith("| 1.00, 0 fatal (ep1, honest) |")


def test_a_cheap_run_that_is_nearly_as_good_is_named(bench: Bench) -> None:
    bench.finished("dear", steps=20, final=2.50)
    bench.finished("cheap", steps=10, final=2.54)
    sync(bench.root, bench.uri)
    assert "`cheap-" in tags(bench)[NOTE].splitlines()[0].split("came within 2%")[0]


def test_a_note_that_a_person_edited_stays_and_an_emptied_one_comes_back(bench: Bench) -> None:
    bench.finished()
    sync(bench.root, bench.uri)
    ours = tags(bench)[NOTE]
    set_tag(bench, NOTE, ours + "\n\nBuy no more of these.")
    bench.finished("better", final=1.5)
    (remark,) = sync(bench.root, bench.uri).remarks
    assert remark.startswith("The note of the MLflow experiment 'tessera' was edited")
    assert tags(bench)[NOTE].endswith("Buy no more of these.")
    set_tag(bench, NOTE, "")
    assert sync(bench.root, bench.uri).remarks == ()
    assert tags(bench)[NOTE].startswith("**Pretraining on sample: `better-")


@pytest.mark.parametrize("writes", [1, 2])
def test_a_sync_that_dies_at_the_note_leaves_one_that_is_known_as_ours(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    from mlflow import MlflowClient

    bench.finished()
    sync(bench.root, bench.uri)
    bench.finished("better", final=1.5)
    real, done = MlflowClient.set_experiment_tag, 0

    def dying(client: MlflowClient, *arguments: Any) -> None:
        nonlocal done
        if done == writes:
            raise KeyboardInterrupt
        done += 1
        real(client, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_experiment_tag", dying)
        with pytest.raises(KeyboardInterrupt):
            sync(bench.root, bench.uri)
    bench.finished("best", final=1.2)
    assert sync(bench.root, bench.uri).remarks == ()
    assert tags(bench)[NOTE].startswith("**Pretraining on sample: `best-")


def test_a_note_from_before_is_not_ours(bench: Bench) -> None:
    set_tag(bench, NOTE, "Mine.")
    bench.finished()
    assert len(sync(bench.root, bench.uri).remarks) == 1
    assert tags(bench)[NOTE] == "Mine."


def test_syncing_one_run_leaves_the_note(bench: Bench) -> None:
    run = bench.finished()
    sync(bench.root, bench.uri, only=[run.id])
    assert NOTE not in tags(bench)


def test_a_root_without_figures_says_so(bench: Bench) -> None:
    bench.create()
    sync(bench.root, bench.uri)
    assert tags(bench)[NOTE].startswith("**No run has a loss and a price yet.**")


def test_a_note_never_outgrows_its_tag(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conclusions, "CHARACTERS", 1000)
    voices_root(bench)
    sync(bench.root, bench.uri)
    found = tags(bench)
    assert len(found[NOTE]) <= 1000
    assert found[NOTE].startswith("**Pretraining")
    assert len(found[DIGEST]) == 64


def test_a_server_that_refuses_a_tag_is_a_sentence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from tessera.errors import StoreError

    def refuse(*_: object) -> None:
        raise MlflowException("no room")

    bench.finished()
    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    with pytest.raises(StoreError, match=r"failed \(no room\)"):
        sync(bench.root, bench.uri)
