"""What an experiment will cost on each offer: hours, machine, traffic, disk. Arithmetic alone.

    hours    tokens / (tokens/s) / 3600
    machine  hours x price of all machines
    traffic  down: every shard, once if the disk's cache holds them all, else once an epoch
             up:   12 bytes a parameter at every checkpoint.every_steps, the model once at the end
    disk     hours x price of the disk, where the provider tells it apart

Left out, and said so: minutes of provisioning and installation, machines that are lost (what one
costs is told beside the plan), and what the bucket itself bills.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.cloud.offers import Offer
from tessera.cloud.speeds import Measurement, Speed, published, speed_of
from tessera.experiment import Experiment, Pretrain
from tessera.model.shape import ModelShape, parameters

_GB = 10**9
_STATE_BYTES = 12  # a parameter: float32 weights and two moments
_MODEL_BYTES = 4  # a parameter: float32
_TOKEN_BYTES = 2  # shards hold uint16
FEW_EPOCHS = 4.0
"""More passes over the same text teach little (Muennighoff et al. 2023, 2305.16264)."""


@dataclass(frozen=True)
class Corpus:
    """What the root holds of the experiment's corpus: training tokens, bytes of all shards."""

    name: str
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """What a pretraining does, whichever machine does it. Bytes of the whole run."""

    tokens: int
    tokens_per_step: int
    epochs: float | None
    down_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    up_bytes: int
    resume_bytes: int
    steps_at_risk: float

    @classmethod
    def of(cls, experiment: Pretrain, corpus: Corpus | None) -> Work:
        """Without a corpus the shards are taken to hold just the tokens asked for."""
        count = parameters(ModelShape(**experiment.model.model_dump(exclude={"init_std"})))
        every = experiment.checkpoint.every_steps
        saves = experiment.steps // every
        epochs = None if corpus is None else experiment.tokens / max(1, corpus.tokens)
        shards = _TOKEN_BYTES * experiment.tokens if corpus is None else corpus.bytes
        fits = shards <= experiment.data.cache_gib * 2**30
        passes = 1.0 if epochs is None else min(1.0, epochs) if fits else epochs
        state = _STATE_BYTES * count
        return cls(
            tokens=experiment.tokens,
            tokens_per_step=experiment.batch.tokens_per_step,
            epochs=epochs,
            down_bytes=round(shards * passes),
            checkpoint_bytes=state,
            checkpoints=saves,
            up_bytes=saves * state + _MODEL_BYTES * count,
            resume_bytes=state + round(shards * min(1.0, passes) if fits else 0),
            steps_at_risk=every / 2,
        )


@dataclass(frozen=True)
class Line:
    """One offer, worked out. US dollars; None: not known. ``total_usd`` adds up what is known."""

    offer: Offer
    speed: Speed
    hours: float | None
    machine_usd: float | None
    traffic_usd: float | None
    storage_usd: float | None
    total_usd: float | None
    loss_usd: float | None
    budget_tokens: int | None

    @property
    def whole(self) -> bool:
        """Whether every part of the total is known."""
        return None not in (self.machine_usd, self.traffic_usd, self.storage_usd)


@dataclass(frozen=True)
class Plan:
    """All offers, the cheapest total first; those without a speed last, by their price an hour."""

    experiment: Experiment
    work: Work | None
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    budget_usd: float | None

    @property
    def cheapest(self) -> Line | None:
        """The first line that can be launched: at a provider that is enabled, if one is."""
        launchable = [line for line in self.lines if line.offer.instance_type]
        enabled = [line for line in launchable if line.offer.enabled is not False]
        return next(iter(enabled or launchable), None)


