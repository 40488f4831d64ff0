"""``tessera bench``: how fast this machine trains an experiment, and what the run will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tessera.cli.common import epilog, json_option, not_empty, print_json

if TYPE_CHECKING:
    import torch

    from tessera.experiment import Pretrain
    from tessera.ledger.prices import HourlyPrice
    from tessera.training.bench.session import Bench
    from tessera.training.bench.tokens import Batches

_INTERRUPTED = 130


@click.command(
    epilog=epilog(
        "tessera bench --quick",
        "tessera bench --price 2.16",
        "tessera bench experiments/tessera_1b.yaml --only compiled --only fp8 --json",
    )
)
@click.argument("experiment", type=click.Path(), required=False)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting, for example --set batch.micro_batch=8; may be repeated.",
)
@click.option("--quick", is_flag=True, help="The short form: the experiment's settings, projected.")
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    metavar="N",
    help="Measured steps a row: 20 if not given, 5 with --quick.",
)
@click.option("--only", multiple=True, metavar="ROW", help="Only this row; may be repeated.")
@click.option("--price", type=float, metavar="USD", help="US dollars an hour of this machine.")
@click.option(
    "--root",
    envvar="TESSERA_ROOT",
    metavar="URL",
    callback=not_empty,
    help="Take tokens from the experiment's corpus in this root; also TESSERA_ROOT.",
)
@json_option
@click.pass_context
def bench(
    context: click.Context,
    experiment: str | None,
    overrides: tuple[str, ...],
    quick: bool,
    steps: int | None,
    only: tuple[str, ...],
    price: float | None,
    root: str | None,
    as_json: bool,
) -> int:
    """Measure how fast this machine trains EXPERIMENT, and what the run will cost.

    Without EXPERIMENT: the reference model of a billion parameters on a GPU, a tiny one on a CPU.
    Ctrl-C prints what was measured so far.
    """
    from tessera.errors import InputError

    if quick and only:
        raise InputError(
            "--only chooses rows of the ladder, which --quick does not climb; drop one."
        )
    from tessera.cli._bench_view import print_document, progress_view
    from tessera.cloud.machine import describe_machine
    from tessera.model.device import best_device
    from tessera.training.bench.embedded import experiment_to_measure
    from tessera.training.bench.ladder import WARM_UP, chosen
    from tessera.training.bench.session import QUICK_STEPS, STEPS, Bench, Subject

    device = best_device()
    settings, source = experiment_to_measure(experiment, overrides, device.type)
    techniques = chosen(only)
    count = steps or (QUICK_STEPS if quick else STEPS)
    machine = describe_machine(
        experiment_price=settings.price.usd_per_hour if settings.price else None
    )
    told = context.get_parameter_source("root") is ParameterSource.COMMANDLINE
    if told and experiment is None and not any(o.startswith("data.corpus=") for o in overrides):
        raise InputError(
            "--root says where the experiment's corpus is, and no experiment was given; name one, "
            "add --set data.corpus=NAME, or drop --root for random tokens."
        )
    batches = _batches(settings, root, told, device, count + WARM_UP)
    subject = Subject(
        settings, source, batches, device, machine.device, _price(price, machine.price)
    )
    with progress_view() as progress:
        session = Bench(subject, progress, quick=quick)
        if quick:
            session.quick(count)
        else:
            session.ladder(techniques, count)
    if as_json:
        print_json(session.document)
    else:
        print_document(session.document)
    return _exit_code(session)


def _price(option: float | None, known: HourlyPrice) -> HourlyPrice:
    """The option, else what the machine or the experiment says."""
    import math

    from tessera.errors import InputError
    from tessera.ledger.prices import HourlyPrice

    if option is None:
        return known
    if not (math.isfinite(option) and option >= 0):
        raise InputError(f"--price is {option}; expected US dollars an hour, such as 2.16.")
    return HourlyPrice(option, "--price")


def _batches(
    experiment: Pretrain, root: str | None, told: bool, device: torch.device, count: int
) -> Batches:
    """Tokens of the corpus in ``root``; random ones without a root.

    Random ones too where only the environment names a root, and it does not hold the corpus: who
    did not ask for it should not need it. ``told``: the root was given as an option.
    """
    from dataclasses import replace

    from tessera.errors import InputError
    from tessera.storage import open_root
    from tessera.training.bench.tokens import corpus_batches, random_batches

    if root is None:
        return random_batches(experiment, device)
    try:
        return corpus_batches(experiment, open_root(root), device, count=count)
    except InputError as error:
        if told:
            raise
        batches = random_batches(experiment, device)
        return replace(batches, source=f"{batches.source} ({str(error).rstrip('.')})")


def _exit_code(session: Bench) -> int:
    from tessera.errors import InputError

    document: dict[str, Any] = session.document
    if document["interrupted"]:
        return _INTERRUPTED
    if document["best"] is None:
        raise InputError(
            "Nothing could be measured here, for the reasons above; try another --only, or --set "
            "batch.micro_batch=1 if memory ran out."
        )
    return 0
