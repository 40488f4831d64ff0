"""What an experiment will cost on each offer: hours, machine, traffic, disk. Arithmetic alone.

    hours    tokens / (tokens/s) / 3600
    machine  hours x price of all machines
    traffic  down: every shard, once if the disk's cache holds them all, else once an epoch
             up:   12 bytes a parameter at every checkpoint.every_steps, the model once at the end
    disk     hours x price of the disk, where the provider tells it apart

A budget pays for what is left of it once the reserve is kept back, by the trainer's own formula
(``tessera.ledger.budget``); where it ends the run before the tokens do, hours and dollars are those
of the run that it ends.

Left out, and said so: minutes of provisioning and installation, machines that are lost (what one
costs is told beside the plan), and what the bucket itself bills.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.cloud.offers import Offer, how_to_enable
from tessera.cloud.speeds import Measurement, Speed, published, speed_of
from tessera.errors import InputError
from tessera.experiment import Experiment, Pretrain
from tessera.ledger.budget import CHECKPOINT_BYTES, MODEL_BYTES, Budget, kept_back, nothing_left
from tessera.ledger.dollars import as_typed
from tessera.model.shape import ModelShape, parameters

_GB = 10**9
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
    """What a pretraining of ``tokens`` does, whichever machine does it. Bytes of the whole run."""

    tokens: int
    epochs: float | None
    down_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    up_bytes: int
    resume_bytes: int
    tokens_at_risk: float

    @classmethod
    def of(cls, experiment: Pretrain, corpus: Corpus | None, tokens: int) -> Work:
        """Without a corpus the shards are taken to hold just these tokens."""
        count = _parameters(experiment)
        every, per_step = experiment.checkpoint.every_steps, experiment.batch.tokens_per_step
        saves = tokens // per_step // every
        epochs = None if corpus is None else tokens / max(1, corpus.tokens)
        shards = _TOKEN_BYTES * tokens if corpus is None else corpus.bytes
        fits = shards <= experiment.data.cache_gib * 2**30
        passes = 1.0 if epochs is None else min(1.0, epochs) if fits else epochs
        state = CHECKPOINT_BYTES * count
        return cls(
            tokens=tokens,
            epochs=epochs,
            down_bytes=round(shards * passes),
            checkpoint_bytes=state,
            checkpoints=saves,
            up_bytes=saves * state + MODEL_BYTES * count,
            resume_bytes=state + round(shards * min(1.0, passes) if fits else 0),
            tokens_at_risk=every * per_step / 2,
        )


@dataclass(frozen=True)
class Line:
    """One offer, worked out. US dollars; None: not known. ``total_usd`` adds up what is known.

    ``tokens`` are the experiment's, or those that its budget buys here (``budget_tokens``) if they
    are fewer. ``budget`` is that budget with what is kept back of it at this price.
    """

    offer: Offer
    speed: Speed
    tokens: int | None
    hours: float | None
    machine_usd: float | None
    traffic_usd: float | None
    storage_usd: float | None
    total_usd: float | None
    loss_usd: float | None
    budget_tokens: int | None
    budget: Budget | None = None

    @property
    def capped(self) -> bool:
        """Whether the budget ends the run here, so that it costs no more than that."""
        return self.tokens is not None and self.tokens == self.budget_tokens

    @property
    def hindrance(self) -> str | None:
        """Why this is not launched, in a sentence; None if nothing is known against it."""
        offer, price = self.offer, self.offer.billed_usd_per_hour
        if offer.enabled is False:
            return f"{how_to_enable(offer.provider)}, or choose another with --provider."
        if not offer.instance_type:
            return f"SkyPilot has no name for a {offer.gpu} at {offer.provider}; choose another."
        if self.budget is not None and self.budget.eaten_up:
            return nothing_left(self.budget, price)
        if self.budget is not None and self.budget_tokens == 0:
            return (
                f"A budget of {as_typed(self.budget.usd)} pays for no step at {as_typed(price)} an "
                "hour, since something is kept back for the run's end; raise it."
            )
        return None

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
        """The first line that can be launched, as far as is known here."""
        return next((line for line in self.lines if line.hindrance is None), None)

    @property
    def why_none(self) -> str:
        """Why none of the lines can be launched, by the one that would come first."""
        return next((line.hindrance for line in self.lines if line.hindrance), "")


def make_plan(
    experiment: Experiment,
    offers: Sequence[Offer],
    measurements: Sequence[Measurement],
    *,
    corpus: Corpus | None = None,
    budget_usd: float | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Work every offer out; ``corpus`` is what the root holds, None if it is not known.

    Raises ``InputError`` for a pretraining that neither tokens nor a budget ends.
    """
    tokens = experiment.tokens if isinstance(experiment, Pretrain) else None
    work = None
    if isinstance(experiment, Pretrain) and tokens is not None:
        work = Work.of(experiment, corpus, tokens)
    elif isinstance(experiment, Pretrain) and budget_usd is None:
        raise InputError(
            f"{experiment.origin('tokens')}: neither tokens nor a budget ends the run, so it has "
            "no price; give --budget, or --set tokens=..."
        )
    lines = [_line(experiment, corpus, offer, measurements, budget_usd) for offer in offers]
    lines.sort(key=_cheapest_first)
    told = (*notes, *_remarks(experiment, corpus, lines, measurements))
    return Plan(experiment, work, tuple(lines), told, budget_usd)


