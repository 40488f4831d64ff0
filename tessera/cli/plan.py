"""``tessera plan``: what an experiment will cost on what can be rented now."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tessera.cli.common import epilog, json_option, not_empty, print_json, provider_named

if TYPE_CHECKING:
    from tessera.cli._plan_inputs import Asked, Known
    from tessera.cli._plan_view import Commands

F = TypeVar("F", bound=Callable[..., Any])


def offer_options(function: F) -> F:
    """What ``tessera plan`` and ``tessera launch`` share, ``--help`` in this order."""
    options = (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override one setting, for example --set tokens=6553600; may be repeated.",
        ),
        click.option("--gpu", metavar="NAME", help="Another GPU than the task's: H200, H100 NVL."),
        click.option(
            "--provider",
            metavar="NAME",
            callback=provider_named,
            help="Offers of this provider alone: vast, runpod, lambda.",
        ),
        click.option("--budget", metavar="USD", help="US dollars that the run may cost."),
        click.option(
            "--managed", is_flag=True, help="As a managed job: lost machines are replaced."
        ),
        click.option(
            "--bid",
            type=float,
            metavar="USD",
            help="US dollars an hour bid at vast.ai, and rented there alone; --managed.",
        ),
        click.option("--task", metavar="FILE", help="Another task YAML than the kind's own."),
        click.option(
            "--root",
            envvar="TESSERA_ROOT",
            metavar="URL",
            callback=not_empty,
            help="Where corpora and runs are; else that of `tessera configure`; also TESSERA_ROOT.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    epilog=epilog(
        "tessera plan experiments/tessera_1b.yaml",
        "tessera plan experiments/tessera_1b.yaml --gpu H200 --budget 200",
        "tessera plan experiments/tessera_1b.yaml --managed --bid 1.60 --json",
    )
)
@click.argument("experiment", type=click.Path())
@offer_options
@click.option(
    "--limit", type=click.IntRange(min=1), default=10, show_default=True, metavar="N",
    help="Offers shown.",
)  # fmt: skip
@json_option
def plan(experiment: str, limit: int, as_json: bool, **options: Any) -> None:
    """Hours and dollars of EXPERIMENT on what can be rented now, the cheapest first.

    Prices are SkyPilot's catalogs' and, where vast.ai's key is, its offers of this moment. Speeds
    are measured, or are called a projection. Nothing is rented.

    Exit codes: 0; 2 what cannot be used; 75 no prices could be had.
    """
    known = learn_from(experiment, options)
    from tessera.cli._plan_view import document, print_plan

    commands = commands_for(known, experiment, options)
    if as_json:
        print_json(document(known.plan, commands))
    else:
        print_plan(known.plan, commands, limit)


def asked_for(experiment: str, options: dict[str, Any]) -> Asked:
    """The shared options as one value. Raises ``InputError`` for what cannot be handed over."""
    import os

    from tessera.cli._plan_inputs import Asked
    from tessera.ledger.budget import BUDGET_VARIABLE, choose_budget

    _refuse_line_breaks(options["overrides"])
    budget = choose_budget(options["budget"], os.environ.get(BUDGET_VARIABLE))
    names = ("overrides", "gpu", "managed", "bid", "task", "provider", "root")
    return Asked(experiment, budget=budget, **{name: options[name] for name in names})


def _refuse_line_breaks(overrides: tuple[str, ...]) -> None:
    """The job reads its overrides from one variable, a line each."""
    from tessera.errors import InputError

    for override in overrides:
        if "\n" in override:
            key = override.split("=", 1)[0]
            raise InputError(
                f"--set {key} has a line break in its value, which does not travel to a rented "
                "machine; write it in one line, or into the experiment file."
            )


def learn_from(experiment: str, options: dict[str, Any]) -> Known:
    """The plan, and what it was made from."""
    from tessera.cli._plan_inputs import learn

    return learn(asked_for(experiment, options))


def commands_for(
    known: Known, experiment: str, options: dict[str, Any], run_id: str | None = None
) -> Commands:
    """How the plan's offers are launched."""
    from tessera.cli._plan_view import Commands
    from tessera.cloud.launch import run_id_of
    from tessera.cloud.offers import VAST

    gpu = known.file.needs(known.card).gpus > 0
    # A task that builds its corpus first: the id must not change once it has done so.
    fingerprint = None if known.file.builds_corpus else known.fingerprint
    given = asked_for(experiment, options).budget
    return Commands(
        file=known.file,
        experiment=experiment,
        overrides=options["overrides"],
        gpu=options["gpu"],
        card=known.card,
        budget_usd=None if given is None else given[0],
        managed=options["managed"],
        bid=options["bid"],
        task=options["task"],
        provider=options["provider"] or (None if options["bid"] is None else VAST.lower()),
        run_id=run_id or run_id_of(known.settings, fingerprint, gpu=gpu),
    )
