"""``tessera-exp``: what the runs of a root are worth and what they cost; promote one of them."""

from __future__ import annotations

from dataclasses import asdict

import click

from tessera import __version__
from tessera.cli import (
    exp_alerts,
    exp_compare,
    exp_list,
    exp_notes,
    exp_report,
    exp_server,
    exp_tail,
    exp_ui,
)
from tessera.cli.common import (
    Seconds,
    epilog,
    json_option,
    place_named,
    plain,
    print_json,
    provider_named,
    root_option,
    run_command,
    tell_damaged,
)
from tessera.cli.completion import completion_command
from tessera.cli.run_names import run_argument

_tracking_option = click.option(
    "--tracking-uri",
    metavar="URI",
    help="MLflow server or database; else MLFLOW_TRACKING_URI, else mlflow.db in a local root.",
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=epilog(
        "tessera-exp list --sort cost",
        "tessera-exp show smoke",
        "tessera-exp sync --root s3://bucket/tessera",
        "tessera-exp promote smoke-sft-warm --adapter ep3",
    ),
)
@click.version_option(__version__, prog_name="tessera-exp")
def exp() -> None:
    """Compare runs by loss, dollars and time; sync them into MLflow; promote an adapter."""


for _command in (
    exp_list.list_, *exp_compare.COMMANDS, *exp_notes.COMMANDS, exp_alerts.alerts, exp_tail.tail,
    exp_report.report, exp_ui.ui, exp_server.server, completion_command("tessera-exp"),
):  # fmt: skip
    exp.add_command(_command)


@exp.command(epilog=epilog("tessera-exp show smoke", "tessera-exp show smoke-1a2b3c4d --json"))
@run_argument
@root_option
@json_option
def show(run: str, root: str, as_json: bool) -> None:
    """Settings, attempts, dollars by category, losses, adapters and interviews of RUN.

    RUN is a run id, its beginning, or the name of an experiment that has one run.
    """
    from tessera.cli._exp_detail import detail_of
    from tessera.runs import find_run
    from tessera.storage import open_root

    store = open_root(root)
    detail = detail_of(store, find_run(store, run))
    if as_json:
        print_json(plain(asdict(detail.summary) | detail.rest))
        return
    from tessera.cli._exp_view import show_detail

    show_detail(detail)


@exp.command(
    epilog=epilog(
        "tessera-exp sync",
        "tessera-exp sync --root s3://bucket/tessera",
        "tessera-exp sync --follow --run smoke --until-finished",
    )
)
@root_option
@_tracking_option
@click.option("--run", "runs", multiple=True, metavar="RUN", help="Only this one; repeatable.")
@click.option("--follow", is_flag=True, help="Sync again and again until Ctrl-C.")
@click.option(
    "--every",
    "every_s",
    type=Seconds(0.05),
    default=30.0,
    show_default=True,
    metavar="S",
    help="With --follow: seconds from one sync to the next.",
)
@click.option("--until-finished", is_flag=True, help="With --follow and --run: leave at its end.")
def sync(
    root: str,
    tracking_uri: str | None,
    runs: tuple[str, ...],
    follow: bool,
    every_s: float,
    until_finished: bool,
) -> int:
    """Replay the root into MLflow; a second sync adds nothing.

    Notes, tags and deletions made in MLflow become records of the root; what cannot is named.
    Damaged runs are left out and named on stderr (exit 2). --follow survives a server that goes
    away.
    """
    from tessera.cli import _exp_sync
    from tessera.errors import InputError
    from tessera.storage import open_root
    from tessera.tracking.server import default_uri

    if until_finished and not (follow and runs):
        raise InputError("--until-finished waits for runs; give --follow and --run RUN with it.")
    if follow:
        return _exp_sync.follow(root, tracking_uri, runs, every_s, until_finished)
    store = open_root(root)
    damaged = _exp_sync.once(store, tracking_uri, runs)
    if not (tracking_uri or default_uri(store)).startswith(("http://", "https://")):
        click.echo(f"Look at them: tessera-exp ui --root {store.url}")
    return tell_damaged(damaged)


