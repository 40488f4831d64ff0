"""What ``tessera plan`` and ``tessera launch`` show: the table, the sentences, the document."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import textwrap
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tessera.cloud.cards import Card
from tessera.cloud.launch import cluster_name, job_envs, sky_command
from tessera.cloud.offers import Offer, how_to_enable
from tessera.cloud.plan import Line, Plan, Work
from tessera.cloud.skypilot import TaskFile
from tessera.ledger.dollars import as_typed, dollars
from tessera.ledger.traffic import size

VERSION = 1
_WIDTH = 130
_TITLES = (
    "", "offer", "GPU", "$/h", "price", "tokens/s", "speed", "hours", "machine", "traffic", "disk",
    "total",
)  # fmt: skip
_NARROW = ("", "offer", "GPU", "$/h", "tokens/s", "hours", "total")


@dataclasses.dataclass(frozen=True)
class Commands:
    """How each offer is launched: what both kinds of command need to name."""

    file: TaskFile
    experiment: str
    overrides: tuple[str, ...]
    gpu: str | None
    card: Card | None
    budget_usd: float | None
    managed: bool
    bid: float | None
    task: str | None
    provider: str | None
    run_id: str

    def of(self, offer: Offer) -> dict[str, str]:
        """``tessera launch`` and the plain SkyPilot command.

        A managed job names no provider, so that it may go on wherever there is a machine.
        """
        words = ["tessera", "launch", self.experiment]
        provider = self.provider or ("" if self.managed else offer.provider.lower())
        words += ["--provider", provider] if provider else []
        for override in self.overrides:
            words += ["--set", override]
        options = (("--gpu", self.gpu), ("--task", self.task))
        numbers = (("--budget", self.budget_usd), ("--bid", self.bid))
        for name, text in options:
            words += [name, text] if text else []
        for name, number in numbers:
            words += [name, f"{number:g}"] if number is not None else []
        words += ["--managed"] if self.managed else []
        envs = job_envs(
            self.experiment,
            self.overrides,
            self.run_id,
            offer.catalog_usd_per_hour,
            self.budget_usd,
            self.card,
        )
        name = cluster_name(self.run_id)
        plain = sky_command(self.file, offer, envs, name=name, managed=self.managed)
        return {"tessera": shlex.join(words), "sky": plain}


def print_plan(plan: Plan, commands: Commands | None, limit: int) -> None:
    """Table, sentences, and the command of each offer, the cheapest in full.

    Without ``commands``, where one of them has been given already, the table and the sentences.
    """
    wide = _WIDTH if plan.budget_usd is None else _WIDTH + 12
    console = _console(wide)
    narrow = console.width < wide - 12
    console.print(_heading(plan), markup=False)
    if plan.lines:
        console.print(_table(plan, limit, narrow=narrow))
        if len(plan.lines) > limit:
            console.print(f"{len(plan.lines) - limit} more with --limit {len(plan.lines)}.")
    else:
        console.print("No offer that fits is known here.", markup=False)
    if narrow and any(line.speed.how == "projected" for line in plan.lines[:limit]):
        console.print(
            "~ is projected, not measured. A wider terminal shows the parts of the total."
        )
    for sentence in _sentences(plan):
        console.print(sentence, markup=False, soft_wrap=False)
    if commands is not None:
        _print_commands(console, plan, commands, limit)


def _console(width: int) -> Console:
    told = os.environ.get("COLUMNS", "").isdigit()
    return Console(width=None if told or sys.stdout.isatty() else width, highlight=False)


def _heading(plan: Plan) -> str:
    work, name = plan.work, plan.experiment.name
    if work is None and plan.budget_usd is not None:
        return f"{name}: as many tokens as ${plan.budget_usd:,.2f} pay for"
    if work is None:
        return f"{name}: fine-tuning"
    down, up = size(work.down_bytes), size(work.up_bytes)
    return (
        f"{name}: {work.tokens:,} tokens; {down} of shards to fetch, {work.checkpoints:,} "
        f"checkpoints of {size(work.checkpoint_bytes)} to send ({up})"
    )


def _table(plan: Plan, limit: int, *, narrow: bool) -> Table:
    """``narrow`` keeps what is needed to choose, for a terminal of 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    words = ("offer", "GPU", "price", "speed")
    shown = _NARROW if narrow else _TITLES
    for title in shown:
        side: Literal["left", "right"] = "left" if title in words else "right"
        least = 20 if title == "offer" else None
        table.add_column(title, justify=side, no_wrap=title != "offer", min_width=least)
    if plan.budget_usd is not None:
        table.add_column(
            f"{as_typed(plan.budget_usd)} pays", justify="right", no_wrap=True, min_width=9
        )
    for number, line in enumerate(plan.lines[:limit], 1):
        cells = _row(number, line, plan)
        named = dict(zip(_TITLES, cells, strict=False))
        if narrow and line.speed.how == "projected":
            named["tokens/s"] = f"~ {named['tokens/s']}"
        table.add_row(*(named[title] for title in shown), *cells[len(_TITLES) :])
    return table


