"""``tessera launch``: rent a machine for an experiment, after showing what it will cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tessera.cli.common import epilog
from tessera.cli.plan import asked_for, commands_for, offer_options

if TYPE_CHECKING:
    from tessera.cli._plan_inputs import Known
    from tessera.cli._plan_view import Commands
    from tessera.cloud.launch import Order


@click.command(
    epilog=epilog(
        "tessera launch experiments/tessera_1b.yaml",
        "tessera launch experiments/tessera_1b.yaml --managed --bid 1.60 --budget 250",
        "tessera launch experiments/smoke.yaml --task sky/smoke_cpu.yaml --yes",
        "tessera launch --stop tessera-1b-3e79d1a4",
    )
)
@click.argument("experiment", type=click.Path(), required=False)
@offer_options
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--detach", is_flag=True, help="Do not follow the log.")
@click.option("--run-id", envvar="TESSERA_RUN_ID", metavar="ID", help="Name the run yourself.")
@click.option("--stop", "name", metavar="NAME", help="End that cluster or job, and make sure.")
def launch(
    experiment: str | None,
    yes: bool,
    detach: bool,
    run_id: str | None,
    name: str | None,
    **options: Any,
) -> int:
    """Rent a machine and train EXPERIMENT there, after showing the plan and asking.

    The same command continues a run that stopped. Ctrl-C while the machine is being set up gives it
    back; later it only ends the following. A launch that does not start leaves nothing that bills.
    `tessera plan` with the same options is the dry run.

    Exit codes are those of `tessera train`; 130 after Ctrl-C.
    """
    from tessera.errors import InputError

    if experiment is not None and name is not None:
        raise InputError(
            f"{experiment} would be launched and {name or 'nothing'} ended, not both at once; give "
            "an experiment, or --stop with a name."
        )
    if name is not None:
        return _stop(name)
    if experiment is None:
        raise InputError("Give an experiment to launch, or --stop with the name of what to end.")
    return _launch(experiment, options, yes=yes, detach=detach, run_id=run_id)


def _stop(name: str) -> int:
    from tessera.cloud.give_back import stop
    from tessera.cloud.launch import INTERRUPTED
    from tessera.cloud.rent import SkyPilot
    from tessera.cloud.vast import find_key
    from tessera.errors import InputError

    if not name.strip():
        raise InputError(
            "--stop is empty, so nothing was asked or ended; give the name of a cluster or job, "
            "which `sky status` and `sky jobs queue` list."
        )
    who = "SkyPilot and vast.ai" if find_key() else "SkyPilot (no vast.ai key here)"
    click.echo(f"Asking {who} about {name} ...", err=True)
    found = stop(SkyPilot(), name)
    if found.interrupted:
        click.echo(" ".join(found.left), err=True)
        return INTERRUPTED
    if found.ended and found.left:
        click.echo(f"Ended: {', '.join(found.ended)}.")
    found.require()
    click.echo(f"Gone: {', '.join(found.ended)}. Nothing of {name} bills any more.")
    return 0


def _launch(
    experiment: str, options: dict[str, Any], *, yes: bool, detach: bool, run_id: str | None
) -> int:
    from tessera.cli._plan_inputs import base_note, learn
    from tessera.cli._plan_view import print_plan
    from tessera.cloud.launch import check, launch, require_settings
    from tessera.cloud.rent import SkyPilot

    asked = asked_for(experiment, options)
    inside = _inside(experiment)
    _require_run_id(run_id)
    require_settings()
    known = learn(asked)
    _require_reachable(known)
    _require_data(known, base_note(known.settings, known.root))
    commands = commands_for(known, inside, options, run_id)
    _require_somebody(yes)
    print_plan(known.plan, None, limit=5)
    order = _order(known, commands)
    renter = SkyPilot()
    check(order, known.root, renter)
    if not yes:
        _confirm(order)
    return launch(order, known.root, renter, click.echo, detach=detach)


def _require_run_id(run_id: str | None) -> None:
    """A name that training would refuse is refused before a machine is rented for it."""
    from tessera.runs import require_run_id

    if run_id is not None:
        require_run_id(run_id)


def _require_somebody(yes: bool) -> None:
    """Raises ``InputError`` where nobody can be asked, before a server of SkyPilot's starts."""
    import sys

    from tessera.errors import InputError

    if not yes and not sys.stdin.isatty():
        raise InputError("Nobody can be asked here, and this costs money; add --yes to agree.")


def _inside(experiment: str) -> str:
    """The experiment's path as the rented machine has it: relative to what travels there."""
    from tessera.errors import InputError

    here = Path.cwd().resolve()
    try:
        return Path(experiment).resolve().relative_to(here).as_posix()
    except ValueError:
        raise InputError(
            f"{experiment} lies outside {here}, and only that folder travels to the machine; run "
            "this in the repository's root, with an experiment of it."
        ) from None


def _require_reachable(known: Known) -> None:
    """The rented machine writes to the root of the credentials file; it has to be this one."""
    from tessera.cloud.credentials import env_file
    from tessera.cloud.launch import require_settings
    from tessera.errors import InputError
    from tessera.storage import open_root

    written = open_root(require_settings()["TESSERA_ROOT"]).url
    if "://" not in written:
        raise InputError(
            f"The root {written} is a folder of this machine, which a rented one cannot reach; run "
            "`tessera configure` with a bucket such as s3://bucket/tessera."
        )
    if known.root.url != written:
        raise InputError(
            f"The root here is {known.root.url}, and the machine would write to {written} of "
            f"{env_file()}; leave --root and TESSERA_ROOT out, or run `tessera configure`."
        )


def _require_data(known: Known, base: str | None) -> None:
    """What is trained on has to be there, unless the task builds it first."""
    from tessera.cli._plan_inputs import missing_corpus
    from tessera.errors import InputError
    from tessera.experiment import Pretrain

    if base is not None:
        raise InputError(base)
    missing = known.fingerprint is None and not known.file.builds_corpus
    if isinstance(known.settings, Pretrain) and missing:
        from tessera.corpus.manifest import resolve

        data = known.settings.data
        try:
            resolve(known.root, data.corpus, data.fingerprint)
        except InputError as error:
            sentence = missing_corpus(known.root, known.settings, known.file, error)
            raise InputError(sentence) from error


def _order(known: Known, commands: Commands) -> Order:
    from tessera.cloud.launch import Order, cluster_name
    from tessera.errors import InputError, RetryElsewhereError

    line = known.plan.cheapest
    if line is None and known.plan.lines:
        raise InputError(known.plan.why_none)
    if line is None:
        raise RetryElsewhereError(
            "No provider offers a machine that fits, so nothing was rented; try --gpu, --provider, "
            "or a higher max_hourly_cost in the task file."
        )
    return Order(
        experiment=commands.experiment,
        overrides=commands.overrides,
        run_id=commands.run_id,
        name=cluster_name(commands.run_id),
        file=commands.file,
        line=line,
        alternatives=tuple(other.offer for other in known.plan.lines),
        card=commands.card,
        budget_usd=commands.budget_usd,
        managed=commands.managed,
        root_url=known.root.url,
    )


def _confirm(order: Order) -> None:
    """Ask; ``click.Abort`` for no."""
    from tessera.cli._plan_view import place

    offer, line = order.offer, order.line
    about = "" if line.total_usd is None else f", about ${line.total_usd:,.0f} in all"
    what = f"{offer.gpus} x {offer.gpu}" if offer.gpus else "a machine"
    click.confirm(
        f"Rent {what} at {place(offer)} for about ${offer.billed_usd_per_hour:,.2f}/h{about}?",
        abort=True,
    )