def _cheapest_first(line: Line) -> tuple[bool, float, float, float]:
    """By total; offers where a budget ends the run come by how many tokens they give for it."""
    total = line.total_usd
    cents = round(total or 0.0, 2)
    return total is None, -float(line.tokens or 0), cents, line.offer.billed_usd_per_hour


def _line(
    experiment: Experiment,
    corpus: Corpus | None,
    offer: Offer,
    measurements: Sequence[Measurement],
    budget_usd: float | None,
) -> Line:
    speed = speed_of(experiment, offer.card, offer.all_gpus, measurements)
    rate = speed.tokens_per_s
    if not isinstance(experiment, Pretrain):
        return Line(offer, speed, None, None, None, None, None, None, None, None)
    budget = None if budget_usd is None else _budget(experiment, offer, budget_usd)
    if rate is None:
        return Line(offer, speed, None, None, None, None, None, None, None, None, budget)
    bought = None if budget is None else _bought(experiment, corpus, offer, rate, budget)
    tokens = min(found for found in (experiment.tokens, bought) if found is not None)
    work = Work.of(experiment, corpus, tokens)
    cost = _cost(work, offer, rate)
    again = work.tokens_at_risk / rate / 3600 * offer.billed_usd_per_hour
    fetched = _traffic(offer, work.resume_bytes * offer.nodes, 0)
    return Line(
        offer=offer,
        speed=speed,
        tokens=tokens,
        hours=cost.hours,
        machine_usd=cost.machine_usd,
        traffic_usd=cost.traffic_usd,
        storage_usd=cost.storage_usd,
        total_usd=cost.total_usd,
        loss_usd=again + (fetched or 0.0),
        budget_tokens=bought,
        budget=budget,
    )


def _budget(experiment: Pretrain, offer: Offer, usd: float) -> Budget:
    """What training will keep back on such a machine; traffic whose price is not told counts 0."""
    reserve = kept_back(
        experiment.budget_reserve_usd,
        offer.billed_usd_per_hour,
        rented=True,
        parameters=_parameters(experiment),
        usd_per_gb_up=offer.usd_per_gb_up or 0.0,
    )
    return Budget(usd, reserve)


def _parameters(experiment: Pretrain) -> int:
    return parameters(ModelShape(**experiment.model.model_dump(exclude={"init_std"})))


@dataclass(frozen=True)
class _Cost:
    hours: float
    machine_usd: float
    traffic_usd: float | None
    storage_usd: float | None

    @property
    def total_usd(self) -> float:
        return self.machine_usd + (self.traffic_usd or 0.0) + (self.storage_usd or 0.0)


def _cost(work: Work, offer: Offer, tokens_per_s: float) -> _Cost:
    hours = work.tokens / tokens_per_s / 3600
    per_hour = offer.storage_usd_per_hour
    return _Cost(
        hours=hours,
        machine_usd=hours * offer.usd_per_hour * offer.nodes,
        traffic_usd=_traffic(offer, work.down_bytes * offer.nodes, work.up_bytes),
        storage_usd=None if per_hour is None else hours * per_hour * offer.nodes,
    )


def _traffic(offer: Offer, down_bytes: int, up_bytes: int) -> float | None:
    if offer.usd_per_gb_up is None or offer.usd_per_gb_down is None:
        return None
    return (down_bytes * offer.usd_per_gb_down + up_bytes * offer.usd_per_gb_up) / _GB


def _bought(
    experiment: Pretrain,
    corpus: Corpus | None,
    offer: Offer,
    tokens_per_s: float,
    budget: Budget,
) -> int:
    """Tokens, in whole steps, that a budget pays for: their total stays at what training aims at.

    The total grows with the tokens; what the provider does not tell is missing from it.
    """
    per_step = experiment.batch.tokens_per_step

    def total(steps: int) -> float:
        work = Work.of(experiment, corpus, steps * per_step)
        return _cost(work, offer, tokens_per_s).total_usd

    if offer.billed_usd_per_hour <= 0:
        return experiment.tokens or 0
    aim = max(0.0, budget.aim_usd)
    seconds = aim / offer.billed_usd_per_hour * 3600
    most = int(seconds * tokens_per_s / per_step) + 1  # more than the machine alone would allow
    steps = bisect_right(range(most + 1), aim, key=total) - 1
    return max(0, steps) * per_step


def _remarks(
    experiment: Experiment,
    corpus: Corpus | None,
    lines: Sequence[Line],
    measurements: Sequence[Measurement],
) -> list[str]:
    """Sentences that a person should read before paying."""
    said = []
    asked = experiment.tokens if isinstance(experiment, Pretrain) else None
    asked = asked or next((line.tokens for line in lines if line.tokens), None)
    if not isinstance(experiment, Pretrain):
        said.append("Fine-tuning has not been measured on any GPU: prices an hour, no totals.")
    elif corpus is not None and asked and asked > FEW_EPOCHS * corpus.tokens:
        said.append(
            f"Corpus {corpus.name} has {_count(corpus.tokens)} tokens to train on, and this run "
            f"takes {_count(asked)}: {asked / max(1, corpus.tokens):,.0f} epochs; build a larger "
            "one, or lower `tokens`."
        )
    if isinstance(experiment, Pretrain):
        shown = [line for line in lines if line.speed.how == "projected"]
        cards = {line.offer.card: line for line in reversed(shown)}  # the first of each
        for card, line in cards.items():
            if (
                card
                and line.tokens
                and (told := published(experiment, card, line.offer.all_gpus, measurements))
            ):
                hours = line.tokens / told.tokens_per_s / 3600
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
