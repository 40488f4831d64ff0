"""An MLflow that is rebuilt from the root equals the one that grew with it; asked by its client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tessera.promotion.registry import apply_records, promote
from tessera.tracking.annotations import annotate
from tessera.tracking.replay import sync

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench

# Ids that MLflow draws, and when each was written.
_DRAWN = frozenset({"mlflow.parentRunId", "mlflow.log-model.history"})


def shown(uri: str) -> dict[str, Any]:
    """Everything of the experiment and the registry, by our own run ids."""
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tessera")
    assert experiment is not None
    everything = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    runs = [run for run in everything if "tessera.replaced" not in run.data.tags]
    names = {run.info.run_id: run.data.tags["tessera.run_id"] for run in runs}
    assert len(set(names.values())) == len(runs), "a run is there twice"
    found: dict[str, Any] = {"experiment": experiment.tags}
    for run in runs:
        info, name = run.info, names[run.info.run_id]
        histories = {
            key: client.get_metric_history(info.run_id, key) for key in sorted(run.data.metrics)
        }
        inputs = run.inputs.dataset_inputs if run.inputs else []
        found[name] = {
            "info": (info.run_name, info.status, info.start_time, info.end_time),
            "archived": info.lifecycle_stage == "deleted",
            "params": run.data.params,
            "tags": {k: v for k, v in run.data.tags.items() if k not in _DRAWN},
            "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
            "latest": {key: repr(value) for key, value in run.data.metrics.items()},
            "points": {
                key: sorted((m.step, m.timestamp, repr(m.value)) for m in history)
                for key, history in histories.items()
            },
            "datasets": [
                (d.dataset.name, d.dataset.digest, d.dataset.source, d.dataset.source_type,
                 sorted((tag.key, tag.value) for tag in d.tags))
                for d in inputs
            ],
        }  # fmt: skip
    for model in client.search_registered_models():
        versions = client.search_model_versions(f"name='{model.name}'")
        by_number = {str(v.version): v for v in versions}
        found["registry"] = {
            "aliases": {
                alias: by_number[str(version)].tags["tessera.promotion"]
                for alias, version in client.get_registered_model(model.name).aliases.items()
            },
            "versions": sorted((v.tags["tessera.promotion"], sorted(v.tags)) for v in versions),
            "runs": sorted(names[v.run_id] for v in versions),
        }
    return found


def test_an_mlflow_rebuilt_from_the_root_is_the_old_one(bench: Bench) -> None:
    voice = bench.with_adapter()
    base = bench.create("grown", steps=30)
    writer = bench.launch(base, instance="i-7")
    writer.evaluate(0, 6.0)
    writer.steps(1, 10)
    writer.checkpoint(10)
    writer.journal.metric("train/grad_norm", float("nan"), 10)
    writer.steps(11, 14)
    writer.journal.flush()
    _both(bench)
    writer.kill()
    bench.interview(voice)
    promote(bench.root, voice, "ep1", tracking_uri=bench.uri)
    _both(bench)
    # Edits by people, on this side and on that one.
    from mlflow import MlflowClient

    client = MlflowClient(bench.uri)
    by_name = {run.run_id: run.mlflow_run_id for run in sync(bench.root, bench.uri).runs}
    client.set_tag(by_name[voice.id], "mlflow.note.content", "the one on the demo")
    client.set_tag(by_name[voice.id], "audience", "fair")
    client.delete_run(by_name[base.id])
    annotate(bench.root, voice.id, "tag", "yes", key="kept")
    _both(bench)
    # The archived run goes on, after a rollback of four steps, and is done.
    bench.clock.now += 1000
    second = bench.launch(base, instance="i-8")
    second.steps(11, 30)
    second.evaluate(30, 2.0)
    second.checkpoint(30)
    second.end("FINISHED", 30)
    _both(bench)
    old = shown(bench.uri)
    assert old[base.id]["archived"]
    assert [step for step, _, _ in old[base.id]["points"]["train/loss"]] == list(range(1, 31))
    assert old[voice.id]["tags"]["mlflow.note.content"] == "the one on the demo"
    assert {"audience", "kept"} < old[voice.id]["tags"].keys()
    assert old[voice.id]["parent"].startswith("base-")
    assert old[base.id]["datasets"]
    assert old["registry"]["aliases"] == {"champion": "000001"}
    _both(bench, "rebuilt")
    assert shown(bench.database("rebuilt")) == old


def _both(bench: Bench, database: str = "mlflow") -> None:
    uri = bench.database(database)
    sync(bench.root, uri)
    apply_records(bench.root, uri)
