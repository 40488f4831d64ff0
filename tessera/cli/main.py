"""``tessera``: build a corpus, describe and train an experiment, interview its voices."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from tessera import __version__
from tessera.cli.common import (
    epilog,
    json_option,
    place_named,
    print_json,
    root_option,
    run_command,
)
from tessera.cli.completion import completion_command

if TYPE_CHECKING:
    from tessera.experiment import Experiment
    from tessera.storage import Root
    from tessera.training.launch import Plan

_RETRY = 75
_ELSEWHERE = {
    "bench": ("tessera.cli.bench", "bench", "Measure this machine's speed and a run's cost."),
    "configure": ("tessera.cli.configure", "configure", "Write and try root, keys and prices."),
    "corpus": ("tessera.cli.corpus", "corpus", "Build and verify token shards."),
    "launch": ("tessera.cli.launch", "launch", "Rent a machine and train there."),
    "plan": ("tessera.cli.plan", "plan", "What a run costs on what can be rented now."),
    "preflight": (
        "tessera.cli.preflight",
        "preflight",
        "Is this machine worth its price? Go or no-go.",
    ),
    "interview": ("tessera.cli.interview", "interview", "Ask a voice the probes; show answers."),
}


class _LazyGroup(click.Group):
    """A group whose larger subcommands live in modules that are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _ELSEWHERE:
            return super().get_command(ctx, name)
        from importlib import import_module

        module, attribute, _ = _ELSEWHERE[name]
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=epilog(
        "tessera corpus build data_manifests/sample.yaml",
        "tessera describe experiments/tessera_1b.yaml",
        "tessera train experiments/smoke.yaml",
    ),
)
@click.version_option(__version__, prog_name="tessera")
def tessera() -> None:
    """Train a language model from scratch and know what every dollar bought."""


tessera.add_command(completion_command("tessera"))

_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting, for example --set optimizer.lr=1e-4; may be repeated.",
)


@tessera.command(
    epilog=epilog(
        "tessera train experiments/smoke.yaml",
        "tessera train experiments/tessera_1b.yaml --root s3://bucket/tessera --set tokens=6553600",
        "tessera train experiments/tessera_1b.yaml --gpus 2",
        "tessera train experiments/tessera_1b_budget.yaml --budget 100",
    )
)
@click.argument("experiment", type=click.Path())
@_set_option
@root_option
@click.option("--run-id", metavar="ID", help="Name the run yourself; also TESSERA_RUN_ID.")
@click.option("--new", is_flag=True, help="Start another run even if this one exists.")
@click.option("--quiet", is_flag=True, help="No progress line.")
@click.option("--gpus", type=int, metavar="N", help="Train on N GPUs of this machine.")
@click.option(
    "--budget", metavar="USD", help="US dollars that the run may cost; also TESSERA_BUDGET_USD."
)
def train(
    experiment: str,
    overrides: tuple[str, ...],
    root: str,
    run_id: str | None,
    new: bool,
    quiet: bool,
    gpus: int | None,
    budget: str | None,
) -> int:
    """Train EXPERIMENT, or continue its unfinished run.

    Under torchrun, or where SkyPilot rented several GPUs or machines, all of them train together.

    Exit codes: 0 done, or its budget is spent; 2 bad input, or a later attempt took over; 3
    diverged; 75 another machine or moment may help.
    """
    from tessera.cli.early import told_early

    with told_early() as hand_over:
        return _train(experiment, overrides, root, run_id, new, quiet, gpus, budget, hand_over)


