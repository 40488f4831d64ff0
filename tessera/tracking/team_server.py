"""MLflow for a team: PostgreSQL, accounts, artifacts in the root's bucket, allowed hosts.

Everything of it lies in one folder, and a second start uses all of it again:

    postgres/        runs and accounts: one database
    admin-password   of the user ``admin``, made once; only its owner may read it
    secret-key       signs the forms of MLflow's page; made once
    auth.ini         MLflow's settings for accounts
    mlflow-server.log

Backups are dumps of that database in the root, ``tracking-server/backups/<time>.dump``. A root
alone is enough to have all runs again (``tessera-exp sync``); accounts are in backups only.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tessera.errors import InputError, StoreError
from tessera.storage import Root
from tessera.tracking.cluster import Cluster
from tessera.tracking.server import quiet
from tessera.tracking.serving import Running, mlflow_server

ADMIN = "admin"
BACKUPS = "tracking-server/backups"
_DUMP = re.compile(r"\d{8}T\d{6}Z\.dump")
_LOCAL = ("localhost", "127.0.0.1")
_HOST = re.compile(r"[A-Za-z0-9_.*-]+(:\d+)?")
_KEPT = 30
"""Backups; older ones are deleted."""


@dataclass(frozen=True)
class TeamServer:
    """A team server that answers; ``password_file`` is readable by its owner alone."""

    running: Running
    cluster: Cluster
    password_file: Path
    restored: str | None

    @property
    def url(self) -> str:
        """Where it answers on this machine."""
        return self.running.url


@contextmanager
def team_server(
    root: Root,
    folder: Path,
    *,
    host: str,
    port: int,
    allowed_hosts: Sequence[str] = (),
    restore: bool = False,
) -> Iterator[TeamServer]:
    """Bring everything up; on the way out MLflow is stopped first, then PostgreSQL.

    ``restore``: an empty database gets the root's newest backup, if there is one. Raises
    ``InputError`` for what a person has to settle, ``StoreError`` if a part does not start.
    """
    hosts = hosts_allowed(allowed_hosts)
    with _held(folder):
        password_file = _secret(folder / "admin-password")
        cluster = Cluster.below(folder)
        cluster.start()
        try:
            restored = newest_backup(root) if restore and cluster.is_empty else None
            if restored is not None:
                restore_backup(root, cluster, restored, password_file)
            with mlflow_server(
                _arguments(root, cluster, hosts, port),
                host=host,
                port=port,
                log=folder.absolute() / "mlflow-server.log",
                environment={
                    "MLFLOW_AUTH_CONFIG_PATH": str(_auth_settings(folder, cluster)),
                    "MLFLOW_AUTH_ADMIN_PASSWORD": password_file.read_text(),
                    "MLFLOW_FLASK_SERVER_SECRET_KEY": _secret(folder / "secret-key").read_text(),
                },
            ) as running:
                yield TeamServer(running, cluster, password_file, restored)
        finally:
            cluster.stop()


def _arguments(root: Root, cluster: Cluster, hosts: Sequence[str], port: int) -> list[str]:
    arguments = [
        *("--app-name", "basic-auth", "--backend-store-uri", cluster.uri),
        *("--artifacts-destination", artifacts_of(root)),
    ]
    if hosts:
        names = [*_LOCAL, *hosts]
        arguments += ["--allowed-hosts", ",".join(each for n in names for each in (n, f"{n}:*"))]
        origins = [f"{way}://{name}" for name in hosts for way in ("http", "https")]
        origins += [f"http://{name}:{port}" for name in hosts if ":" not in name]
        arguments += ["--cors-allowed-origins", ",".join(origins)]
    return arguments


def hosts_allowed(names: Sequence[str]) -> list[str]:
    """``names`` checked; MLflow would take anything and then answer nobody."""
    for name in names:
        if not _HOST.fullmatch(name) or name == "*":
            raise InputError(
                f"--allowed-hosts has {name!r}; expected host names or addresses as people type "
                "them in the browser, separated by commas, such as mlflow.example.com."
            )
    return list(names)


def artifacts_of(root: Root) -> str:
    """Where MLflow keeps models: in the root, whatever it is."""
    if root.is_local:
        return str(Path(root.url).absolute() / "mlflow-artifacts")
    return f"{root.url}/mlflow"


def _secret(path: Path) -> Path:
    """A file with a secret that was made once and that only its owner may read."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(18))
    return path


