"""``tessera-exp ui``: MLflow's page with the runs of a root, opened where one looks first."""

from __future__ import annotations

import os
import re
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tessera.cli.common import epilog, place_named, root_option

if TYPE_CHECKING:
    from tessera.storage import Root
    from tessera.tracking.server import Server


@click.command(
    epilog=epilog(
        "tessera-exp ui",
        "tessera-exp ui --root s3://bucket/tessera --port 5000",
        "tessera-exp ui --tracking-uri https://mlflow.example.com",
    )
)
@root_option
@click.option("--tracking-uri", metavar="URI", help="As for sync; an http server is only opened.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port on 127.0.0.1; else a free one.")
@click.option("--no-sync", is_flag=True, help="Show what MLflow has already.")
@click.option("--no-open", is_flag=True, help="Print the address and open no browser.")
def ui(root: str, tracking_uri: str | None, port: int | None, no_sync: bool, no_open: bool) -> int:
    """Sync, start MLflow on this machine and open its page on "Loss vs dollars".

    It runs until Ctrl-C and leaves no process behind.
    """
    from tessera.errors import InputError
    from tessera.storage import open_root
    from tessera.tracking.server import connect, default_uri
    from tessera.tracking.serving import choose_port, require_mlflow

    require_mlflow()
    store = open_root(root)
    if store.is_absent() and not no_sync:
        raise InputError(f"No runs are in {place_named(store)}; correct --root or TESSERA_ROOT.")
    uri = tracking_uri or default_uri(store)
    remote = uri.startswith(("http://", "https://"))
    free = None if remote else choose_port(port)  # told before a sync of minutes
    if not no_sync:
        _sync(store, uri)
    server = connect(store, uri)
    if free is None:
        _show(uri, server, open_it=not no_open)
        return 0
    return _serve(store, server, free, open_it=not no_open)


def _sync(store: Root, uri: str) -> None:
    from tessera.cli._exp_sync import once

    for sentence in once(store, uri, ()):
        click.echo(f"Error: {sentence}", err=True)


def _show(base: str, server: Server, *, open_it: bool) -> None:
    from tessera.tracking.saved_views import left_out, page, page_version, views
    from tessera.tracking.server import quiet, sentences

    with quiet(), sentences(server.uri):
        view = views()[0] if left_out(page_version(server)) is None else None
    url = page(re.sub(r"://[^/]*@", "://", base), server.experiment_id, view)  # the browser asks
    click.echo(f"MLflow: {url}")
    if open_it and not (_has_display() and webbrowser.open(url)):
        click.echo("No browser could be opened here; open the address yourself.")


def _has_display() -> bool:
    """Whether a browser has a place; without one Python would start a text browser in here."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in names)


def _serve(store: Root, server: Server, port: int, *, open_it: bool) -> int:
    from tessera.tracking.serving import mlflow_server, signals_as_interrupt

    folder = Path(store.url) if store.is_local else Path(".tessera")
    log = folder.absolute() / "mlflow-server.log"
    # Not on the command line, where others on this machine could read a password in it.
    backend = {"MLFLOW_BACKEND_STORE_URI": server.uri}
    serving = mlflow_server([], host="127.0.0.1", port=port, log=log, environment=backend)
    with signals_as_interrupt():
        try:
            with ExitStack() as stack:
                with spinner("starting MLflow, some seconds"):
                    running = stack.enter_context(serving)
                _show(running.url, server, open_it=open_it)
                click.echo("Ctrl-C stops it.")
                running.wait()
        except KeyboardInterrupt:
            click.echo("Stopped.")
    return 0


@contextmanager
def spinner(words: str) -> Iterator[None]:
    """Something that moves on a terminal; elsewhere a line. On stderr."""
    if not sys.stderr.isatty():
        click.echo(f"{words} ...", err=True)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(words):
        yield