def _train(
    experiment: str,
    overrides: tuple[str, ...],
    root: str,
    run_id: str | None,
    new: bool,
    quiet: bool,
    gpus: int | None,
    budget: str | None,
    hand_over: Callable[[], None],
) -> int:
    from tessera.experiment import load_experiment
    from tessera.ledger.budget import BUDGET_VARIABLE, choose_budget
    from tessera.storage import open_root

    # Before torch: a typo is told at once.
    given = choose_budget(budget, os.environ.get(BUDGET_VARIABLE))
    settings = load_experiment(experiment, overrides, given)
    store = open_root(root)
    _require_folder(store, settings)
    plan = workers_to_start(gpus)
    if plan is not None:
        import torch.distributed.launcher.api  # noqa: F401 - takes seconds: not after handing over

        from tessera.training.launch import launch

        command = [sys.executable, "-m", "tessera", *sys.argv[1:]]
        hand_over()
        return launch(plan, command, grace_s=settings.preemption.grace_s)
    from tessera.cli.attempts import ask_for_all, place_of
    from tessera.cli.beside import Beside
    from tessera.cloud.machine import describe_machine
    from tessera.training.session import train as run_training
    from tessera.training.workplace import Instruments

    price = settings.price
    machine = describe_machine(
        experiment_price=price.usd_per_hour if price else None,
        experiment_traffic_price=price.usd_per_gb_up if price else None,
        experiment_down_price=price.usd_per_gb_down if price else None,
        ask=os.environ.get("RANK", "0") == "0",
    )
    if machine.price.note:
        click.echo(f"{machine.price.note}; its price is {machine.price.words}.", err=True)
    place = place_of(machine)
    hand_over()
    with Beside(store) as beside:
        instruments = Instruments(ask_price=ask_for_all(machine), began=beside.start)
        result = run_training(
            settings, store, place, run_id=run_id, new=new, quiet=quiet, instruments=instruments
        )
    if os.environ.get("RANK", "0") == "0":  # one of several workers speaks
        try:
            click.echo(f"{result.run.id}: {result.text}")
        except OSError:
            pass  # nobody reads it; the exit code has to arrive all the same
    return result.exit_code


def _require_folder(store: Root, settings: Experiment) -> None:
    """Raise ``InputError`` if the root's folder does not exist: what is trained on lies there."""
    from tessera.errors import InputError
    from tessera.experiment import Pretrain

    if not store.is_absent():
        return
    if isinstance(settings, Pretrain):
        from tessera.corpus.recipe import recipe_for

        name = settings.data.corpus
        missing = f"Corpus {name!r} is not built"
        command = f"tessera corpus build {recipe_for(name)} --root {store.url}"
    else:
        missing = f"Base {settings.base!r} is not trained"
        command = f"tessera train EXPERIMENT --root {store.url}"
    raise InputError(
        f"{missing} in {place_named(store)}; correct --root or TESSERA_ROOT, or begin there with "
        f"`{command}`."
    )


def workers_to_start(gpus: int | None) -> Plan | None:
    """Whether this process starts workers instead of being one; ``gpus`` is the option's number."""
    from tessera.training.launch import Plan, needs_launch

    plan = needs_launch(os.environ)
    if plan is None and gpus is not None and "WORLD_SIZE" not in os.environ:
        plan = Plan.on_this_machine(gpus)
    return plan if plan is not None and plan.nodes * plan.workers > 1 else None


@tessera.command(
    epilog=epilog(
        "tessera describe experiments/tessera_1b.yaml",
        "tessera describe experiments/tessera_1b.yaml --set batch.micro_batch=8 --json",
    )
)
@click.argument("experiment", type=click.Path())
@_set_option
@json_option
def describe(experiment: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Parameters, steps, FLOPs and memory of EXPERIMENT, by arithmetic; nothing runs."""
    from tessera.experiment import load_experiment

    facts = _facts(load_experiment(experiment, overrides))
    if as_json:
        print_json(facts)
        return
    from tessera.cli.describe import print_facts

    print_facts(facts)


def _facts(settings: Any) -> dict[str, Any]:
    from tessera.cli.describe import facts_of

    return facts_of(settings)


def main() -> None:
    """Entry point of the ``tessera`` command."""
    # A damaged file of settings must not be in the way of the command that writes it again.
    code = run_command(tessera, configured=sys.argv[1:2] != ["configure"])
    if code == _RETRY:  # told to go: a thread that waits for a store must not hold the process
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
