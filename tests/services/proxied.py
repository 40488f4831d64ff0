"""The fault-injecting proxy as a test or a driver holds it: start, rates, counts, log.

with proxy_for(store, folder, seed=1) as proxy:
    proxy.set(MODERATE)
    environment = proxy.store.environment()
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.services.faults import NONE, Faults
from tests.services.stores import Store, stop

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Entry:
    """One line of the proxy's log; ``key`` is the object's, decoded, without the query.

    ``time`` is in seconds since the epoch. ``status`` and ``fault`` are None at the beginning of a
    request, and ``status`` where the client got no whole answer.
    """

    time: float
    event: str
    request: int
    method: str
    key: str
    query: str
    status: int | None
    fault: str | None

    @property
    def arrived(self) -> bool:
        """Whether the request changed or read something at the store, as far as the log knows."""
        return self.event == "end" and self.status is not None and self.status < 300


@dataclass
class Log:
    """Follows the proxy's log from where it was last read."""

    path: Path
    _offset: int = field(default=0)

    def fresh(self) -> list[Entry]:
        """The entries since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        return [_entry(json.loads(line)) for line in data.splitlines()]


def _entry(line: dict[str, Any]) -> Entry:
    path, _, query = line["path"].partition("?")
    _, _, key = path.lstrip("/").partition("/")
    return Entry(
        line["time"], line["event"], line["request"], line["method"], unquote(key), query,
        line.get("status"), line.get("fault"),
    )  # fmt: skip


@dataclass(frozen=True)
class Proxy:
    """A running proxy; ``store`` is the server as it is reached through it."""

    store: Store
    log_path: Path
    control: str

    def set(self, faults: Faults) -> None:
        """Other rates from now on."""
        body = json.dumps(asdict(faults)).encode()
        request = urllib.request.Request(f"{self.control}/faults", body, method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    def counts(self) -> dict[str, int]:
        """How many faults of each kind there were so far."""
        return dict(self._ask()["faults"])

    def requests(self) -> int:
        """How many requests there were so far."""
        return int(self._ask()["requests"])

    def log(self) -> Log:
        """A reader of the log, from its beginning."""
        return Log(self.log_path)

    def _ask(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.control}/counts", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


@contextmanager
def proxy_for(
    store: Store, folder: Path, *, faults: Faults = NONE, seed: int = 0
) -> Iterator[Proxy]:
    """Run a proxy in front of ``store``; its log goes to ``folder``."""
    log = folder / f"{store.kind}-requests.jsonl"
    command = [sys.executable, "-m", "tests.services.proxy", "--upstream", store.endpoint]
    command += ["--log", str(log), "--seed", str(seed)]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the proxy did not start; what it said is above")
        ports = json.loads(line)
        through = store.through(f"http://127.0.0.1:{ports['proxy']}")
        proxy = Proxy(through, log, f"http://127.0.0.1:{ports['control']}")
        if faults != NONE:
            proxy.set(faults)
        yield proxy
    finally:
        stop(process)
