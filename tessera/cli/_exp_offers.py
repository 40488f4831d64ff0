"""Whether a running run could go on for less elsewhere: the offers of ``tessera plan``, compared.

The same GPU is taken to train at the same speed, so the hours left are those that the run itself
foresees. Moving costs what is lost: half a checkpoint interval is trained again, minutes until the
new machine trains are billed, state and shards are fetched once more. Told are only offers that
save at least a tenth of what is left and a dollar, all that paid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tessera.cloud.cards import Card, card_named
from tessera.cloud.offers import VAST, Market, Needs, Offer, with_live
from tessera.errors import TesseraError
from tessera.ledger.forecast import SETUP_H
from tessera.runs import Attempt
from tessera.tracking.alerts import Alert, offer_alert
from tessera.tracking.history import RunHistory
from tessera.tracking.queries import RunSummary
from tessera.tracking.records import Record

LEAST_SHARE, LEAST_USD = 0.1, 1.0
"""An offer is told of if it saves this part of what is left, and so many dollars."""
ASK_EVERY_S = 600.0
"""Markets are asked no more often, however often a watcher looks."""
_GB = 10**9
_STATE_BYTES = 12  # a parameter: float32 weights and two moments
_TASK = Path("sky") / "pretrain_h100.yaml"

Ask = Callable[[Card, int], Market]


@dataclass(frozen=True)
class Standing:
    """A running run, as far as a comparison needs it; dollars and hours are of all machines."""

    run_id: str
    experiment: str
    attempt: Attempt
    card: Card
    step: int
    usd_per_hour: float
    hours_left: float
    lost_hours: float
    down_bytes: int


@dataclass(frozen=True)
class Saving:
    """What moving to ``offer`` would save, in dollars after what moving costs."""

    offer: Offer
    left_usd: float
    moving_usd: float
    usd: float

    @property
    def worth_telling(self) -> bool:
        """Whether it is large enough to bother somebody."""
        return self.usd >= LEAST_USD and self.usd >= LEAST_SHARE * self.left_usd


def standing_of(history: RunHistory, summary: RunSummary) -> Standing | None:
    """None for a run that does not train now, or of which the GPU, price or end is not known."""
    alive = [item for item in history.attempts if item.alive]
    if summary.status != "running" or not alive:
        return None
    item = max(alive, key=lambda one: one.attempt.number)
    attempt, card = item.attempt, card_named(item.attempt.device)
    left = _last(item.records, "forecast/seconds_left")
    prices = [usd for _, usd in item.prices]
    price = prices[-1] if prices else attempt.usd_per_hour
    if card is None or left is None or not price or attempt.provider == "local":
        return None
    since = left.step - (history.upto or 0)
    speed = _last(item.records, "train/tokens_per_s")
    experiment = history.run.record.experiment
    return Standing(
        run_id=history.run.id,
        experiment=history.run.record.name,
        attempt=attempt,
        card=card,
        step=left.step,
        usd_per_hour=price,
        hours_left=left.number / 3600,
        lost_hours=_lost_hours(experiment, speed, since),
        down_bytes=_down_bytes(experiment, history.run.record.data),
    )


def best_saving(run: Standing, offers: Sequence[Offer]) -> Saving | None:
    """The offer of the same GPUs that saves most; None if none would save anything."""
    found = [
        _saving(run, offer)
        for offer in offers
        if offer.card == run.card
        and offer.all_gpus == run.attempt.devices * run.attempt.nodes
        and not offer.bid
        and offer.enabled is not False
    ]
    best = max(found, key=lambda saving: saving.usd, default=None)
    return best if best is not None and best.usd > 0 else None


def _saving(run: Standing, offer: Offer) -> Saving:
    price = offer.billed_usd_per_hour
    left = run.hours_left * run.usd_per_hour
    again = (run.lost_hours + SETUP_H) * price
    fetched = run.down_bytes * offer.nodes * (offer.usd_per_gb_down or 0.0) / _GB
    moving = again + fetched
    return Saving(offer, left, moving, left - run.hours_left * price - moving)


def _lost_hours(experiment: dict[str, object], speed: Record | None, since: int) -> float:
    """Hours of training that would be done again: half an interval, or what is not yet saved."""
    every = _number(experiment.get("checkpoint"), "every_steps")
    per_step = _number(experiment.get("batch"), "tokens_per_step")
    steps = every / 2 if every else max(0, since)
    rate = speed.number if speed is not None else 0.0
    return steps * per_step / rate / 3600 if rate > 0 and per_step else 0.0


def _down_bytes(experiment: dict[str, object], data: dict[str, object]) -> int:
    """Bytes that a new machine fetches before it trains: the state, and the shards once."""
    from tessera.model.shape import ModelShape, parameters

    model = experiment.get("model")
    state = 0
    if isinstance(model, dict):
        fields = {key: value for key, value in model.items() if key != "init_std"}
        state = _STATE_BYTES * parameters(ModelShape(**fields))
    shards = data.get("bytes")
    return state + (shards if isinstance(shards, int) else 0)


def _number(section: object, key: str) -> float:
    value = section.get(key) if isinstance(section, dict) else None
    return float(value) if isinstance(value, int | float) else 0.0


def _last(records: Sequence[Record], key: str) -> Record | None:
    found = (r for r in reversed(records) if r.kind == "metric" and r.key == key)
    return next(found, None)


def words(run: Standing, saving: Saving) -> str:
    """What the alert says, with the command to move."""
    offer = saving.offer
    source = "offered now" if offer.source == "live" else "by SkyPilot's catalog"
    return (
        f"{offer.provider} {offer.region} has {run.card.name} for "
        f"${offer.billed_usd_per_hour:,.2f} an hour ({source}), this machine costs "
        f"${run.usd_per_hour:,.2f}: moving would save about ${saving.usd:,.2f} of the "
        f"${saving.left_usd:,.2f} that are left, ${saving.moving_usd:,.2f} for moving paid; "
        f"`sky down` this machine, then `tessera launch experiments/{run.experiment}.yaml "
        f"--provider {offer.provider.lower()}` goes on from the last checkpoint."
    )


@dataclass
class OfferWatch:
    """Alerts about offers, for ``Watcher.more``; ``say`` gets what could not be asked, once."""

    say: Callable[[str], object]
    ask: Ask | None = None
    _asked: dict[tuple[str, int], tuple[float, Market]] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def __call__(
        self, looked: Sequence[tuple[RunHistory, RunSummary]], now: float
    ) -> Iterator[Alert]:
        """An alert for each running run that would be better off elsewhere."""
        for history, summary in looked:
            run = standing_of(history, summary)
            if run is None:
                continue
            saving = best_saving(run, self._market(run, now).offers)
            if saving is not None and saving.worth_telling:
                yield offer_alert(
                    run.run_id, run.attempt.id, now, words(run, saving), step=run.step
                )

    def _market(self, run: Standing, now: float) -> Market:
        """The market of this GPU, asked at most every ten minutes; a failure is a sentence."""
        key = run.card.name, run.attempt.devices
        if key not in self._asked or now - self._asked[key][0] > ASK_EVERY_S:
            try:
                market = (self.ask or ask_market)(run.card, run.attempt.devices)
            except TesseraError as error:
                market = Market((), (f"Offers of {run.card.name} are not known: {error}",))
            self._asked[key] = now, market
            for note in market.notes:
                if note not in self._said:
                    self._said.add(note)
                    self.say(note)
        return self._asked[key][1]


def ask_market(card: Card, gpus: int) -> Market:
    """What ``tessera plan --gpu CARD`` sees: SkyPilot's catalogs, vast.ai's offers of this moment.

    Without SkyPilot or its task file vast.ai alone is asked. Raises ``InputError`` where there is
    neither.
    """
    from tessera.cloud.skypilot import TaskFile, catalog_market
    from tessera.errors import InputError

    try:
        file = TaskFile(_TASK)
        file.config["resources"].pop("max_hourly_cost", None)
        file.config["envs"] = {**file.envs, "TESSERA_GPUS": str(gpus)}
        catalog = catalog_market(file, card)
    except InputError as error:
        return _vast_alone(card, gpus, str(error))
    live = with_live(catalog.offers, file.needs(card))
    return Market(live.offers, (*catalog.notes, *live.notes))


def _vast_alone(card: Card, gpus: int, why: str) -> Market:
    from tessera.cloud.vast import find_key
    from tessera.errors import InputError

    if find_key() is None:
        raise InputError(why)
    needs = Needs(card, "", gpus, 256.0, None, None, None)
    # A stand-in for the catalog: it only says which family vast.ai is asked for.
    family = Offer(VAST, card.name, card, gpus, 0.0, "catalog", "", "", "")
    live = with_live((family,), needs)
    offers = tuple(offer for offer in live.offers if offer.source == "live")
    return Market(offers, (f"Only vast.ai was asked for offers ({why.rstrip('.')}).", *live.notes))
