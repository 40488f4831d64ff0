"""The two kinds of experiment, pretraining and fine-tuning, and what identifies a run of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, TypeAdapter, model_validator

from tessera.experiment.sections import (
    NAME_PATTERN,
    Checkpoint,
    ConversationBatch,
    ConversationData,
    CorpusData,
    Cosine,
    Evaluation,
    Float8,
    KeyedError,
    Lora,
    Model,
    Optimizer,
    Preemption,
    Price,
    Schedule,
    Section,
    Stability,
    TokenBatch,
    added,
    free,
)

FLOAT8_MULTIPLE = 16
"""What a GPU's float8 products want every side of a matrix to be a multiple of."""


class _Common(Section):
    """What both kinds have.

    ``deterministic`` asks for kernels whose sums have a fixed order; ``recompute`` computes the
    activations of every block again in the backward pass instead of keeping them; ``parallel``
    says how several GPUs share the work.
    """

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
    deterministic: bool = free(False)
    recompute: bool = free(False)
    parallel: Literal["auto", "ddp", "fsdp"] = free("auto")
    checkpoint: Checkpoint
    preemption: Preemption = Preemption()
    stability: Stability = Stability()
    log_every_steps: int = free(10, gt=0)
    price: Price | None = free(None)

    def __eq__(self, other: object) -> bool:
        # Where a setting was written (`_origins`) is no part of what it says.
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((self.name, self.seed))

    def origin(self, key: str) -> str:
        """The file or ``--set`` that ``key`` came from, to begin a sentence about it."""
        known = (self._origins[k] for k in upwards(key) if k in self._origins)
        return next(known, f"experiment {self.name}")

    @property
    def identity(self) -> dict[str, Any]:
        """Every loss-affecting setting, as JSON values under dotted keys."""
        return dict(_loss_affecting(self))


