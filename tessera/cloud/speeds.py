"""Tokens a second that a GPU makes of an experiment: measured, else a projection that says so.

Measurements are those of ``speeds.yaml`` and of the user's own runs. For another card of the same
architecture, or a model of another shape, the speed is projected:

    tokens/s = MFU x peak FLOP/s of the card / FLOPs a token

with the MFU of the nearest measurement (same architecture, precision and kernels). That leaves out
what memory bounds: a card with the same products and slower memory comes out too fast. An
architecture that nobody measured has no speed here: its figure would be made up.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tessera.cloud.cards import Card, card_named
from tessera.experiment import Experiment, Pretrain
from tessera.model.shape import ModelShape, flops_per_token

REACH = 8.0
"""How many times the FLOPs a token of another shape may differ: MFU of toys says nothing."""

_FILE = Path(__file__).with_name("speeds.yaml")
_RANK = {"own": 0, "train": 1, "bench": 2, "published": 3}

How = Literal["measured", "projected", "published", "not measured"]


class Measurement(BaseModel):
    """One measured speed; ``own`` is a run of the user's own root."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    gpus: int = Field(default=1, gt=0)
    model: tuple[int, int, int, int, int]
    sequence: int | None = None
    precision: Literal["bf16", "fp8", "float32"]
    kernels: Literal["fused", "torch", "other"]
    kind: Literal["own", "train", "bench", "published"]
    tokens_per_s: float = Field(gt=0)
    versions: str
    date: datetime.date | None
    command: str
    source: str

    @property
    def card(self) -> Card | None:
        """The GPU."""
        return card_named(self.gpu)

    @property
    def flops(self) -> int:
        """FLOPs a token."""
        layers, d_model, heads, context, vocabulary = self.model
        shape = ModelShape(layers, d_model, heads, context, vocabulary)
        return flops_per_token(shape, self.sequence)

    @property
    def mfu(self) -> float:
        """Share of the data sheet's dense bf16 FLOP/s, in float8 too; 0 for an unknown card."""
        card = self.card
        return self.tokens_per_s * self.flops / (card.peak_flops * self.gpus) if card else 0.0

    def named(self) -> str:
        """Where it comes from, in some words."""
        count = f"{self.gpus} x " if self.gpus > 1 else ""
        day = f", {self.date}" if self.date else ""
        return f"{self.tokens_per_s:,.0f} on {count}{self.gpu}{day}, {self.source}"


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all GPUs together (None: not measured), and how one knows."""

    tokens_per_s: float | None
    how: How
    basis: str


@cache
def shipped() -> tuple[Measurement, ...]:
    """The measurements that come with Tessera."""
    rows = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return tuple(TypeAdapter(list[Measurement]).validate_python(rows))


def kernels_on(experiment: Pretrain, card: Card, gpus: int) -> Literal["fused", "torch"]:
    """Who computes the steps there, as training decides it: ``kernels: auto`` means Hopper."""
    if experiment.precision == "fp8" or experiment.kernels == "fused":
        return "fused"
    default = (
        experiment.kernels == "auto"
        and card.architecture == "Hopper"
        and gpus == 1
        and experiment.precision != "float32"
        and not experiment.deterministic
        and experiment.compile == "auto"
    )
    return "fused" if default else "torch"


def speed_of(
    experiment: Experiment, card: Card | None, gpus: int, measurements: Sequence[Measurement]
) -> Speed:
    """What ``gpus`` of that card make of the experiment, all together."""
    if not isinstance(experiment, Pretrain):
        return Speed(None, "not measured", "fine-tuning has not been measured on a GPU")
    if card is None:
        return Speed(None, "not measured", "the provider does not say which card it is")
    wanted = _Wanted.of(experiment, card, gpus)
    exact = [m for m in measurements if wanted.same_work(m) and m.card == card and m.gpus == gpus]
    if exact:
        best = min(exact, key=wanted.best_first)
        return Speed(best.tokens_per_s, "measured", wanted.named(best))
    if near := [m for m in measurements if wanted.same_kind(m)]:
        best = min(near, key=wanted.best_first)
        speed = best.mfu * card.peak_flops * gpus / wanted.flops
        return Speed(speed, "projected", f"MFU {best.mfu:.0%} of {wanted.named(best)}")
    if told := published(experiment, card, gpus, measurements):
        return Speed(told.tokens_per_s, "published", told.named())
    return Speed(None, "not measured", f"no {card.architecture} GPU was measured in this precision")


def published(
    experiment: Pretrain, card: Card, gpus: int, measurements: Sequence[Measurement]
) -> Measurement | None:
    """What others told of the same model on the same card, with code that is not ours."""
    shape = _model(experiment), experiment.sequence
    for m in measurements:
        same = (m.model, m.sequence or m.model[3]) == shape and m.precision == _precision(
            experiment
        )
        if m.kind == "published" and same and m.card == card and m.gpus == gpus:
            return m
    return None


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a card."""

    card: Card
    gpus: int
    model: tuple[int, int, int, int, int]
    sequence: int
    flops: int
    precision: str
    kernels: str

    @classmethod
    def of(cls, experiment: Pretrain, card: Card, gpus: int) -> _Wanted:
        model, sequence = _model(experiment), experiment.sequence
        mlp = experiment.model.mlp_ratio
        return cls(
            card=card,
            gpus=gpus,
            model=model,
            sequence=sequence,
            flops=flops_per_token(ModelShape(*model, mlp_ratio=mlp), sequence),
            precision=_precision(experiment),
            kernels=kernels_on(experiment, card, gpus),
        )

    def same_work(self, m: Measurement) -> bool:
        """The same model in the same precision; equal FLOPs rule out another MLP."""
        shape = m.model, m.sequence or m.model[3], m.flops, m.precision
        return m.kernels != "other" and shape == (
            self.model, self.sequence, self.flops, self.precision
        )  # fmt: skip

    def same_kind(self, m: Measurement) -> bool:
        """Near enough to project from; several GPUs from several: they wait for each other."""
        return (
            m.kernels != "other"
            and m.precision == self.precision
            and m.card is not None
            and m.card.architecture == self.card.architecture
            and (m.gpus > 1) == (self.gpus > 1)
            and abs(math.log(m.flops / self.flops)) <= math.log(REACH)
        )

    def best_first(self, m: Measurement) -> tuple[bool, float, bool, int, int]:
        """Sorting key: who computes the steps, the shape, the card, the kind of measurement."""
        distance = round(abs(math.log(m.flops / self.flops)), 3)
        return m.kernels != self.kernels, distance, m.card != self.card, *_best_first(m)

    def named(self, m: Measurement) -> str:
        """The measurement in words; slower kernels than those that will run are told."""
        other = f", kernels: {m.kernels}" if m.kernels != self.kernels else ""
        return f"{m.named()}{other}"


