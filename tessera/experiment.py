"""One YAML file becomes one frozen, validated experiment.

``load_experiment(path, overrides)`` reads the file, lays it over the file it ``extends``, applies
``--set a.b=c`` and validates. Whatever is wrong is one ``InputError`` sentence that names the key
and the file it came from, before anything is paid for.

Settings that cannot change the loss (price, paths, how often to evaluate or save, how many
sequences fit on the card at once) are marked ``free``. All others enter ``identity``, of which a
run's id is a hash, and a resumed run refuses a change in any of them by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tessera.errors import InputError

NAME_PATTERN = r"^[a-z0-9][a-z0-9_.-]{0,62}$"


def free(default: Any = ..., **constraints: Any) -> Any:
    """A field that cannot change the loss, so it is not part of a run's identity."""
    return Field(default, json_schema_extra={"free": True}, **constraints)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, data: Any) -> Any:
        """YAML reads `yes` as true, and true would pass as 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, bool) and key != "compile":
                raise ValueError(f"{str(value).lower()} is no value for {key}")
        return data


class Model(_Section):
    """The network. See ``tessera.model.shape.ModelShape`` for what each size means."""

    layers: int = Field(gt=0)
    d_model: int = Field(gt=0)
    heads: int = Field(gt=0)
    context: int = Field(gt=1)
    vocab_size: int = Field(gt=1, le=65_536)
    mlp_ratio: int = Field(default=4, gt=0)
    gelu: Literal["exact", "tanh"] = "tanh"
    norm_eps: float = Field(default=1e-6, gt=0)
    init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        if self.d_model % self.heads:
            raise _KeyedError(
                f"d_model {self.d_model} is not a multiple of heads {self.heads}; choose heads "
                "that divide it",
                "model.heads", "model.d_model",
            )  # fmt: skip
        return self


class CorpusData(_Section):
    """Which token shards a pretraining reads."""

    corpus: str = Field(pattern=NAME_PATTERN)
    fingerprint: str | None = free(None)  # chooses a build; its whole fingerprint names the run
    sequence: int | None = Field(default=None, gt=0)


class ConversationData(_Section):
    """Which conversations a fine-tuning learns from; paths are relative to the experiment file."""

    conversations: tuple[str, ...] = free(min_length=1)  # their contents are in the fingerprint
    holdout: float = Field(default=0.1, gt=0, lt=1)


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(_Section):
    """AdamW (Loshchilov & Hutter 2019) and gradient clipping by global norm."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)


class Cosine(_Section):
    """Linear warm-up to ``optimizer.lr``, then half a cosine down to ``final_lr``."""

    name: Literal["cosine"]
    warmup_steps: int = Field(ge=0)
    final_lr: float = Field(ge=0)


class LinearDecay(_Section):
    """Linear warm-up, constant, then straight to ``final_lr`` over the last share of steps."""

    name: Literal["linear_decay"]
    warmup_steps: int = Field(ge=0)
    final_lr: float = Field(default=0.0, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)


Schedule = Annotated[Cosine | LinearDecay, Field(discriminator="name")]


class TokenBatch(_Section):
    """Tokens of one optimiser step, and sequences that go through the model at once."""

    tokens_per_step: int = Field(gt=0)
    micro_batch: int = free(gt=0)


class ConversationBatch(_Section):
    """Conversations of one optimiser step, and conversations that go through the model at once."""

    conversations_per_step: int = Field(gt=0)
    micro_batch: int = free(gt=0)


