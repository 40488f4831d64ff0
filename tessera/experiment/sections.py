"""The sections of an experiment, each frozen and closed to unknown keys.

A field made with ``free`` cannot change the loss and so is no part of a run's identity; every
other one is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[a-z0-9][a-z0-9_.-]{0,62}$"


def free(default: Any = ..., **constraints: Any) -> Any:
    """A field that cannot change the loss, so it is not part of a run's identity."""
    return Field(default, json_schema_extra={"free": True}, **constraints)


def added(default: Any, *, before: Any, **constraints: Any) -> Any:
    """A loss-affecting field that came when runs existed already.

    At ``before``, which is what all of them did, it is no part of a run's identity, so that theirs
    stay what they are, whatever its default becomes.
    """
    return Field(default, json_schema_extra={"before": before}, **constraints)


_SWITCHES = frozenset({"compile", "deterministic", "recompute"})
"""The keys whose value may be what YAML reads as a boolean."""


class Section(BaseModel):
    """What all sections have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, data: Any) -> Any:
        """YAML reads `yes` as true, and true would pass as 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, bool) and key not in _SWITCHES:
                raise BooleanError(
                    f"{str(value).lower()} is no value for it; YAML reads yes and on as true, no "
                    "and off as false",
                    key,
                )
        return data


class Model(Section):
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
            raise KeyedError(
                f"d_model {self.d_model} is not a multiple of heads {self.heads}; choose heads "
                "that divide it",
                "model.heads", "model.d_model",
            )  # fmt: skip
        return self


class CorpusData(Section):
    """Which token shards a pretraining reads."""

    corpus: str = Field(pattern=NAME_PATTERN)
    fingerprint: str | None = free(None)  # chooses a build; its whole fingerprint names the run
    sequence: int | None = Field(default=None, gt=0)
    cache_gib: float = free(32.0, gt=0)


class ConversationData(Section):
    """Which conversations a fine-tuning learns from; paths are relative to the experiment file."""

    conversations: tuple[str, ...] = free(min_length=1)  # their contents are in the fingerprint
    holdout: float = Field(default=0.1, gt=0, lt=1)


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW (Loshchilov & Hutter 2019) and gradient clipping by global norm."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)


class Cosine(Section):
    """Linear warm-up to ``optimizer.lr``, then half a cosine down to ``final_lr``."""

    name: Literal["cosine"]
    warmup_steps: int = Field(ge=0)
    final_lr: float = Field(ge=0)


class LinearDecay(Section):
    """Linear warm-up, constant, then straight to ``final_lr`` over the last share of steps."""

    name: Literal["linear_decay"]
    warmup_steps: int = Field(ge=0)
    final_lr: float = Field(default=0.0, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)


Schedule = Annotated[Cosine | LinearDecay, Field(discriminator="name")]


def _one_finding(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """One sentence for a value that is neither, where pydantic reports once for each of the two."""
    try:
        return handler(value)
    except ValidationError:
        wanted = "expected a whole number above 0, or auto"
        raise PydanticCustomError("micro_batch", wanted) from None


MicroBatch = Annotated[Annotated[int, Field(gt=0)] | Literal["auto"], WrapValidator(_one_finding)]
"""How many go through the model at once; ``auto``: the most that fit the memory of the machine."""


class TokenBatch(Section):
    """Tokens of one optimiser step, and sequences that go through the model at once."""

    tokens_per_step: int = Field(gt=0)
    micro_batch: MicroBatch = free()


class ConversationBatch(Section):
    """Conversations of one optimiser step, and conversations that go through the model at once."""

    conversations_per_step: int = Field(gt=0)
    micro_batch: MicroBatch = free()


class Lora(Section):
    """Low-rank adapter: rank, alpha, and which linears of every block carry it."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0)
    targets: tuple[Literal["attn.qkv", "attn.out", "mlp.up", "mlp.down"], ...] = Field(
        default=("attn.qkv", "attn.out", "mlp.up", "mlp.down"), min_length=1
    )


class Float8(Section):
    """How ``precision: fp8`` takes the matrix products of the blocks.

    ``gradients`` is the type that gradients are cast to, one bit of mantissa more (e4m3) or more
    range (e5m2). ``weights`` are rounded to the nearest, or up or down at random, anew in every
    step. ``sums`` is how the products that make gradients add up: all fast in the tensor cores;
    those of weights, which are over tokens, in float32 (moved there again and again); or all. The
    blocks ``keep_first`` and ``keep_last`` at either end stay in bf16.
    """

    gradients: Literal["e5m2", "e4m3"] = added("e5m2", before="e5m2")
    weights: Literal["nearest", "stochastic"] = added("nearest", before="nearest")
    sums: Literal["fast", "weights", "exact"] = added("fast", before="fast")
    keep_first: int = added(0, before=0, ge=0)
    keep_last: int = added(0, before=0, ge=0)


class Evaluation(Section):
    """The frozen evaluation: how often, and how many tokens of the split at most."""

    every_steps: int = free(gt=0)
    tokens: int = Field(default=262_144, gt=0)


class Checkpoint(Section):
    """How often the whole training state is saved, where, and how many of them are kept.

    Permanent ones (``every_steps``, ``keep``) go to the root; those in between
    (``local_every_steps``) stay on the machine's disk, the newest ``local_keep`` of either kind.
    """

    every_steps: int = free(gt=0)
    keep: int = free(2, gt=0)
    local_every_steps: int | None = free(None, gt=0)
    local_keep: int = free(1, gt=0)


class Preemption(Section):
    """Seconds between the provider's SIGTERM and the end of the machine."""

    grace_s: float = free(25.0, ge=0)


class Stability(Section):
    """When a step is not applied, and when the run goes back.

    A step whose loss or gradient norm is not finite, or lies more than ``sigma`` standard
    deviations above the mean of the last ``window`` applied steps, is not applied; for its norm
    alone at most three in a row (``training/stability.py``). More than ``max_skips`` of those
    within ``window`` steps roll the run back, ``rollbacks`` times at most.
    """

    window: int = Field(default=128, ge=4, le=4096)
    sigma: float = Field(default=6.0, gt=0)
    max_skips: int = Field(default=5, ge=0)
    rollbacks: int = Field(default=1, ge=0)


class Price(Section):
    """What one machine costs when neither the provider nor TESSERA_USD_PER_HOUR says.

    ``usd_per_gb_up`` is the price of traffic from the machine to the root, per 10^9 bytes, and
    ``usd_per_gb_down`` that of the way back.
    """

    usd_per_hour: float = free(ge=0)
    usd_per_gb_up: float = free(0.0, ge=0)
    usd_per_gb_down: float = free(0.0, ge=0)
    note: str = free("")


class BooleanError(ValueError):
    """A finding about one key of the section that is being read."""

    def __init__(self, text: str, key: str) -> None:
        super().__init__(text)
        self.key = key


class KeyedError(ValueError):
    """A finding about several keys that do not fit each other, the likeliest culprit first."""

    def __init__(self, text: str, *keys: str) -> None:
        super().__init__(text)
        self.keys = keys

    def blamed(self, origins: Mapping[str, str]) -> str:
        """The first key of what was laid on last: that is where the others stopped fitting."""
        latest = list(dict.fromkeys(reversed(list(origins.values()))))
        known = [key for key in self.keys if key in origins]
        return min(known, key=lambda key: latest.index(origins[key]), default=self.keys[0])
