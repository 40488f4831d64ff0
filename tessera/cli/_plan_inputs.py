"""What a plan and a launch read first: settings, the root's corpus and runs, offers."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.cloud.offers import VAST, Market, with_live
from tessera.cloud.plan import Corpus, Plan, make_plan
from tessera.cloud.skypilot import TaskFile, age_note, catalog_market, not_fetched
from tessera.cloud.speeds import Measurement, own_measurement, shipped
from tessera.errors import InputError, RetryElsewhereError, TesseraError
from tessera.experiment import Experiment, Pretrain, Sft, load_experiment
from tessera.storage import Root, open_root

if TYPE_CHECKING:
    from tessera.cloud.cards import Card

BUILT_ELSEWHERE_BYTES = 10 * 10**9
"""Text that a recipe reads from which on a laptop and its line are not the place to build it."""
ENOUGH_TRAINING_S = 60.0
"""Seconds of training from which a run's speed says something about the card."""
_TASKS = {
    ("pretrain", False): "pretrain_h100.yaml",
    ("pretrain", True): "pretrain_h100_managed.yaml",
    ("sft", False): "sft_h100.yaml",
    ("sft", True): "sft_h100.yaml",
}


@dataclass(frozen=True)
class Asked:
    """The options that ``tessera plan`` and ``tessera launch`` share."""

    experiment: str
    overrides: tuple[str, ...]
    gpu: str | None
    budget: tuple[float, str] | None
    managed: bool
    bid: float | None
    task: str | None
    provider: str | None
    root: str | None


@dataclass(frozen=True)
class Known:
    """What was found: the plan, and what it was made from."""

    settings: Experiment
    file: TaskFile
    card: Card | None
    plan: Plan
    root: Root
    fingerprint: str | None


def learn(asked: Asked) -> Known:
    """Read everything and work the plan out. Raises ``InputError`` for what cannot be used."""
    settings = load_experiment(asked.experiment, asked.overrides, asked.budget)
    card = _card(asked.gpu)
    file = task_file(settings, asked)
    provider = asked.provider
    if asked.bid is not None:
        _refuse_bid(asked)
        file.bid, provider = asked.bid, VAST.lower()
    root = open_root(asked.root)
    corpus, fingerprint, notes = _corpus(root, settings, file)
    own, unread = _own_runs(root)
    market = _market(file, card, provider)
    budget = settings.budget_usd if isinstance(settings, Pretrain) else None
    plan = make_plan(
        settings,
        market.offers,
        (*own, *shipped()),
        corpus=corpus,
        budget_usd=budget,
        notes=(*market.notes, *notes, *([] if _same_reason(notes, unread) else unread)),
    )
    return Known(settings, file, card, plan, root, fingerprint)


def task_file(settings: Experiment, asked: Asked) -> TaskFile:
    """The task YAML that fits the kind of experiment, or the one that was named."""
    if asked.task is not None:
        return TaskFile(Path(asked.task))
    return TaskFile(Path("sky") / _TASKS[settings.kind, asked.managed])


def _card(text: str | None) -> Card | None:
    from tessera.cloud.cards import CARDS, card_named

    if text is None:
        return None
    card = card_named(text) or card_named(f"{text} SXM")
    if card is None:
        raise InputError(
            f"--gpu {text!r} is no GPU known here; there are "
            f"{', '.join(card.name for card in CARDS)}."
        )
    return card


def _same_reason(notes: list[str], unread: list[str]) -> bool:
    """Whether a root that is not reached was told of already: its reason ends both sentences."""
    said = {note.partition(": ")[2].partition(". The plan")[0] for note in notes}
    return any(reason and reason in sentence for reason in said for sentence in unread)


def _refuse_bid(asked: Asked) -> None:
    if asked.provider not in (None, VAST.lower()):
        raise InputError(
            f"--bid is an offer to vast.ai, and --provider asks for {asked.provider}; leave one "
            "out."
        )
    if not asked.managed:
        raise InputError(
            "--bid rents machines that can be taken away at any moment, which only a managed job "
            "survives; add --managed."
        )
    if asked.bid is not None and not 0 < asked.bid < float("inf"):
        raise InputError(f"--bid is {asked.bid}; expected US dollars an hour, such as 1.60.")


