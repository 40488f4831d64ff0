"""A PostgreSQL of our own for the team server: one folder, one database, no port.

It listens on a socket in a folder that only its user may enter, so there is no password to keep and
nothing to reach from outside. PostgreSQL refuses to run as root; as root its processes run as the
Debian package's user ``postgres``, who must be able to enter the folder.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tessera.errors import InputError, StoreError

DATABASE, OWNER = "mlflow", "tessera"
_PROGRAMS = "usr/lib/postgresql/*/bin/postgres"
_POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it before a new package starts a service
_SOCKET_CHARACTERS = 90  # a socket's path has at most 107, and PostgreSQL adds a name


@dataclass(frozen=True)
class Cluster:
    """The cluster in ``data``; ``programs`` is where PostgreSQL's tools are."""

    data: Path
    programs: Path

    @classmethod
    def below(cls, folder: Path) -> Cluster:
        """The cluster of ``folder``, made if it is new; installs PostgreSQL where it is missing.

        Raises ``InputError`` where it cannot be installed or may not enter the folder.
        """
        data = folder.absolute() / "postgres"
        cluster = cls(data, _programs())
        if not (data / "PG_VERSION").exists():
            cluster._create()
        return cluster

    @property
    def running(self) -> bool:
        """Whether its server runs."""
        return self._as_user("pg_ctl", "-D", str(self.data), "status", check=False) == 0

    def start(self) -> None:
        """Start it (anew, if one that was killed left it running); make its database."""
        self.stop()
        sockets = self._sockets()
        options = f"-c listen_addresses='' -k '{sockets}'"
        self._as_user(
            *("pg_ctl", "-D", str(self.data), "start", "-w", "-t", "60"),
            *("-o", options, "-l", str(self.data / "log")),
        )
        listed = self.tool("psql", "-d", "postgres", "-tAc", "select datname from pg_database")
        if DATABASE not in listed.decode().split():
            self.tool("createdb", DATABASE)

    def stop(self) -> None:
        """Stop it, if it runs: connections are closed, nothing is lost."""
        if self.running:
            self._as_user("pg_ctl", "-D", str(self.data), "stop", "-m", "fast", "-w")

    @property
    def uri(self) -> str:
        """What MLflow and SQLAlchemy take; the server must run."""
        return f"postgresql+psycopg2://{OWNER}@/{DATABASE}?host={quote(str(self._socket()))}"

    @property
    def is_empty(self) -> bool:
        """Whether no MLflow has used the database yet; the server must run."""
        count = "select count(*) from information_schema.tables where table_schema = 'public'"
        return self.tool("psql", "-d", DATABASE, "-tAc", count).strip() == b"0"

    def dump(self) -> bytes:
        """The whole database, runs and accounts, as ``pg_restore`` takes it."""
        return self.tool("pg_dump", "-Fc", "-d", DATABASE)

    def restore(self, dump: bytes) -> None:
        """Replace the database by a dump; either whole or not at all. ``StoreError`` says why."""
        self.tool("psql", "-d", "postgres", "-qc", "drop database if exists restoring")
        self.tool("createdb", "restoring")
        self.tool("pg_restore", "--no-owner", "--exit-on-error", "-d", "restoring", stdin=dump)
        swap = (f"drop database {DATABASE}", f"alter database restoring rename to {DATABASE}")
        for sentence in swap:
            self.tool("psql", "-d", "postgres", "-qc", sentence)

    def tool(self, program: str, *arguments: str, stdin: bytes | None = None) -> bytes:
        """One of PostgreSQL's own tools against the running server; its stdout."""
        place = ["-h", str(self._socket()), "-U", OWNER]
        done = subprocess.run(
            [self.programs / program, *place, *arguments],
            input=stdin, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().split("\n")[0]
            raise StoreError(f"PostgreSQL's {program} failed ({said}); see {self.data / 'log'}.")
        return done.stdout

    def _create(self) -> None:
        self.data.mkdir(parents=True, mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(self.data, "postgres", "postgres")
            _require_way(self.data)
        self._as_user(
            *("initdb", "-D", str(self.data), "-U", OWNER, "--auth=trust", "--encoding=UTF8"),
            "--locale=C.UTF-8",
        )

    def _sockets(self) -> Path:
        """Where its socket goes: the data folder, which is private, or a short private one."""
        if len(str(self.data)) <= _SOCKET_CHARACTERS:
            return self.data
        short = Path(tempfile.mkdtemp(prefix="tessera-pg-"))  # of mode 0700
        if os.geteuid() == 0:
            shutil.chown(short, "postgres", "postgres")
        return short

    def _socket(self) -> Path:
        """The folder of the running server's socket, as it wrote it down itself."""
        try:
            return Path((self.data / "postmaster.pid").read_text().splitlines()[4])
        except (OSError, IndexError) as error:
            raise StoreError(f"PostgreSQL does not run in {self.data}; start it first.") from error

    def _as_user(self, program: str, *arguments: str, check: bool = True) -> int:
        """Run one of the tools that manage the server's processes; its exit code."""
        extra = {}
        if os.geteuid() == 0:
            who = pwd.getpwnam("postgres")
            extra = {"user": who.pw_uid, "group": who.pw_gid}
        done = subprocess.run(
            [str(self.programs / program), *arguments],
            check=False, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            # The server must not get Ctrl-C from the terminal: it is stopped after MLflow.
            start_new_session=True, env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            **extra,  # type: ignore[call-overload]
        )  # fmt: skip
        if check and done.returncode:
            said = (done.stderr or b"").decode(errors="replace").strip().split("\n")[-1]
            raise StoreError(
                f"PostgreSQL's {program} failed in {self.data}{f' ({said})' if said else ''}; see "
                f"{self.data / 'log'} and the space on the disk."
            )
        return int(done.returncode)


def _require_way(data: Path) -> None:
    """Raise ``InputError`` unless the user ``postgres`` can get to ``data``."""
    for parent in data.parents:
        if not parent.stat().st_mode & 0o001:
            raise InputError(
                f"PostgreSQL runs as the user postgres, who may not enter {parent}; give --folder "
                "a place that all may enter, such as /var/lib/tessera-tracking."
            )


def _programs() -> Path:
    """Where PostgreSQL's tools are; installs Debian's package as root."""
    if not (found := _found()):
        _install()
        found = _found()
    if not found:
        raise InputError("PostgreSQL's server is not in /usr/lib/postgresql; install postgresql.")
    return found[-1].parent


def _found() -> Sequence[Path]:
    return sorted(Path("/").glob(_PROGRAMS), key=lambda path: float(path.parts[4]))


def _install() -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise InputError(
            "PostgreSQL is not installed, and installing it needs root on Debian or Ubuntu; run "
            "`sudo apt-get install postgresql` and start again."
        )
    ours = not _POLICY.exists()
    if ours:
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
            subprocess.run(
                ["apt-get", "-qq", *arguments],
                check=True, stdout=subprocess.DEVNULL,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise InputError(
            "PostgreSQL could not be installed (see above); run `apt-get install postgresql` and "
            "start again."
        ) from error
    finally:
        if ours:
            _POLICY.unlink()