def _row(number: int, line: Line, plan: Plan) -> list[str]:
    offer, speed = line.offer, line.speed
    nodes = f"{offer.nodes} x " if offer.nodes > 1 else ""
    gpus = f"{offer.gpus} x " if offer.gpus > 1 else ""
    total = "" if line.whole or line.total_usd is None or line.capped else "> "
    cells = [
        str(number),
        place(offer),
        f"{nodes}{gpus}{offer.gpu}",
        f"{offer.usd_per_hour * offer.nodes:,.2f}",
        _source(offer),
        "?" if speed.tokens_per_s is None else f"{speed.tokens_per_s:,.0f}",
        speed.how,
        "?" if line.hours is None else f"{line.hours:,.1f}",
        _usd(line.machine_usd),
        _usd(line.traffic_usd),
        _usd(line.storage_usd),
        f"{total}{_usd(line.total_usd)}",
    ]
    if plan.budget_usd is not None:
        cells.append(_paid_for(line))
    return cells


def _paid_for(line: Line) -> str:
    """The tokens of a budget; ``<`` where traffic or disk that is not told makes them fewer."""
    if line.budget is not None and line.budget.eaten_up:
        return "nothing"
    tokens = line.budget_tokens
    if not tokens:
        return "?" if tokens is None else "nothing"
    less = "" if line.whole else "< "
    return f"{less}{tokens / 1e9:,.2f}B" if tokens >= 1e7 else f"{less}{tokens / 1e6:,.3g}M"


def place(offer: Offer) -> str:
    """Provider and region, how often the host kept its word, whether SkyPilot may rent there."""
    kept = f", {offer.reliability:.1%}" if offer.reliability is not None else ""
    off = " (not enabled)" if offer.enabled is False else ""
    return f"{offer.provider} {offer.region}{kept}{off}"


def _source(offer: Offer) -> str:
    word = "now" if offer.source == "live" else "catalog"
    return f"bid, {word}" if offer.bid else word


def _usd(value: float | None) -> str:
    return "?" if value is None else f"{value:,.2f}"


def _sentences(plan: Plan) -> list[str]:
    best = plan.lines[0] if plan.lines else None
    offers = [line.offer for line in plan.lines]
    said = []
    if best is not None and best.speed.tokens_per_s is not None:
        said.append(f"Speed of 1: {best.speed.how}; {best.speed.basis}.")
    if best is not None and best.loss_usd is not None:
        said.append(
            f"Losing the machine of 1 costs about ${best.loss_usd:,.2f} each time: half a "
            "checkpoint interval is trained again, state and shards are fetched again."
        )
    if any(line.total_usd is not None for line in plan.lines):
        said.append(
            "Not in the totals: minutes of provisioning and installation, lost machines, and what "
            "your bucket bills. ? is not told by the provider."
        )
    said += _about_budget(plan)
    if best is not None and all(line.offer.enabled is None for line in plan.lines):
        said.append("Which of these providers you may rent from is not known: run `sky check`.")
    off = dict.fromkeys(o.provider for o in offers if o.enabled is False)
    said += [f"{how_to_enable(provider)}." for provider in off]
    if any(line.offer.source == "live" for line in plan.lines):
        said.append(
            "SkyPilot rents by type, so which of vast.ai's machines it takes is not chosen here; a "
            "wrong GPU is refused on the machine, for minutes of its price (sky/README.md)."
        )
    return [*said, *plan.notes]


