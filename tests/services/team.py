"""``tessera-exp server up`` as people run it: a process of its own, on a free loopback port.

    with team_up(folder, root, environment) as team:
        os.environ |= team.login()

The folder must be one that the user ``postgres`` may enter: pytest's own temporary folders are not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.services import debian
from tests.services.postgres import PACKAGES
from tests.services.stores import free_port

_MAIN = "from tessera.cli.exp import main; main()"
_CHECKOUT = Path(__file__).parents[2]
_READY = "Ctrl-C stops it"


@dataclass(frozen=True)
class Team:
    """A server that is up; ``said`` is what it printed until then."""

    process: subprocess.Popen[str]
    folder: Path
    port: int
    said: str

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def login(self) -> dict[str, str]:
        """What the printed ``export`` lines put into the environment."""
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": (self.folder / "admin-password").read_text(),
        }

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it as Ctrl-C (or another signal) does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp(prefix="tessera-team-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def team_up(
    folder: Path, root: str, environment: Mapping[str, str], *arguments: str
) -> Iterator[Team]:
    """Run it with ``arguments``; stopped on the way out."""
    debian.install(PACKAGES)
    port = free_port()
    command = ["server", "up", "--root", root, "--folder", str(folder), "--port", str(port)]
    with (folder.parent / f"{folder.name}.err").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_CHECKOUT), **environment},
        )
        try:
            assert process.stdout
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith(_READY):
                    break
            else:
                errors.seek(0)
                raise AssertionError(f"it never came up: {said}{errors.read()}")
            yield Team(process, folder, port, said)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(60)
            assert process.stdout
            process.stdout.close()
