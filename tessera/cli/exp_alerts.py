"""``tessera-exp alerts``: what happened to runs that somebody should know; record and send it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from tessera.cli.common import Seconds, epilog, json_option, place_named, print_json, root_option
from tessera.cli.run_names import RunName

if TYPE_CHECKING:
    from tessera.storage import Root
    from tessera.tracking.alerts import Alert
    from tessera.tracking.watch import Look, Watcher


@click.command(
    epilog=epilog(
        "tessera-exp alerts",
        "tessera-exp alerts --watch --every 120",
        "tessera-exp alerts --run smoke --json | jq -r '.[].text'",
        "tessera-exp alerts --watch --offers",
    )
)
@click.option(
    "--run", metavar="RUN", type=RunName(), help="Only this run: its id, or the beginning of it."
)
@click.option("--watch", is_flag=True, help="Go on looking until Ctrl-C.")
@click.option(
    "--every",
    type=Seconds(1.0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks of --watch.",
)
@click.option(
    "--offers", is_flag=True, help="Also look for cheaper offers of the running runs' GPU."
)
@root_option
@json_option
def alerts(
    run: str | None, watch: bool, every: float, offers: bool, root: str, as_json: bool
) -> int:
    """Deaths, spikes, budgets, endings: list the alerts, newest first; record and send new ones.

    New ones are recorded in the root and posted to the URLs in TESSERA_ALERT_WEBHOOK; of several
    watchers one sends. With --watch --json each new alert is a line.

    Exit codes: 0 nothing wrong; 2 bad input or a damaged run; 75 a webhook did not take an alert.
    """
    from tessera.runs import find_run
    from tessera.storage import open_root
    from tessera.tracking.watch import Watcher
    from tessera.tracking.webhooks import webhooks

    to = webhooks()
    store = open_root(root)
    if store.is_absent():
        from tessera.errors import InputError

        raise InputError(f"No runs are in {place_named(store)}; correct --root or TESSERA_ROOT.")
    run_id = None if run is None else find_run(store, run).id
    watcher = Watcher(store, to, run_id)
    if offers:
        from tessera.cli._exp_offers import OfferWatch

        watcher.more = OfferWatch(click.echo if not as_json else _to_stderr)
    now = time.time()
    look = watcher.look(now)
    damaged = _list(store, run_id, now, as_json=as_json, lines=watch)
    look = replace(look, troubles=tuple(dict.fromkeys((*look.troubles, *damaged))))
    if not as_json:
        _tell_sent(look, watcher)
    if not watch:
        return _tell_troubles(look)
    _tell_troubles(look)
    return _watch(watcher, every, as_json, look)


def _to_stderr(text: str) -> None:
    click.echo(text, err=True)


def _list(root: Root, run_id: str | None, now: float, *, as_json: bool, lines: bool) -> list[str]:
    """Print what is recorded; returns sentences about records that are damaged."""
    from tessera.cli._exp_alerts_view import as_document, show_alerts
    from tessera.tracking.alert_records import read_alerts, recorded_alerts

    found = [one for records in recorded_alerts(root, run_id).values() for one in records]
    damaged: list[str] = []
    read = read_alerts(root, found, damaged)
    if as_json and lines:
        _print_lines(read[::-1])
    elif as_json:
        print_json([as_document(alert) for alert in read])
    elif read:
        show_alerts(read, now)
    else:
        click.echo(f"No alerts in {root.url}.")
    return damaged


def _tell_sent(look: Look, watcher: Watcher) -> None:
    """A line about what this look added, and whether anybody was told."""
    from tessera.cli._exp_figures import plural

    sent = sum(sending.trouble is None for sending in look.sendings)
    if watcher.webhooks:
        told = f", {plural(sent, 'message')} sent" if sent or look.new else ""
    else:
        told = "; none was sent, since TESSERA_ALERT_WEBHOOK is not set" if look.new else ""
    if look.new or sent:
        click.echo(f"{plural(len(look.new), 'new alert')}{told}.")


def _tell_troubles(look: Look) -> int:
    """What went wrong, on stderr; returns the exit code."""
    from tessera.cli._exp_alerts_view import trouble_sentence
    from tessera.errors import DamagedError, StoreError

    failed = [sending for sending in look.sendings if sending.trouble is not None]
    for text in (*look.troubles, *map(trouble_sentence, failed)):
        click.echo(f"Error: {text}", err=True)
    if failed:
        return StoreError.exit_code
    return DamagedError.exit_code if look.troubles else 0


def _watch(watcher: Watcher, every: float, as_json: bool, first: Look) -> int:
    """Look again and again; a store that does not answer is said and asked again."""
    from tessera.cli._exp_alerts_view import when
    from tessera.errors import StoreError

    said = set(first.troubles)
    if not as_json:
        click.echo(f"Looking every {every:g} s; Ctrl-C stops the looking, not a run.", err=True)
    try:
        while True:
            time.sleep(every)
            try:
                look = watcher.look(time.time())
            except StoreError as error:
                click.echo(f"Error: {error} Looking again in {every:g} s.", err=True)
                continue
            if as_json:
                _print_lines(look.new)
            else:
                for alert in look.new:
                    click.echo(f"{when(alert.at)}  {alert.run_id}  {alert.kind}: {alert.text}")
            fresh = tuple(text for text in look.troubles if text not in said)
            said.update(fresh)
            _tell_troubles(replace(look, troubles=fresh))
    except KeyboardInterrupt:
        click.echo("Stopped looking; the runs go on.", err=True)
        return 0


def _print_lines(found: Sequence[Alert]) -> None:
    import json

    from tessera.cli._exp_alerts_view import as_document

    for alert in found:
        click.echo(json.dumps(as_document(alert), ensure_ascii=False))