def _auth_settings(folder: Path, cluster: Cluster) -> Path:
    path = folder.absolute() / "auth.ini"
    uri = cluster.uri.replace("%", "%%")  # what configparser reads as one
    path.write_text(
        "[mlflow]\n"
        "# What everybody may do with what nobody gave them: NO_PERMISSIONS, READ, EDIT, MANAGE.\n"
        "default_permission = READ\n"
        f"database_uri = {uri}\n"
        f"admin_username = {ADMIN}\n"
        "# Checking a password takes a quarter of a second on purpose; once a minute is enough.\n"
        "auth_cache_ttl_seconds = 60\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return path


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder is ours; ``InputError`` if another server or a restore has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"A tracking server runs in {folder.absolute()} already; stop it first, or give "
                "--folder another place."
            ) from error
        yield


# -- backup and restore ----------------------------------------------------------------------------


def backup(root: Root, folder: Path) -> str:
    """Dump the database into the root, whether the server runs or not; returns the path there."""
    if not (folder / "postgres" / "PG_VERSION").exists():
        raise InputError(f"No tracking server has run in {folder.absolute()}; correct --folder.")
    cluster = Cluster.below(folder)
    if cluster.running:
        return write_backup(root, cluster)
    with _held(folder):
        cluster.start()
        try:
            return write_backup(root, cluster)
        finally:
            cluster.stop()


def write_backup(root: Root, cluster: Cluster) -> str:
    """Dump a running cluster into the root; of more than 30 backups the oldest go."""
    path = f"{BACKUPS}/{datetime.fromtimestamp(time.time(), UTC):%Y%m%dT%H%M%SZ}.dump"
    root.publish(path, cluster.dump())
    for name in _backups(root)[:-_KEPT]:
        root.delete(f"{BACKUPS}/{name}")
    return path


def _backups(root: Root) -> list[str]:
    return sorted(name for name in root.children(BACKUPS) if _DUMP.fullmatch(name))


def newest_backup(root: Root) -> str | None:
    """The path of the root's newest backup."""
    names = _backups(root)
    return f"{BACKUPS}/{names[-1]}" if names else None


def restore(root: Root, folder: Path, path: str | None = None) -> str:
    """Put a backup (``path`` in the root, else the newest) in place of the database.

    Raises ``InputError`` while the server runs, or where there is no backup.
    """
    chosen = path or newest_backup(root)
    if chosen is None:
        raise InputError(f"{root.url} has no backup of a tracking server; make one first.")
    with _held(folder):
        password_file = _secret(folder / "admin-password")
        cluster = Cluster.below(folder)
        cluster.start()
        try:
            restore_backup(root, cluster, chosen, password_file)
        finally:
            cluster.stop()
    return chosen


def restore_backup(root: Root, cluster: Cluster, path: str, password_file: Path) -> None:
    """Restore into a running cluster; ``admin`` then has the password of this folder."""
    cluster.restore(root.read_bytes(path))
    with quiet():
        try:
            from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

            accounts: Any = SqlAlchemyStore()
            accounts.init_db(cluster.uri)
            accounts.update_user(ADMIN, password=password_file.read_text())
            accounts.engine.dispose()
        except Exception as error:
            raise StoreError(
                f"{path} was restored, but the password of {ADMIN} could not be set ({error}); "
                "use the one from the time of the backup."
            ) from error