def _market(file: TaskFile, card: Card | None, provider: str | None) -> Market:
    """Offers of the catalogs and of vast.ai, of one provider if it was named."""
    catalog = catalog_market(file, card)
    known = sorted({offer.provider for offer in catalog.offers})
    offers = catalog.offers
    if provider is not None:
        offers = tuple(o for o in offers if o.provider.lower() == provider.lower())
    missing = [name for name in catalog.missing if provider in (None, name.lower())]
    if not offers and missing:
        raise RetryElsewhereError(not_fetched(missing).replace("; is", ", so there is no plan; is"))
    if not offers and provider is not None:
        raise InputError(
            f"{file.path} finds nothing at {provider!r}; it has offers of "
            f"{', '.join(known) or 'nobody'}."
        )
    live = with_live(offers, file.needs(card), bid=file.bid)
    aged = age_note(live.offers)
    return Market(live.offers, (*catalog.notes, *live.notes, *([aged] if aged else [])))


def _corpus(
    root: Root, settings: Experiment, file: TaskFile
) -> tuple[Corpus | None, str | None, list[str]]:
    """What the root holds to train on, its fingerprint, and a sentence if it holds nothing.

    Raises ``InputError`` where the experiment cannot train on what is there.
    """
    from tessera.corpus.manifest import require_fit, resolve

    if not isinstance(settings, Pretrain):
        return None, None, []
    try:
        manifest = resolve(root, settings.data.corpus, settings.data.fingerprint)
    except TesseraError as error:
        taken = "The plan takes it to have just the tokens that are asked for."
        return None, None, [f"{missing_corpus(root, settings, file, error)} {taken}"]
    require_fit(
        manifest,
        vocab_size=settings.model.vocab_size,
        sequence=settings.sequence,
        origin=settings.origin,
    )
    train = manifest.splits["train"]
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    return Corpus(manifest.name, train.tokens, size), manifest.fingerprint, []


def missing_corpus(root: Root, settings: Pretrain, file: TaskFile, error: TesseraError) -> str:
    """What ``error`` about a corpus comes to: who builds it, and where.

    A large one is built on a rented machine, and a task that builds its own needs no advice.
    """
    from tessera.corpus.manifest import find_builds
    from tessera.corpus.recipe import declared_bytes, recipe_for

    name = settings.data.corpus
    if not isinstance(error, InputError) or find_builds(root, name):
        return str(error)
    recipe = recipe_for(name)
    if file.builds_corpus and file.envs["TESSERA_MANIFEST"] == recipe:
        return f"The job of {file.path} builds corpus {name} first, which is not in the root yet."
    size = declared_bytes(recipe)
    if size < BUILT_ELSEWHERE_BYTES:
        return str(error)
    return (
        f"Corpus {name!r} is not built in {root.url}, and its recipe reads {size / 1e9:,.0f} GB: "
        f"build it on a rented machine with `sky launch -c corpus sky/corpus_cpu.yaml --env "
        f"TESSERA_MANIFEST={recipe}` (docs/first-run.md)."
    )


def _own_runs(root: Root) -> tuple[list[Measurement], list[str]]:
    """Speeds of the root's own runs; a root that cannot be read costs a sentence, not the plan."""
    from tessera.runs import open_run
    from tessera.tracking.queries import summarise_whole

    found = []
    try:
        if root.is_absent():
            return [], []
        rows, _ = summarise_whole(root)
        for row in rows:
            long_enough = row.seconds.get("train", 0.0) >= ENOUGH_TRAINING_S
            if row.kind != "pretrain" or not row.tokens_per_s or not long_enough:
                continue
            run = open_run(root, row.run_id)
            machines = {(a.device, a.devices) for a in run.attempts()}
            if len(machines) != 1:  # a mean over two kinds of card is the speed of neither
                continue
            ((device, gpus),) = machines
            day = datetime.datetime.fromtimestamp(row.created_at, datetime.UTC).date()
            one = own_measurement(
                run.experiment, device=device, gpus=gpus, tokens_per_s=row.tokens_per_s,
                run_id=row.run_id, day=day,
            )  # fmt: skip
            found += [one] if one else []
    except TesseraError as error:
        return [], [f"Speeds of your own runs are left out: {error}"]
    return found, []


def base_note(settings: Experiment, root: Root) -> str | None:
    """A sentence if a fine-tuning's base is not in the root."""
    from tessera.runs import find_run

    if not isinstance(settings, Sft):
        return None
    try:
        find_run(root, settings.base, kind="pretrain")
    except TesseraError as error:
        return str(error)
    return None
