"""Reading an experiment: one YAML file, the files it extends, ``--set``, and what is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tessera.errors import InputError
from tessera.experiment.kinds import ADAPTER, Experiment, upwards
from tessera.experiment.sections import BooleanError, KeyedError


def load_experiment(
    path: str | Path, overrides: Sequence[str] = (), budget: tuple[float, str] | None = None
) -> Experiment:
    """Read, extend, override and validate one experiment file.

    ``overrides`` are ``a.b=c`` strings whose right side is YAML; ``budget`` is a ``budget_usd``
    and who gave it (an option, a variable), which counts before both. Raises ``InputError`` with
    a sentence that names the key and the file (or the ``--set``) it came from.
    """
    path = Path(path)
    origins: dict[str, str] = {}
    data = _read(path, origins, ())
    _require_experiment(path, data)
    for override in overrides:
        _apply(data, override, origins)
    if budget is not None:
        if data.get("kind") == "sft":
            raise InputError(
                f"{budget[1]}: a budget ends a pretraining, and {path} is a fine-tuning, which its "
                "epochs end; leave the budget out."
            )
        _merge(data, {"budget_usd": budget[0]}, budget[1], "", origins)
    _resolve_paths(data, origins)
    try:
        experiment = ADAPTER.validate_python(data)
    except ValidationError as error:
        raise InputError(_sentence(error, path, origins)) from error
    experiment._origins = origins
    return experiment


_OTHERS = {
    "probes": "the suite of an interview (`tessera interview`)",
    "sources": "the recipe of a corpus (`tessera corpus build`)",
    "resources": "a task of SkyPilot (`sky launch`)",
}


def _require_experiment(path: Path, data: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for one of the other YAML files that lie beside experiments."""
    what = next((text for key, text in _OTHERS.items() if key in data), None)
    if what is not None and "kind" not in data:
        raise InputError(
            f"{path} is {what} and no experiment; give one such as experiments/smoke.yaml."
        )


def _read(path: Path, origins: dict[str, str], chain: tuple[Path, ...]) -> dict[str, Any]:
    """One file laid over the one it extends; ``origins`` learns which file set which key."""
    resolved = path.resolve()
    if resolved in chain:
        raise InputError(f"{path} extends itself through {chain[-1].name}; remove one `extends:`.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if chain:
            text = f"{chain[-1]}: extends names {path}, which does not exist; correct the path."
            raise InputError(text) from None
        raise InputError(
            f"{path} does not exist; give the path of an experiment file such as "
            "experiments/smoke.yaml."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected a UTF-8 YAML file.") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(f"{path}{line}: {problem}; correct the YAML.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}, expected keys and values.")
    parent = data.pop("extends", None)
    merged: dict[str, Any] = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise InputError(f"{path}: extends is not a path; give the file that it builds on.")
        merged = _read(path.parent / parent, origins, (*chain, resolved))
    _merge(merged, data, str(path), "", origins)
    return merged


def _merge(
    into: dict[str, Any], data: Mapping[str, Any], origin: str, prefix: str, origins: dict[str, str]
) -> None:
    """Lay ``data`` over ``into``; a section whose ``name`` changes is replaced, not mixed."""
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        origins.pop(dotted, None)
        origins[dotted] = origin  # now the last: the order is that of laying on
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if "name" in value and value["name"] != old.get("name"):
                for gone in [known for known in origins if known.startswith(f"{dotted}.")]:
                    del origins[gone]
                old = {}
            fresh = dict(old)
            _merge(fresh, value, origin, f"{dotted}.", origins)
            into[key] = fresh
        else:
            if isinstance(value, dict):
                _merge({}, value, origin, f"{dotted}.", origins)
            into[key] = value


def _apply(data: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override!r} is not of the form key.part=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {key}: the value is not valid YAML; quote it.") from error
    nested: Any = value
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    _merge(data, nested, f"--set {override}", "", origins)


def _resolve_paths(data: dict[str, Any], origins: Mapping[str, str]) -> None:
    """Paths are relative to the file that names them; those of ``--set`` to where one stands."""
    section = data.get("data")
    names = section.get("conversations") if isinstance(section, dict) else None
    origin = origins.get("data.conversations", "--set")
    if isinstance(section, dict) and isinstance(names, list) and not origin.startswith("--set"):
        folder = os.path.dirname(origin)
        section["conversations"] = [
            os.path.normpath(os.path.join(folder, n)) if isinstance(n, str) else n for n in names
        ]


def _sentence(error: ValidationError, path: Path, origins: Mapping[str, str]) -> str:
    """The first finding as one sentence with its key, its file and what would be right."""
    finding = error.errors(include_url=False)[0]
    parts = [str(part) for part in finding["loc"]][1:]  # the first is the kind
    if parts[:1] == ["schedule"]:
        del parts[1:2]  # its name
    key = ".".join(parts)
    cause = finding.get("ctx", {}).get("error")
    if isinstance(cause, KeyedError):
        key = cause.blamed(origins)
    elif isinstance(cause, BooleanError):
        key = ".".join([*parts, cause.key])
    kind, given = finding["type"], finding.get("input")
    if kind.startswith("union_tag"):
        tag = str(finding.get("ctx", {}).get("discriminator", "kind")).strip("'")
        key = f"{key}.{tag}" if key else tag
    origin = next((origins[k] for k in upwards(key) if k in origins), str(path))
    more = f" ({error.error_count() - 1} more after this one)" if error.error_count() > 1 else ""
    if kind == "extra_forbidden":
        return f"{origin}: {key} is not a known key; correct its spelling or remove it{more}."
    if kind in {"missing", "union_tag_not_found"}:
        return f"{origin}: {key} is missing; add it{more}."
    if kind == "union_tag_invalid":
        return f"{origin}: {key} must be one of {finding['ctx']['expected_tags']}{more}."
    text = finding["msg"].removeprefix("Value error, ").rstrip(".")
    if kind in {"model_type", "model_attributes_type"}:
        text = "expected a section of keys and values"
    shown = "" if isinstance(given, dict | BaseModel) or cause else f", not {given!r}"
    return f"{origin}: {key}: {text[:1].lower()}{text[1:]}{shown}{more}."