def _about_budget(plan: Plan) -> list[str]:
    """What is kept back of a budget, and what its tokens leave out."""
    left = [line for line in plan.lines if line.budget and not line.budget.eaten_up]
    if plan.budget_usd is None or not left:
        return []
    kept = sorted(line.budget.reserve_usd for line in left if line.budget)
    least, most = dollars(kept[0]), dollars(kept[-1])
    between = least if least == most else f"{least} to {most}"
    told = f"Kept back of {as_typed(plan.budget_usd)} for the end of the run: {between}"
    said = [f"{told}, by the price of an hour (docs/budget.md)."]
    if any(line.tokens and line.capped and not line.whole for line in left):
        said.append(
            "< marks tokens that traffic and disk, whose price is not told, make fewer; the run "
            "costs no more than its budget all the same."
        )
    return said


def _print_commands(console: Console, plan: Plan, commands: Commands, limit: int) -> None:
    best = plan.cheapest
    if best is None and plan.why_none:
        console.print(f"\nNone of these can be launched: {plan.why_none}", markup=False)
    shown = [(n, line) for n, line in enumerate(plan.lines[:limit], 1) if line.hindrance is None]
    if best is not None:
        both = commands.of(best.offer)
        print()
        print(f"Launch the cheapest:\n\n  {both['tessera']}\n")
        wrapped = textwrap.wrap(
            both["sky"], _WIDTH - 6, break_long_words=False, break_on_hyphens=False
        )
        print("or with SkyPilot alone:\n\n  " + " \\\n    ".join(wrapped))
    others: dict[str, list[str]] = {}
    for number, line in shown:
        if line is not best:
            others.setdefault(commands.of(line.offer)["tessera"], []).append(str(number))
    for command, numbers in others.items():
        if best is None or command != commands.of(best.offer)["tessera"]:
            console.print(f"{', '.join(numbers)}: {command}", markup=False, soft_wrap=True)


def document(plan: Plan, commands: Commands) -> dict[str, Any]:
    """The same for programs; keys are stable."""
    work = dataclasses.asdict(plan.work) if isinstance(plan.work, Work) else None
    return {
        "version": VERSION,
        "experiment": {"name": plan.experiment.name, "kind": plan.experiment.kind},
        "work": work,
        "budget_usd": plan.budget_usd,
        "offers": [_offer(line, commands) for line in plan.lines],
        "notes": list(plan.notes),
    }


def _offer(line: Line, commands: Commands) -> dict[str, Any]:
    offer = dataclasses.asdict(line.offer)
    offer["card"] = line.offer.card.name if line.offer.card else None
    return {
        **offer,
        "tokens_per_s": line.speed.tokens_per_s,
        "speed": line.speed.how,
        "speed_basis": line.speed.basis,
        "tokens": line.tokens,
        "hours": line.hours,
        "machine_usd": line.machine_usd,
        "traffic_usd": line.traffic_usd,
        "storage_usd": line.storage_usd,
        "total_usd": line.total_usd,
        "total_is_whole": line.whole,
        "loss_usd": line.loss_usd,
        "budget_tokens": line.budget_tokens,
        "reserve_usd": None if line.budget is None else line.budget.reserve_usd,
        "hindrance": line.hindrance,
        "commands": commands.of(line.offer) if line.hindrance is None else None,
    }
