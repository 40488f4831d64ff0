"""Stock SkyPilot with a home of its own, as a person at a laptop has it after `sky check`."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.services.proxied import CHECKOUT

CATALOGS = CHECKOUT / "tests" / "sky" / "catalogs"
VAST_KEY = "pretended-vast-key-0123456789abcdef"
USER_HASH = "7e55e4a1"  # part of the labels that it gives instances
_CONFIG = """\
allowed_clouds: [Vast]
jobs:
  controller:
    consolidation_mode: true  # managed jobs are controlled by the API server, no machine for it
"""


@dataclass(frozen=True)
class Started:
    """A command that is running."""

    process: subprocess.Popen[bytes]
    log: Path

    def interrupt(self, *, seconds: float) -> int:
        """Ctrl-C, then its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(seconds)

    def said(self) -> str:
        """What it printed so far, without colours."""
        return _plain(self.log.read_text(errors="replace").partition("\n")[2])


@dataclass
class SkyPilot:
    """Runs ``sky`` commands; what each printed is kept in ``logs``."""

    home: Path
    logs: Path
    bundle: Path
    vast_url: str
    _count: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def environment(self) -> dict[str, str]:
        """Of every command, nothing inherited: no key and no setting of whoever runs the lab."""
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "COLUMNS": "160",
            "NO_COLOR": "1",
            "PYTHONPATH": str(CHECKOUT),
            "VAST_URL": self.vast_url,
            "SSL_CERT_FILE": str(self.bundle),
            "REQUESTS_CA_BUNDLE": str(self.bundle),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            "SKYPILOT_USER_ID": USER_HASH,
            # As on a machine of that size: one controller process of managed jobs, not a dozen.
            "SKYPILOT_POD_MEMORY_GB_LIMIT": "8",
        }

    def furnish(self) -> None:
        """The home: seeded catalogs, configuration, vast.ai's key where its own tool puts it.

        A catalog without a checksum beside it counts as edited by hand and is never fetched again.
        """
        shutil.copytree(CATALOGS, self.home / ".sky" / "catalogs" / "v8")
        (self.home / ".sky" / "config.yaml").write_text(_CONFIG)
        key = self.home / ".config" / "vastai" / "vast_api_key"
        key.parent.mkdir(parents=True)
        key.write_text(VAST_KEY)
        key.chmod(0o600)

    def run(
        self, *command: str, timeout: float = 600, more: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One command to its end; stdout and stderr together, as a terminal shows them."""
        name = "-".join(word for word in command[:3] if word.isalpha()) or Path(command[0]).name
        log = self.logs / f"{next(self._count):03d}-{name}.log"
        began = time.monotonic()
        with log.open("w+") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            done = subprocess.run(
                command, cwd=CHECKOUT, env={**self.environment, **(more or {})},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=timeout,
            )  # fmt: skip
            file.write(f"== code {done.returncode} after {time.monotonic() - began:.0f} s\n")
            file.seek(0)
            _, _, text = file.read().partition("\n")
        return subprocess.CompletedProcess(command, done.returncode, _plain(text))

    @contextmanager
    def start(self, *command: str) -> Iterator[Started]:
        """One command that goes on meanwhile; what still runs at the end is killed."""
        log = self.logs / f"{next(self._count):03d}-{Path(command[0]).name}.log"
        with log.open("w") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command, cwd=CHECKOUT, env=self.environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                yield Started(process, log)
            finally:
                process.kill()
                process.wait()

    def jobs(self) -> list[dict[str, Any]]:
        """The managed jobs, as `sky jobs queue` has them."""
        asked = self.run("sky", "jobs", "queue", "-o", "json")
        if asked.returncode:
            return []
        rows: list[dict[str, Any]]
        rows, _ = json.JSONDecoder().raw_decode(asked.stdout, asked.stdout.index("["))
        return rows


def _plain(text: str) -> str:
    """Without colours, which SkyPilot prints in spite of NO_COLOR."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
