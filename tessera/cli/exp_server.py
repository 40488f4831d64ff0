"""``tessera-exp server``: MLflow for a team, and its backups."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tessera.cli.common import Seconds, epilog, root_option

if TYPE_CHECKING:
    from tessera.storage import Root
    from tessera.tracking.team_server import TeamServer

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = ".tessera/tracking-server"


def _folder_option(function: F) -> F:
    return click.option(
        "--folder",
        envvar="TESSERA_TRACKING_FOLDER",
        default=FOLDER,
        show_default=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Its database, password and log; also TESSERA_TRACKING_FOLDER.",
    )(function)


@click.group(epilog=epilog("tessera-exp server up", "tessera-exp server backup"))
def server() -> None:
    """MLflow with PostgreSQL and accounts for a team; its backups lie in the root."""


@server.command(
    epilog=epilog(
        "tessera-exp server up",
        "tessera-exp server up --host 0.0.0.0 --allowed-hosts mlflow.example.com --backup-hours 6",
    )
)
@root_option
@_folder_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=5000,
    show_default=True,
    type=click.IntRange(1, 65535),
    help="Port to listen on.",
)
@click.option(
    "--allowed-hosts",
    envvar="TESSERA_ALLOWED_HOSTS",
    default="",
    metavar="NAMES",
    help="Host names by which people reach it, separated by commas; also TESSERA_ALLOWED_HOSTS.",
)
@click.option("--restore", is_flag=True, help="Begin with the root's newest backup, if new here.")
@click.option("--backup-hours", type=Seconds(0.01), help="Back up that often.")
def up(
    root: str,
    folder: Path,
    host: str,
    port: int,
    allowed_hosts: str,
    restore: bool,
    backup_hours: float | None,
) -> int:
    """Run it until Ctrl-C. What it keeps stays in the folder, and a second start uses it."""
    from contextlib import ExitStack

    from tessera.cli.exp_ui import spinner
    from tessera.storage import open_root
    from tessera.tracking.serving import choose_port, require_mlflow, signals_as_interrupt
    from tessera.tracking.team_server import team_server

    require_mlflow()
    store = open_root(root)
    names = [name.strip() for name in allowed_hosts.split(",") if name.strip()]
    coming = team_server(
        store, folder, host=host, port=choose_port(port, host), allowed_hosts=names, restore=restore
    )
    with signals_as_interrupt():
        try:
            with ExitStack() as stack:
                with spinner("starting PostgreSQL and MLflow, up to a minute the first time"):
                    team = stack.enter_context(coming)
                _tell(team, names, port)
                _stand(store, team, backup_hours)
        except KeyboardInterrupt:
            click.echo("Stopped.")
    return 0


def _tell(team: TeamServer, names: list[str], port: int) -> None:
    from tessera.tracking.team_server import ADMIN

    if team.restored:
        click.echo(f"Restored {team.restored}; {ADMIN} has the password of this folder.")
    place = team.password_file.absolute()
    others = "".join(f", http://{name}:{port}" for name in names)
    click.echo(f"MLflow for a team: {team.url}{others}")
    click.echo(f"User {ADMIN}; the password is in {place}, which only its owner may read.")
    click.echo("Where runs are looked at or synced:")
    click.echo(f"  export MLFLOW_TRACKING_URI={team.url} MLFLOW_TRACKING_USERNAME={ADMIN}")
    click.echo(f"  export MLFLOW_TRACKING_PASSWORD=$(cat {place})")
    click.echo("Ctrl-C stops it; nothing is lost.")


def _stand(store: Root, team: TeamServer, backup_hours: float | None) -> None:
    """Until it ends; backups meanwhile. One that fails is told, and the next one tried in time."""
    from tessera.errors import TesseraError
    from tessera.tracking.team_server import write_backup

    if backup_hours is None:
        team.running.wait()
    while not team.running.ended_within((backup_hours or 0) * 3600):
        try:
            path = write_backup(store, team.cluster)
            click.echo(f"{time.strftime('%Y-%m-%d %H:%M')} backed up into {store.url}/{path}")
        except TesseraError as error:
            click.echo(f"Error: The backup failed: {error}", err=True)
    team.running.wait()


@server.command(epilog=epilog("tessera-exp server backup --root s3://bucket/tessera"))
@root_option
@_folder_option
def backup(root: str, folder: Path) -> None:
    """Write runs and accounts into the root, whether the server runs or not."""
    from tessera.storage import open_root
    from tessera.tracking import team_server

    store = open_root(root)
    path = team_server.backup(store, folder)
    click.echo(f"Backed up into {store.url}/{path}.")


@server.command(epilog=epilog("tessera-exp server restore", "tessera-exp server restore PATH"))
@click.argument("path", required=False)
@root_option
@_folder_option
def restore(path: str | None, root: str, folder: Path) -> None:
    """Put a backup (PATH in the root, else the newest) in place of what the stopped server has."""
    from tessera.storage import open_root
    from tessera.tracking import team_server

    store = open_root(root)
    chosen = team_server.restore(store, folder, path)
    click.echo(f"Restored {chosen}; admin has the password of {folder / 'admin-password'}.")