class Pretrain(_Common):
    """A base model from random weights over one corpus.

    ``tokens`` or ``budget_usd`` ends the run, whichever comes first; a run keeps the budget that it
    was started with, wherever that was written (``tessera.runs.create_or_open``).
    ``budget_reserve_usd`` is what is kept back of it (docs/budget.md).
    ``kernels`` says who computes a step: our fused operations, or torch under autograd; they round
    sums differently, so it is as free as ``compile``. With precision ``fp8`` the blocks' matrix
    products take float8 operands, which only the fused operations do; ``float8`` says how.
    ``attention`` names the library that computes it in the fused operations; ``auto`` is the best
    that is there.
    """

    kind: Literal["pretrain"]
    precision: Literal["auto", "bf16", "float32", "fp8"] = "auto"  # type: ignore[assignment]
    kernels: Literal["auto", "fused", "torch"] = free("auto")
    attention: Literal["auto", "flash4", "cudnn", "flash", "math"] = free("auto")
    float8: Float8 | None = added(None, before=None)
    model: Model
    data: CorpusData
    batch: TokenBatch
    tokens: int | None = Field(default=None, gt=0)
    budget_usd: float | None = free(None, gt=0)
    budget_reserve_usd: float | None = free(None, gt=0)
    evaluation: Evaluation

    @property
    def sequence(self) -> int:
        """Tokens of one sample (T): ``data.sequence``, else the whole position table."""
        return self.data.sequence or self.model.context

    @property
    def steps(self) -> int | None:
        """Optimiser steps of the whole run; None where only a budget ends it."""
        return None if self.tokens is None else self.tokens // self.batch.tokens_per_step

    @property
    def kept_in_bf16(self) -> int:
        """Blocks that ``float8`` leaves in bf16."""
        return self.float8.keep_first + self.float8.keep_last if self.float8 else 0

    @model_validator(mode="after")
    def _float8_fits(self) -> Pretrain:
        if self.float8 and self.precision != "fp8":
            raise KeyedError(
                f"it says how precision fp8 multiplies, and precision is {self.precision}; set "
                "precision: fp8, or float8: null",
                "float8", "precision",
            )  # fmt: skip
        if self.kept_in_bf16 >= self.model.layers:
            raise KeyedError(
                f"no block of {self.model.layers} is left in float8 where {self.kept_in_bf16} stay "
                "in bf16; keep fewer, or set precision: bf16",
                "float8.keep_first", "float8.keep_last", "model.layers",
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _kernels_agree(self) -> Pretrain:
        unfit = "deterministic" if self.deterministic else None
        unfit = "kernels" if self.kernels == "torch" else unfit
        if self.precision == "fp8" and unfit:
            value = "true" if unfit == "deterministic" else "torch"
            raise KeyedError(
                f"precision fp8 needs the fused operations, which {unfit}: {value} rules out; "
                "change one of the two",
                unfit, "precision",
            )  # fmt: skip
        if self.attention != "auto" and self.precision != "fp8" and self.kernels != "fused":
            raise KeyedError(
                f"attention {self.attention} is chosen for the fused operations; set kernels: "
                "fused too, or leave attention at auto",
                "attention", "kernels",
            )  # fmt: skip
        sides = {"model.d_model": self.model.d_model, "data.sequence": self.sequence}
        for key, size in sides.items():
            if self.precision == "fp8" and size % FLOAT8_MULTIPLE:
                raise KeyedError(
                    f"precision fp8 multiplies matrices whose sides are multiples of "
                    f"{FLOAT8_MULTIPLE}, and {size} is none; change it, or the precision",
                    key, "precision",
                )  # fmt: skip
        if self.kernels == "fused" and self.deterministic:
            raise KeyedError(
                "the fused operations add up in no fixed order on a GPU; set kernels: torch, or "
                "deterministic: false",
                "kernels", "deterministic",
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _budget_agrees(self) -> Pretrain:
        budget, reserve = self.budget_usd, self.budget_reserve_usd
        if isinstance(self.schedule, Cosine) and budget is not None:
            raise KeyedError(
                "a cosine has to know its last step, which a budget moves; set schedule to "
                "{name: linear_decay, warmup_steps: ...}, or leave the budget out",
                "budget_usd", "schedule.name",
            )  # fmt: skip
        if isinstance(self.schedule, Cosine) and self.tokens is None:
            raise KeyedError("a cosine needs the tokens of the whole run; give them", "tokens")
        if budget is not None and reserve is not None and reserve >= budget:
            raise KeyedError(
                f"a reserve of ${reserve:g} leaves nothing of a budget of ${budget:g}; lower it, "
                "or raise the budget",
                "budget_reserve_usd", "budget_usd",
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _sizes_agree(self) -> Pretrain:
        if self.sequence > self.model.context:
            raise KeyedError(
                f"{self.sequence} tokens do not fit the position table of model.context "
                f"{self.model.context}; shorten the sequence or lengthen the context",
                "data.sequence", "model.context",
            )  # fmt: skip
        per_step, micro = self.batch.tokens_per_step, self.batch.micro_batch
        if micro == "auto" and per_step % self.sequence:
            raise KeyedError(
                f"tokens_per_step {per_step:,} is not a multiple of sequence {self.sequence}; "
                "change one of the two so that it divides",
                "batch.tokens_per_step", "data.sequence", "model.context",
            )  # fmt: skip
        if micro != "auto" and per_step % (self.sequence * micro):
            raise KeyedError(
                f"tokens_per_step {per_step:,} is not a multiple of micro_batch {micro} x sequence "
                f"{self.sequence} = {micro * self.sequence:,}; change one of the three so that it "
                "divides",
                "batch.tokens_per_step", "batch.micro_batch", "data.sequence", "model.context",
            )  # fmt: skip
        if self.tokens is not None and self.tokens % per_step:
            raise KeyedError(
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
        if micro != "auto" and per_step % micro:
            raise KeyedError(
                f"conversations_per_step {per_step} is not a multiple of micro_batch {micro}; "
                "change one of the two",
                "batch.conversations_per_step", "batch.micro_batch",
            )  # fmt: skip
        return self


Experiment: TypeAlias = Pretrain | Sft
ADAPTER: TypeAdapter[Pretrain | Sft] = TypeAdapter(
    Annotated[Pretrain | Sft, Field(discriminator="kind")]
)


def parse_experiment(data: Mapping[str, Any]) -> Experiment:
    """Validate what ``dump`` wrote (a record of the root, not a person's file)."""
    return ADAPTER.validate_python(dict(data))


def dump(experiment: Experiment) -> dict[str, Any]:
    """All settings as JSON values, defaults included."""
    return experiment.model_dump(mode="json")


def _loss_affecting(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in type(section).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            continue
        value = getattr(section, name)
        if isinstance(extra, dict) and "before" in extra and value == extra["before"]:
            continue
        if isinstance(value, BaseModel):
            yield from _loss_affecting(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def upwards(key: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``: where a key, or the section that should hold it, was written."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])
