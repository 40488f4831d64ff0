"""What MLflow shows of a run beside its curves: params, tags and one-point final figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tessera.runs import RunRecord
from tessera.tracking.history import RunHistory
from tessera.tracking.interviews import INTERVIEW, best_interview
from tessera.tracking.queries import RunSummary

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

OURS = "tessera."
NOTE = "mlflow.note.content"
RUN_ID, SYNCED, LIVE = "tessera.run_id", "tessera.synced", "tessera.live"
REPLACED = "tessera.replaced"
"""On a run that sync itself deleted: a spare of two that were made at once, or one made again."""
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000

MODEL, ADAPTER = "model/published", "adapter/saved"
"""The journal's events: the run's model, or an adapter of it, is whole in the root."""
_FINAL_STATUSES = frozenset({"finished", "budget", "diverged", "failed"})


def params(record: RunRecord) -> dict[str, str]:
    """Every setting of the experiment under its dotted key; what never changes within a run."""
    flat = dict(_flatten(record.experiment))
    flat |= {"fingerprint": record.fingerprint}
    if record.base:
        flat |= {f"base.{key}": str(value) for key, value in record.base.items()}
    return {key: value[:PARAM_CHARACTERS] for key, value in flat.items()}


def _flatten(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def tags(history: RunHistory, summary: RunSummary) -> dict[str, str]:
    """What may differ between attempts or still change, as text; the latest attempt counts."""
    record = history.run.record
    found: dict[str, object] = {
        RUN_ID: record.run_id,
        "tessera.name": record.name,
        "tessera.kind": record.kind,
        "tessera.status": summary.status,
        "tessera.fingerprint": record.fingerprint,
        "tessera.root": history.run.root.url,
        "tessera.attempts": summary.attempts,
        "tessera.price_source": ", ".join(summary.price_sources),
        "tessera.cost_usd": None if summary.cost_usd is None else f"{summary.cost_usd:.6f}",
        "tessera.cost_estimated": str(summary.cost_estimated).lower(),
        "tessera.traffic_usd": f"{summary.traffic_usd:.6f}" if summary.traffic_bytes else None,
        "tessera.traffic_bytes": summary.traffic_bytes or None,
        "tessera.base": summary.base,
        "mlflow.source.git.commit": record.commit,
        "tessera.commit": record.commit,
        LIVE: _live(history, summary),
        INTERVIEW: best_interview(history),
    }
    if record.data:
        found["tessera.data"] = json.dumps(record.data, ensure_ascii=False)
    if history.attempts:
        latest = history.attempts[-1].attempt
        found |= {
            "tessera.attempt": latest.id,
            "tessera.gpu": f"{latest.devices} x {latest.device}",
            "tessera.provider": latest.provider,
            "tessera.instance": latest.instance,
            "tessera.host": latest.host,
            "tessera.usd_per_hour": latest.usd_per_hour,
            "tessera.usd_per_gb_up": latest.usd_per_gb_up or None,
        }
    for event in history.kept("event"):
        if event.key == MODEL and isinstance(event.value, dict):
            found["tessera.weights_digest"] = event.value.get("weights_digest")
            found["tessera.model"] = _link(history, "model")
        if event.key == ADAPTER and isinstance(event.value, dict):
            name = event.value.get("name")
            found[f"tessera.adapter.{name}"] = event.value.get("weights_digest")
            found[f"tessera.adapter.{name}.url"] = _link(history, "adapters", str(name))
    if (checkpoint := history.run.furthest()) is not None:
        found["tessera.checkpoint"] = _link(history, checkpoint.folder)
    for tag in history.kept("tag"):
        found[f"tessera.tag.{tag.key}"] = tag.value
    return {
        key: str(value)[:TAG_CHARACTERS] for key, value in found.items() if value not in (None, "")
    }


def _link(history: RunHistory, *parts: str) -> str:
    """Where something of the run lies; it stays there."""
    return f"{history.run.root.url}/{history.run.path(*parts)}"


def _live(history: RunHistory, summary: RunSummary) -> str | None:
    if (live := history.live) is None or summary.live_step is None:
        return None
    at = datetime.fromtimestamp(live.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    loss = "" if summary.live_loss is None else f", train/loss {summary.live_loss:.4f}"
    return f"step {live.step}{loss} at {at}, not yet covered by a checkpoint"


def finals(summary: RunSummary) -> dict[str, float]:
    """The figures that runs are compared by, once the run has said how it ended.

    Losses in nats a token, dollars (those of traffic once more by themselves, where bytes went to
    the root), seconds, dollars per million tokens. A run that was preempted
    or killed will go on, so its figures stay in the tags.
    """
    if summary.status not in _FINAL_STATUSES:
        return {}
    found = {
        "final/loss": summary.final_loss,
        "best/loss": summary.best_loss,
        "final/cost_usd": summary.cost_usd,
        "final/wall_s": summary.wall_s,
        "final/usd_per_mtok": summary.usd_per_mtok,
        "final/tokens_per_s": summary.tokens_per_s,
    }
    if summary.traffic_bytes:
        found |= {
            "final/traffic_usd": summary.traffic_usd,
            "final/traffic_bytes": float(summary.traffic_bytes),
        }
    return {key: value for key, value in found.items() if value is not None}


def dataset_input(history: RunHistory) -> DatasetInput | None:
    """The corpus manifest as MLflow's dataset; None where the root has none of that name.

    The fingerprint is in the tags in any case.
    """
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    record, root = history.run.record, history.run.root
    path = record.data.get("manifest")
    if not isinstance(path, str) or not root.exists(path):
        return None
    name = str(record.experiment.get("data", {}).get("corpus") or record.name)
    try:
        source = resolve_dataset_source(f"{root.url}/{path}")
        # A digest has at most 36 characters. MLflow declares `profile` abstract and then uses the
        # class without it.
        digest = record.fingerprint[:32]
        dataset = MetaDataset(source, name=name, digest=digest)  # type: ignore[abstract]
        entity = dataset._to_mlflow_entity()
    except (MlflowException, ImportError):
        return None  # MLflow does not know the root's kind of URL
    return DatasetInput(entity, [InputTag("mlflow.data.context", record.kind)])