class Lora(_Section):
    """Low-rank adapter: rank, alpha, and which linears of every block carry it."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0)
    targets: tuple[Literal["attn.qkv", "attn.out", "mlp.up", "mlp.down"], ...] = Field(
        default=("attn.qkv", "attn.out", "mlp.up", "mlp.down"), min_length=1
    )


class Evaluation(_Section):
    """The frozen evaluation: how often, and how many tokens of the split at most."""

    every_steps: int = free(gt=0)
    tokens: int = Field(default=262_144, gt=0)


class Checkpoint(_Section):
    """How often the whole training state is published, and how many of them are kept."""

    every_steps: int = free(gt=0)
    keep: int = free(2, gt=0)


class Price(_Section):
    """What the machine costs when neither the provider nor TESSERA_USD_PER_HOUR says."""

    usd_per_hour: float = free(ge=0)
    note: str = free("")


class _Common(_Section):
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    name: str = Field(pattern=NAME_PATTERN, json_schema_extra={"free": True})
    description: str = free("")
    seed: int = Field(ge=0, lt=2**63)
    optimizer: Optimizer
    schedule: Schedule
    precision: Literal["auto", "bf16", "float32"] = "auto"
    compile: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(lambda v: ("off", "on")[v] if isinstance(v, bool) else v),
    ] = free("auto")  # a bare `on` or `off` is a boolean in YAML
    checkpoint: Checkpoint
    log_every_steps: int = free(10, gt=0)
    price: Price | None = free(None)

    def __eq__(self, other: object) -> bool:
        # Where a setting was written (`_origins`) is no part of what it says.
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((self.name, self.seed))

    def origin(self, key: str) -> str:
        """The file or ``--set`` that ``key`` came from, to begin a sentence about it."""
        known = (self._origins[k] for k in _upwards(key) if k in self._origins)
        return next(known, f"experiment {self.name}")

    @property
    def identity(self) -> dict[str, Any]:
        """Every loss-affecting setting, as JSON values under dotted keys."""
        return dict(_loss_affecting(self))


class Pretrain(_Common):
    """A base model from random weights over one corpus."""

    kind: Literal["pretrain"]
    model: Model
    data: CorpusData
    batch: TokenBatch
    tokens: int = Field(gt=0)
    evaluation: Evaluation

    @property
    def sequence(self) -> int:
        """Tokens of one sample (T): ``data.sequence``, else the whole position table."""
        return self.data.sequence or self.model.context

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.tokens // self.batch.tokens_per_step

    @model_validator(mode="after")
    def _sizes_agree(self) -> Pretrain:
        if self.sequence > self.model.context:
            raise _KeyedError(
                f"{self.sequence} tokens do not fit the position table of model.context "
                f"{self.model.context}; shorten the sequence or lengthen the context",
                "data.sequence", "model.context",
            )  # fmt: skip
        per_step, micro = self.batch.tokens_per_step, self.batch.micro_batch
        if per_step % (self.sequence * micro):
            raise _KeyedError(
                f"tokens_per_step {per_step:,} is not a multiple of micro_batch {micro} x sequence "
                f"{self.sequence} = {micro * self.sequence:,}; change one of the three so that it "
                "divides",
                "batch.tokens_per_step", "batch.micro_batch", "data.sequence", "model.context",
            )  # fmt: skip
        if self.tokens % per_step:
            raise _KeyedError(
                f"{self.tokens:,} tokens are not a whole number of steps of {per_step:,}; the "
                f"nearest that is: {max(1, round(self.tokens / per_step)) * per_step:,}",
                "tokens", "batch.tokens_per_step",
            )  # fmt: skip
        return self


class Sft(_Common):
    """A LoRA adapter on the base model of another run, from conversations."""

    kind: Literal["sft"]
    base: str = free(min_length=1)  # the weights digest it resolves to is in the identity
    data: ConversationData
    batch: ConversationBatch
    epochs: int = Field(gt=0)
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _sizes_agree(self) -> Sft:
        per_step, micro = self.batch.conversations_per_step, self.batch.micro_batch
        if per_step % micro:
            raise _KeyedError(
                f"conversations_per_step {per_step} is not a multiple of micro_batch {micro}; "
                "change one of the two",
                "batch.conversations_per_step", "batch.micro_batch",
            )  # fmt: skip
        return self


Experiment: TypeAlias = Pretrain | Sft
_ADAPTER: TypeAdapter[Pretrain | Sft] = TypeAdapter(
    Annotated[Pretrain | Sft, Field(discriminator="kind")]
)


class _KeyedError(ValueError):
    """A finding about several keys that do not fit each other, the likeliest culprit first."""

    def __init__(self, text: str, *keys: str) -> None:
        super().__init__(text)
        self.keys = keys

    def blamed(self, origins: Mapping[str, str]) -> str:
        """The first key of what was laid on last: that is where the others stopped fitting."""
        latest = list(dict.fromkeys(reversed(list(origins.values()))))
        known = [key for key in self.keys if key in origins]
        return min(known, key=lambda key: latest.index(origins[key]), default=self.keys[0])


def _loss_affecting(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in type(section).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _loss_affecting(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


# -- reading
# -----------------------------------------------------------------------------------------


def parse_experiment(data: Mapping[str, Any]) -> Experiment:
    """Validate what ``dump`` wrote (a record of the root, not a person's file)."""
    return _ADAPTER.validate_python(dict(data))


def dump(experiment: Experiment) -> dict[str, Any]:
    """All settings as JSON values, defaults included."""
    return experiment.model_dump(mode="json")


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, extend, override and validate one experiment file.

    ``overrides`` are ``a.b=c`` strings whose right side is YAML. Raises ``InputError`` with a
    sentence that names the key and the file (or the ``--set``) it came from.
    """
    path = Path(path)
    origins: dict[str, str] = {}
    data = _read(path, origins, ())
    for override in overrides:
        _apply(data, override, origins)
    _resolve_paths(data, origins)
    try:
        experiment = _ADAPTER.validate_python(data)
    except ValidationError as error:
        raise InputError(_sentence(error, path, origins)) from error
    experiment._origins = origins
    return experiment


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
    if isinstance(cause, _KeyedError):
        key = cause.blamed(origins)
    kind, given = finding["type"], finding.get("input")
    if kind.startswith("union_tag"):
        tag = str(finding.get("ctx", {}).get("discriminator", "kind")).strip("'")
        key = f"{key}.{tag}" if key else tag
    origin = next((origins[k] for k in _upwards(key) if k in origins), str(path))
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


def _upwards(key: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``: where a key, or the section that should hold it, was written."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])
