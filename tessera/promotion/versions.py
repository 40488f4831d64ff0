"""MLflow's registry, brought up to the promotion records: one version each, aliases last.

Everything here can be repeated: a version is found by the number of its record before it is made,
and so is a model that was stored just before a crash.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.errors import DamagedError, InputError
from tessera.promotion.gate import Weights
from tessera.promotion.records import MODEL_NAME, Promotion, holders, read_promotions
from tessera.runs import Run, open_run, read_text
from tessera.storage import Root
from tessera.tracking.replay import known_runs
from tessera.tracking.server import Server, as_default, connect, quiet, sentences

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

ALIASES_TAG = "tessera.aliases"
RECORD_TAG = "tessera.promotion"
MODEL_TYPE = "tessera-lora-adapter"


def fetch_adapter(run: Run, adapter: str, folder: Path) -> Weights:
    """Download an adapter to ``folder`` and measure its digest, rather than believe its sidecar.

    Raises ``InputError`` for an adapter that the run does not have and ``StoreError`` for one whose
    tensors are not the ones that its sidecar names.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tessera.model.digest import weights_digest

    names = run.root.children(run.path("adapters"))
    if adapter not in names:
        raise InputError(
            f"Run {run.id} has no adapter {adapter!r}; it has: {', '.join(names) or 'none yet'}."
        )
    for path in run.root.files(run.path("adapters", adapter)):
        run.root.get_file(path, folder / path.rsplit("/", 1)[-1])
    base = read_text(run.root, run.path("adapters", adapter, "base.json"), "weights_digest")
    said = read_text(run.root, run.path("adapters", adapter, "weights.json"), "weights_digest")
    try:
        found = weights_digest(load_file(folder / "adapter_model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"Adapter {adapter} of run {run.id} is damaged ({error}).") from error
    if found != said:
        raise DamagedError(
            f"Adapter {adapter} of run {run.id} has weights digest {found[:12]}, its weights.json "
            f"says {said[:12]}; it is damaged: restore it from a backup."
        )
    return Weights(base, found)


def apply_records(
    root: Root, tracking_uri: str | None = None, told: list[str] | None = None
) -> int:
    """Bring MLflow's registry up to the records; returns how many versions were added.

    Idempotent, and the same versions and aliases come out of an empty MLflow. An alias that was
    moved in MLflow by hand is moved back, or left alone where no record names it; ``told`` is given
    a sentence about each. Raises ``StoreError`` as ``sync`` does, and for an adapter that is no
    longer the one that was promoted.
    """
    told = [] if told is None else told
    promotions = read_promotions(root)
    if not promotions:
        return 0
    server = connect(root, tracking_uri)
    added = 0
    with quiet(), sentences(server.uri), as_default(server.uri):
        _ensure_model(server)
        versions = _versions(server)
        missing = [p for p in promotions if _number(p) not in versions]
        runs = known_runs(server) if missing else {}
        for promotion in missing:
            found = runs.get(promotion.run_id)
            _register(server, root, promotion, found[0].info.run_id if found else None)
            added += 1
        versions = _versions(server) if added else versions
        wanted = {
            alias: str(versions[_number(promotion)].version)
            for alias, promotion in holders(promotions).items()
        }
        _apply_aliases(server, wanted, told)
    return added


def _apply_aliases(server: Server, wanted: dict[str, str], told: list[str]) -> None:
    """Give each alias to its version; the tag ``tessera.aliases`` has what was given last."""
    model = server.client.get_registered_model(MODEL_NAME)
    there = {alias: str(version) for alias, version in dict(model.aliases).items()}
    try:
        given = json.loads(model.tags.get(ALIASES_TAG, "{}"))
    except ValueError:
        given = {}
    for alias, version in wanted.items():
        if (before := given.get(alias)) is not None and there.get(alias) != before:
            now = f"to version {there[alias]}" if alias in there else "away"
            told.append(
                f"Alias {alias} was moved {now} in MLflow, which no record says; it is back at "
                f"version {version}: use `tessera-exp promote` to move it."
            )
        if there.get(alias) != version:
            server.client.set_registered_model_alias(MODEL_NAME, alias, version)
    told += [
        f"Alias {alias} (version {there[alias]}) was given in MLflow, and no record names it; a "
        "rebuilt MLflow will not have it: use `tessera-exp promote` to give it."
        for alias in sorted(there.keys() - wanted.keys())
    ]
    if given != wanted:
        text = json.dumps(wanted, sort_keys=True)
        server.client.set_registered_model_tag(MODEL_NAME, ALIASES_TAG, text)


def _number(promotion: Promotion) -> str:
    return f"{promotion.number:06d}"


def _ensure_model(server: Server) -> None:
    from mlflow.exceptions import MlflowException

    try:
        server.client.get_registered_model(MODEL_NAME)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        server.client.create_registered_model(
            MODEL_NAME,
            description="Promoted adapters of Tessera, one version a record of the root.",
        )


def _versions(server: Server) -> dict[str, ModelVersion]:
    """Versions by the number of their record; of two for one record the older stays."""
    found: dict[str, ModelVersion] = {}
    listed: list[ModelVersion] = []
    token = None
    while True:
        page = server.client.search_model_versions(f"name='{MODEL_NAME}'", page_token=token)
        listed += page
        token = page.token
        if not token:
            break
    for version in sorted(listed, key=lambda v: int(v.version)):
        if not (number := version.tags.get(RECORD_TAG)):
            continue
        if number in found:  # two syncs at once both applied it
            server.client.delete_model_version(MODEL_NAME, str(version.version))
        else:
            found[number] = version
    return found


def _register(server: Server, root: Root, promotion: Promotion, run_id: str | None) -> None:
    """Store the adapter as a model of its run and make a version of it."""
    logged = _stored(server, promotion) or _store(server, root, promotion, run_id)
    server.client.create_model_version(
        MODEL_NAME,
        source=logged.model_uri,
        run_id=run_id,
        tags=_tags(promotion),
        model_id=logged.model_id,
    )


def _stored(server: Server, promotion: Promotion) -> LoggedModel | None:
    """A model that was stored whole before something died."""
    found = server.client.search_logged_models(
        [server.experiment_id], filter_string=f"tags.`{RECORD_TAG}` = '{_number(promotion)}'"
    )
    return next((model for model in found if str(model.status) == "READY"), None)


def _store(server: Server, root: Root, promotion: Promotion, run_id: str | None) -> LoggedModel:
    import mlflow
    from mlflow.models import Model

    client = server.client
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "adapter")
        folder.mkdir()
        weights = fetch_adapter(open_run(root, promotion.run_id), promotion.adapter, folder)
        if weights.adapter_digest != promotion.adapter_digest:
            raise DamagedError(
                f"Adapter {promotion.who} was promoted with weights "
                f"{promotion.adapter_digest[:12]} and has {weights.adapter_digest[:12]} now; "
                "restore it from a backup."
            )
        logged = client.create_logged_model(
            server.experiment_id,
            name=MODEL_NAME,
            source_run_id=run_id,
            tags=_tags(promotion),
            params={"root": root.url},
            model_type=MODEL_TYPE,
        )
        local = Path(temporary, "model")
        mlflow.pyfunc.save_model(
            path=str(local),
            python_model=str(Path(__file__).with_name("adapter_model.py")),
            artifacts={"adapter": str(folder)},
            model_config={"root": root.url},
            signature=_signature(),
            # Given, because MLflow would otherwise start a process to guess them.
            pip_requirements=["tessera[tracking]"],
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            ),
        )
        client.log_model_artifacts(logged.model_id, str(local))
    return client.finalize_logged_model(logged.model_id, "READY")


def _signature() -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    # No schema for inputs: MLflow would then refuse either a list or a table (tried with 3.17).
    return ModelSignature(
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema(
            [
                ParamSpec("seed", "long", None),
                ParamSpec("max_new_tokens", "long", 64),
                ParamSpec("temperature", "double", 0.7),
                ParamSpec("top_p", "double", 0.9),
            ]
        ),
    )


def _tags(promotion: Promotion) -> dict[str, str]:
    found = {
        RECORD_TAG: _number(promotion),
        "promoted_at": promotion.promoted_at,
        "promoted_by": promotion.promoted_by,
        "previous_champion": promotion.previous,
        "tessera.run_id": promotion.run_id,
        "tessera.adapter": promotion.adapter,
        "tessera.adapter_digest": promotion.adapter_digest,
        "tessera.base_digest": promotion.base_digest,
        "tessera.record": promotion.path,
        "tessera.score": None if promotion.score is None else f"{promotion.score:.4f}",
        "tessera.refusals": "; ".join(promotion.refusals)[:8000],
        "tessera.override": promotion.override,
    }
    return {key: value for key, value in found.items() if value}
