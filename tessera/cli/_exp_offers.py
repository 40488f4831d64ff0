"""Whether a running run could go on for less elsewhere: the offers of ``tessera plan``, compared.

The same GPU is taken to train at the same speed, so the hours left are those that the run itself
foresees. Moving costs what is lost: half a checkpoint interval is trained again, minutes until the
new machine trains are billed, state and shards are fetched once more. Told are only offers that
save at least a tenth of what is left and a dollar, all of that paid.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.cloud.cards import Card, card_named
from tessera.cloud.offers import VAST, Market, Needs, Offer, with_live
from tessera.cloud.plan import Corpus, Work
from tessera.errors import TesseraError
from tessera.experiment import Pretrain
from tessera.ledger.forecast import SETUP_H
from tessera.runs import Attempt, Run
from tessera.storage import Root
from tessera.tracking.alerts import Alert, offer_alert
from tessera.tracking.history import RunHistory
from tessera.tracking.queries import RunSummary
from tessera.tracking.records import Record
from tessera.tracking.tail import RunTail

LEAST_SHARE, LEAST_USD = 0.1, 1.0
"""An offer is told of if it saves this part of what is left, and so many dollars."""
ASK_EVERY_S = 600.0
"""Markets are asked no more often, however often a watcher looks."""
_GB = 10**9
_TASK = Path("sky") / "pretrain_h100.yaml"

Ask = Callable[[Card, int], Market]


@dataclass(frozen=True)
class Standing:
    """A running run, as far as a comparison needs it; dollars and hours are of all machines."""

    run_id: str
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
    """None for what is no pretraining on a rented machine, or does not train now.

    And for a run of which GPU, price, speed or end are not known.
    """
    alive = [item for item in history.attempts if item.alive]
    experiment = history.run.experiment
    if summary.status != "running" or not alive or not isinstance(experiment, Pretrain):
        return None
    item = max(alive, key=lambda one: one.attempt.number)
    attempt, card = item.attempt, card_named(item.attempt.device)
    records = RunTail(history.run, 1).look().records  # the history may be condensed
    left = _last(records, "forecast/seconds_left")
    speed = _last(records, "train/tokens_per_s")
    price = item.prices[-1][1] if item.prices else attempt.usd_per_hour
    if card is None or left is None or speed is None or not price or attempt.provider == "local":
        return None
    tokens = experiment.tokens or left.step * experiment.batch.tokens_per_step
    work = Work.of(experiment, _corpus(history.run), tokens)
    return Standing(
        run_id=history.run.id,
        attempt=attempt,
        card=card,
        step=left.step,
        usd_per_hour=price,
        hours_left=left.number / 3600,
        lost_hours=work.tokens_at_risk / speed.number / 3600 if speed.number > 0 else 0.0,
        down_bytes=work.resume_bytes,
    )


def _corpus(run: Run) -> Corpus | None:
    """The run's corpus, None where it cannot be read: then it has just the run's tokens."""
    from tessera.corpus.manifest import load_manifest

    try:
        manifest = load_manifest(run.root, str(run.record.data.get("manifest")))
    except TesseraError:
        return None
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    train = manifest.splits["train"].tokens
    return Corpus(manifest.name, train, sum(shard.bytes for shard in shards))


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


def _last(records: Sequence[Record], key: str) -> Record | None:
    found = (r for r in reversed(records) if r.kind == "metric" and r.key == key)
    return next(found, None)


def words(run: Standing, saving: Saving, command: str) -> str:
    """What the alert says, with the command to move."""
    offer = saving.offer
    source = "offered now" if offer.source == "live" else "by SkyPilot's catalog"
    return (
        f"{offer.provider} {offer.region} has {run.card.name} for "
        f"${offer.billed_usd_per_hour:,.2f} an hour ({source}), this machine costs "
        f"${run.usd_per_hour:,.2f}: moving would save about ${saving.usd:,.2f} of the "
        f"${saving.left_usd:,.2f} that are left, with ${saving.moving_usd:,.2f} for moving paid; "
        f"take this machine down after a checkpoint (`sky down`), then {command} goes on from it."
    )


def launch_command(root: Root, run: Standing, offer: Offer) -> str:
    """How the run is launched there: as it was the last time, at the other provider."""
    there = ["--provider", offer.provider.lower(), "--gpu", run.card.name]
    latest: dict[str, Any] = {}
    for path in reversed(root.files("launches")):  # named after their time
        found = None if path.endswith(".end.json") else root.read_json(path)
        if isinstance(found, dict) and found.get("run_id") == run.run_id:
            latest = found
            break
    if not isinstance(latest.get("experiment"), str):
        return f"`tessera launch` with its experiment file and {shlex.join(there)}"
    sets = [word for one in latest.get("set", ()) for word in ("--set", str(one))]
    return f"`{shlex.join(['tessera', 'launch', latest['experiment'], *sets, *there])}`"


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
            try:
                run = standing_of(history, summary)
            except TesseraError as error:  # an experiment of another version, say
                self._say_once(f"Offers for {history.run.id} were not compared: {error}")
                continue
            if run is None:
                continue
            saving = best_saving(run, self._market(run, now).offers)
            if saving is not None and saving.worth_telling:
                command = launch_command(history.run.root, run, saving.offer)
                told = words(run, saving, command)
                yield offer_alert(run.run_id, run.attempt.id, now, told, step=run.step)

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
                self._say_once(note)
        return self._asked[key][1]

    def _say_once(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            self.say(note)


def ask_market(card: Card, gpus: int) -> Market:
    """What ``tessera plan --gpu CARD`` sees: SkyPilot's catalogs, vast.ai's offers of this moment.

    Where SkyPilot or its task file is missing vast.ai alone is asked, if its key is there; what was
    not asked is in the notes.
    """
    from tessera.cloud.skypilot import TaskFile, catalog_market

    needs = Needs(card, "", gpus, 256.0, None, None, None)
    try:
        file = TaskFile(_TASK)
        file.config["resources"].pop("max_hourly_cost", None)
        file.config["envs"] = {**file.envs, "TESSERA_GPUS": str(gpus)}
        needs = file.needs(card)
        catalog = catalog_market(file, card)
    except TesseraError as error:
        catalog = Market((), (f"SkyPilot's catalogs were not asked for offers: {error}",))
    offers = catalog.offers
    if not any(offer.provider == VAST for offer in offers):
        # Of no type that can be launched: it says which cards vast.ai is asked for, and goes.
        offers = (*offers, Offer(VAST, card.name, card, gpus, 0.0, "catalog", "", "", ""))
    live = with_live(offers, needs)
    real = (offer for offer in live.offers if offer.source == "live" or offer.instance_type)
    return Market(tuple(real), (*catalog.notes, *live.notes))