@exp.command(
    epilog=epilog(
        "tessera-exp promote smoke-sft-warm --adapter ep3",
        'tessera-exp promote smoke-sft-warm --adapter ep3 --override "demo without interview"',
    )
)
@run_argument
@click.option("--adapter", required=True, metavar="NAME", help="Adapter of RUN, such as ep3.")
@click.option("--alias", default="champion", show_default=True, help="The alias it shall carry.")
@click.option("--override", metavar="REASON", help="Overrule the gate; the reason is recorded.")
@root_option
@_tracking_option
def promote(
    run: str,
    adapter: str,
    alias: str,
    override: str | None,
    root: str,
    tracking_uri: str | None,
) -> None:
    """Give an adapter of RUN an alias, if its interviews let it pass the gate.

    A fatal answer, an unanswered safety probe or no interview of these weights refuses (exit 2).
    """
    from tessera.cli._exp_progress import run_progress
    from tessera.promotion.registry import check
    from tessera.promotion.registry import promote as give
    from tessera.runs import find_run
    from tessera.storage import open_root
    from tessera.tracking.replay import sync as replay

    store = open_root(root)
    found = find_run(store, run)
    check(found, adapter, alias, override)  # a refusal needs no MLflow and is told at once
    with run_progress("syncing") as progress:
        report = replay(store, tracking_uri, progress, only=[found.id])
        given = give(store, found, adapter, alias, override, tracking_uri)
    before = f" (before: {given.previous})" if given.previous else ""
    score = "without an interview" if given.score is None else f"interview score {given.score:.2f}"
    click.echo(f"{given.who} is {given.alias}{before}, {score}, record {given.path}.")
    if given.refusals:
        click.echo(f"The gate was overruled: {given.override} (it said: {given.refusals[0]}).")
    click.echo(f'Load it: mlflow.pyfunc.load_model("{given.uri}").predict(["Hello"])')
    click.echo(f"with MLFLOW_TRACKING_URI={report.tracking_uri}")


@exp.command(
    epilog=epilog(
        "tessera-exp reconcile",
        "tessera-exp reconcile --yes --json | jq .idle_usd_per_hour",
        "tessera-exp reconcile --provider vast --root s3://bucket/tessera",
    )
)
@root_option
@click.option(
    "--provider",
    metavar="NAME",
    callback=provider_named,
    help="Only this one, such as vast; else all.",
)
@click.option("--yes", is_flag=True, help="Record what was billed without asking.")
@json_option
def reconcile(root: str, provider: str | None, yes: bool, as_json: bool) -> int:
    """Replace estimated dollars by what was billed, and find machines that bill for nobody.

    vast.ai is asked for its charges and instances; SkyPilot's records of other providers are shown
    as what they are, a catalog's price. Both figures are kept; run it as often as you like.

    Exit codes: 0 nothing wrong; 3 a machine bills although no run uses it; 2 bad input or a damaged
    record; 75 a provider did not answer, or could not be asked though machines may bill there.
    """
    from tessera.cli import _reconcile_view as view
    from tessera.cli._reconcile import reconcile as compare
    from tessera.cli._reconcile import record
    from tessera.errors import InputError
    from tessera.storage import open_root

    store = open_root(root)
    if store.is_absent():  # else every machine would seem to bill for nobody
        raise InputError(f"No runs are in {place_named(store)}; correct --root or TESSERA_ROOT.")
    found = compare(store, provider)
    fresh = sum(line.fresh for line in found.lines)
    if as_json:
        if yes:
            record(store, found.lines)
        print_json(plain(view.as_document(found, recorded=yes)))
    else:
        view.show(found)
        if fresh and (yes or _confirmed(fresh)):
            click.echo(f"Recorded {record(store, found.lines)} in {store.url}/bills.")
    for error in found.errors:
        click.echo(f"Error: {error}", err=True)
    code = tell_damaged(found.damaged)
    codes = [error.exit_code for error in found.errors]
    return max(codes, default=0) or code or (_IDLE if found.idle else 0)


_IDLE = 3


def _confirmed(fresh: int) -> bool:
    """Whether the person at the terminal wants them recorded; nobody there means no."""
    import sys

    if not sys.stdin.isatty():
        click.echo(f"Nothing was recorded ({fresh} new); --yes records it.")
        return False
    return click.confirm(f"Record {fresh} of these, in place of the estimates?")


def main() -> None:
    """Entry point of the ``tessera-exp`` command."""
    raise SystemExit(run_command(exp, configured=True))
