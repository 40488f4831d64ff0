"""A real PostgreSQL for tests: a cluster of its own in a folder, on a free loopback port.

    with postgres(folder) as server:
        mlflow_uri = server.new_database()

PostgreSQL refuses to run as root, so as root its processes run as the package's user ``postgres``.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.services import debian

_POSTGRES = "/usr/lib/postgresql/*/bin/postgres"
PACKAGES = {_POSTGRES: "postgresql"}
USER = "tessera"


@dataclass(frozen=True)
class Postgres:
    """A running server; ``data`` is its folder."""

    port: int
    data: Path
    programs: Path

    def uri(self, database: str) -> str:
        """What MLflow and SQLAlchemy take."""
        return f"postgresql+psycopg2://{USER}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URI of an empty database of its own."""
        name = f"mlflow_{uuid.uuid4().hex[:12]}"
        self.run("createdb", name)
        return self.uri(name)

    def run(self, program: str, *arguments: str, stdin: bytes | None = None) -> bytes:
        """One of PostgreSQL's own tools against this server; its stdout."""
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER]
        done = subprocess.run(
            [self.programs / program, *place, *arguments],
            input=stdin, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr.decode(errors='replace')}")
        return done.stdout

    def stop(self, mode: str = "fast") -> None:
        """Stop it (``immediate``: as a crash would)."""
        self._ctl("stop", "-m", mode)

    def start(self) -> None:
        """Start it; returns once it takes connections."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.data} -c fsync=off"
        self._ctl("start", "-w", "-t", "60", "-o", options, "-l", str(self.data / "log"))

    def _ctl(self, *arguments: str) -> None:
        _as_its_user([self.programs / "pg_ctl", "-D", self.data, *arguments])


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """Make a cluster in a new folder below ``folder``, run it, and remove it afterwards."""
    debian.install(PACKAGES)
    found = debian.find(_POSTGRES)
    assert found, "the package postgresql brings no server"
    data = Path("/tmp") / f"tessera-postgres-{uuid.uuid4().hex[:8]}"  # a socket's path is short
    server = Postgres(_free_port(), data, Path(found).parent)
    folder.mkdir(parents=True, exist_ok=True)
    data.mkdir(mode=0o700)
    try:
        if os.geteuid() == 0:
            shutil.chown(data, "postgres", "postgres")
        options = ["-U", USER, "--auth=trust", "--encoding=UTF8", "--no-sync"]
        _as_its_user([server.programs / "initdb", "-D", data, *options])
        server.start()
        try:
            yield server
        finally:
            if (data / "postmaster.pid").exists():
                server.stop("immediate")
    finally:
        if (data / "log").exists():
            shutil.copy(data / "log", folder / "postgres.log")
        shutil.rmtree(data, ignore_errors=True)


def _as_its_user(command: Sequence[str | Path]) -> None:
    extra = {}
    if os.geteuid() == 0:
        who = pwd.getpwnam("postgres")
        extra = {"user": who.pw_uid, "group": who.pw_gid}
    subprocess.run(
        command, check=True, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={"PATH": debian.PATH, "LANG": "C.UTF-8"}, **extra,  # type: ignore[call-overload]
    )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