def make_plan(
    experiment: Experiment,
    offers: Sequence[Offer],
    measurements: Sequence[Measurement],
    *,
    corpus: Corpus | None = None,
    budget_usd: float | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Work every offer out; ``corpus`` is what the root holds, None if it is not known."""
    work = Work.of(experiment, corpus) if isinstance(experiment, Pretrain) else None
    lines = [_line(experiment, work, offer, measurements, budget_usd) for offer in offers]
    lines.sort(key=_cheapest_first)
    told = (*notes, *_remarks(experiment, work, corpus, lines, measurements))
    return Plan(experiment, work, tuple(lines), told, budget_usd)


def _cheapest_first(line: Line) -> tuple[bool, float, float]:
    total = line.total_usd
    return total is None, total or 0.0, line.offer.billed_usd_per_hour


def _line(
    experiment: Experiment,
    work: Work | None,
    offer: Offer,
    measurements: Sequence[Measurement],
    budget_usd: float | None,
) -> Line:
    speed = speed_of(experiment, offer.card, offer.all_gpus, measurements)
    if work is None or speed.tokens_per_s is None:
        return Line(offer, speed, None, None, None, None, None, None, None)
    hours = work.tokens / speed.tokens_per_s / 3600
    machine = hours * offer.usd_per_hour * offer.nodes
    per_hour = offer.storage_usd_per_hour
    storage = None if per_hour is None else hours * per_hour * offer.nodes
    traffic = _traffic(offer, work.down_bytes * offer.nodes, work.up_bytes)
    again = work.steps_at_risk * work.tokens_per_step / speed.tokens_per_s / 3600
    fetched = _traffic(offer, work.resume_bytes * offer.nodes, 0)
    return Line(
        offer=offer,
        speed=speed,
        hours=hours,
        machine_usd=machine,
        traffic_usd=traffic,
        storage_usd=storage,
        total_usd=machine + (traffic or 0.0) + (storage or 0.0),
        loss_usd=again * offer.billed_usd_per_hour + (fetched or 0.0),
        budget_tokens=None if budget_usd is None else _bought(work, offer, speed, budget_usd),
    )


def _traffic(offer: Offer, down_bytes: int, up_bytes: int) -> float | None:
    if offer.usd_per_gb_up is None or offer.usd_per_gb_down is None:
        return None
    return (down_bytes * offer.usd_per_gb_down + up_bytes * offer.usd_per_gb_up) / _GB


def _bought(work: Work, offer: Offer, speed: Speed, budget_usd: float) -> int:
    """Tokens, in whole steps, that a budget pays for: all costs in proportion to the tokens.

    The shards come down whole, however few of them are read: a cautious figure.
    """
    assert speed.tokens_per_s is not None
    down = _traffic(offer, work.down_bytes * offer.nodes, 0) or 0.0
    up = (_traffic(offer, 0, work.up_bytes) or 0.0) / work.tokens
    per_token = offer.billed_usd_per_hour / 3600 / speed.tokens_per_s + up
    if per_token <= 0:
        return work.tokens
    steps = math.floor(max(0.0, budget_usd - down) / per_token / work.tokens_per_step)
    return steps * work.tokens_per_step


def _remarks(
    experiment: Experiment,
    work: Work | None,
    corpus: Corpus | None,
    lines: Sequence[Line],
    measurements: Sequence[Measurement],
) -> list[str]:
    """Sentences that a person should read before paying."""
    said = []
    if work is None:
        said.append(
            "Fine-tuning has not been measured on any GPU, so there are prices an hour and no "
            "total; --budget limits it."
        )
    elif corpus is not None and work.epochs is not None and work.epochs > FEW_EPOCHS:
        said.append(
            f"Corpus {corpus.name} has {_count(corpus.tokens)} tokens to train on, and the "
            f"experiment asks for {_count(work.tokens)}: {work.epochs:,.0f} epochs; build a larger "
            "one, or lower `tokens`."
        )
    if isinstance(experiment, Pretrain):
        cards = {line.offer.card: line for line in lines if line.speed.how == "projected"}
        for card, line in cards.items():
            if card and (told := published(experiment, card, line.offer.all_gpus, measurements)):
                hours = experiment.tokens / told.tokens_per_s / 3600
                said.append(
                    f"On an {card.name} the reference run's own code made {told.tokens_per_s:,.0f} "
                    f"tokens/s: {hours:,.1f} h. Ours is not measured there; `tessera preflight` on "
                    "the machine tells before it trains."
                )
    return said


def _count(tokens: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)
