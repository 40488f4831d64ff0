"""``tessera`` commands as processes that can be watched and killed, each with its own environment.

with Forker() as forker:
    process = forker.start(["train", ...], environment, folder / "output")
    process.kill(signal.SIGKILL)
    print(process.wait().code)
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.training.disturb import UNDISTURBED, Disturbance

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")


def base_environment() -> dict[str, str]:
    """What a command inherits: nothing of this project, of a cloud, or of MLflow."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    ours = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return kept | ours | {"TESSERA_ENV_FILE": os.devnull}


@dataclass(frozen=True)
class Finished:
    """How a command ended; times in seconds since the epoch, ``code`` negative for a signal."""

    code: int
    out: str
    err: str
    started_at: float
    ended_at: float


class Running:
    """A command that was started."""

    def __init__(self, forker: Forker, pid: int, output: Path, started_at: float) -> None:
        self._forker, self.pid, self._output = forker, pid, output
        self.started_at = started_at
        self._finished: Finished | None = None

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._finished is not None or self._forker.answered()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; one that has ended already is left alone."""
        if not self.ended():
            # The id is free for others only once the forker has waited, and then it answers.
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass

    def wait(self, patience_s: float = PATIENCE_S) -> Finished:
        """Wait for its end; one that does not come is killed and an ``AssertionError``."""
        if self._finished is None:
            if not self._forker.answered(patience_s):
                os.kill(self.pid, signal.SIGKILL)
                self._forker.answer()
                raise AssertionError(
                    f"it had not ended after {patience_s:.0f} s; it said: {self.said()[-2000:]}"
                )
            code, ended_at = json.loads(self._forker.answer())
            out, err = (self._output.with_suffix(f".{end}").read_text() for end in ("out", "err"))
            self._finished = Finished(code, out, err, self.started_at, ended_at)
        return self._finished

    def said(self) -> str:
        """What it wrote to standard error so far."""
        return self._output.with_suffix(".err").read_text(errors="replace")


class Forker:
    """Where commands of their own process come from, half a second each. One at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.forker"],
            cwd=CHECKOUT,
            env=base_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        self._last: Running | None = None

    def __enter__(self) -> Forker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None and not self._last.ended():
            self._last.kill()
            self._last.wait()
        self._orders.close()
        self._process.wait(PATIENCE_S)
        self._answers.close()

    def start(
        self,
        arguments: list[str],
        environment: dict[str, str],
        output: Path,
        disturb: Disturbance = UNDISTURBED,
    ) -> Running:
        """Start ``tessera`` with these arguments; what it says goes to ``output.out``, ``.err``."""
        assert self._last is None or self._last.ended(), "one at a time"
        if self._last is not None:
            self._last.wait()
        order = {
            "arguments": arguments,
            "environment": base_environment() | environment,
            "output": str(output),
            "disturb": disturb.order(),
        }
        output.with_suffix(".err").touch()
        self._orders.write(json.dumps(order).encode() + b"\n")
        started_at = time.time()
        self._last = Running(self, int(self.answer()), output, started_at)
        return self._last

    def run(self, arguments: list[str], environment: dict[str, str], output: Path) -> Finished:
        """Start one and wait for it."""
        return self.start(arguments, environment, output).wait()

    def answered(self, seconds: float = 0.0) -> bool:
        """Whether an answer is there, or comes within ``seconds``."""
        return bool(select.select([self._answers], [], [], seconds)[0])

    def answer(self) -> bytes:
        """The next answer."""
        line = self._answers.readline()
        if not line:
            raise AssertionError("the process that starts commands is gone; see above")
        return line