def _best_first(m: Measurement) -> tuple[int, int]:
    """A user's own runs before ours, whole runs before bare steps, then the newest."""
    return _RANK[m.kind], -(m.date.toordinal() if m.date else 0)


def _model(experiment: Pretrain) -> tuple[int, int, int, int, int]:
    m = experiment.model
    return m.layers, m.d_model, m.heads, m.context, m.vocab_size


def _precision(experiment: Pretrain) -> str:
    """``auto`` is bf16 on a GPU."""
    return "bf16" if experiment.precision == "auto" else experiment.precision


def own_measurement(
    experiment: Experiment,
    *,
    device: str,
    gpus: int,
    tokens_per_s: float,
    run_id: str,
    day: datetime.date,
) -> Measurement | None:
    """A run of the user's root as a measurement; None if its device or kind tells nothing here."""
    card = card_named(device)
    if card is None or not isinstance(experiment, Pretrain) or experiment.model.mlp_ratio != 4:
        return None
    precision = _precision(experiment)
    return Measurement.model_validate(
        {
            "gpu": card.name,
            "gpus": gpus,
            "model": _model(experiment),
            "sequence": experiment.sequence,
            "precision": precision,
            "kernels": kernels_on(experiment, card, gpus),
            "kind": "own",
            "tokens_per_s": tokens_per_s,
            "versions": "see the run",
            "date": day,
            "command": f"tessera-exp show {run_id}",
            "source": f"run {run_id}",
        }
    )
