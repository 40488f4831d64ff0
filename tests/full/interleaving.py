"""Two attempts of one run, each held and let go at any of its publications.

A ``Case`` is a list of moves: this attempt goes on until it is held at one of its points, has
ended, or is killed there. Each is a ``tessera train`` process (``gated.py``) on a machine of its
own. ``stage.py`` performs cases: afterwards a further attempt finishes the run, and
``lineages.py`` judges before and after it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from select import select

import yaml

from tests.full.gated import Ended, Point
from tests.services.trainers import CHECKOUT, base_environment
from tests.training.conftest import BASE

STEPS = 6
PATIENCE_S = 120.0
SAMPLES_A_STEP = 8

END, KILL = "end", "kill"


@dataclass(frozen=True)
class Hold:
    """Before or after the ``nth`` point of a kind: "COMPLETE", "attempt", "model", ..."""

    kind: str
    nth: int = 1
    phase: str = "before"

    def __str__(self) -> str:
        return f"{self.phase} {self.kind} {self.nth}"


@dataclass(frozen=True)
class Move:
    """Attempt ``who`` goes on until there; one that ends on the way has ended."""

    who: str
    until: Hold | str

    def __str__(self) -> str:
        return f"{self.who} {self.until}"


@dataclass(frozen=True)
class Variant:
    """What the attempts train: ``poisoned`` steps (1-based) have a loss that is not a number."""

    keep: int = 2
    poisoned: tuple[int, ...] = ()

    @property
    def samples(self) -> tuple[int, ...]:
        """First samples of the poisoned steps."""
        return tuple((step - 1) * SAMPLES_A_STEP for step in self.poisoned)

    def write(self, path: Path) -> None:
        """The experiment file."""
        settings = BASE | {
            "tokens": STEPS * BASE["batch"]["tokens_per_step"],
            "log_every_steps": 1,
            "evaluation": {"every_steps": 3, "tokens": 512},
            "checkpoint": {"every_steps": 2, "keep": self.keep},
            "stability": {"max_skips": 0},
        }
        path.write_text(yaml.safe_dump(settings), "utf-8")


@dataclass(frozen=True)
class Case:
    """One interleaving. ``later``: both continue a run whose first attempt died after its first
    checkpoint. ``tokens`` are the first digits of the attempts' tokens, by name."""

    moves: tuple[Move, ...]
    variant: Variant = Variant()
    later: bool = False
    same_machine: bool = False
    tokens: tuple[tuple[str, str], ...] = (("A", "a"), ("B", "b"), ("C", "c"))
    nudged: str = ""

    def __str__(self) -> str:
        extra = [
            f"keep {self.variant.keep}",
            *(["continuing"] if self.later else []),
            *(["one machine"] if self.same_machine else []),
            *(["a poisoned step"] if self.variant.poisoned else []),
            *(["B has the smaller token"] if dict(self.tokens)["A"] > "b" else []),
        ]
        return f"{' | '.join(map(str, self.moves))} ({', '.join(extra)})"


def kind_of(point: Point) -> str:
    """What a point is, in one word."""
    parts = point.path.split("/")[2:]
    name = parts[-1]
    if parts[0] == "attempts":
        return "ending" if name.endswith(".end.json") else "attempt"
    if parts[0] == "checkpoints":
        reading = {"get_file": "download", "read_json": "look", "complete": "listing"}
        removing = {"delete_tree": "removal", "delete": "delete"}
        writing = {"put_file": "file", "publish": "COMPLETE"}
        return (reading | removing | writing)[point.operation]
    return {"run.json": "run", "latest.json": "latest"}.get(name, parts[0].rstrip("s"))


@dataclass(frozen=True)
class Said:
    """How a process ended; ``code`` is None for one that was killed."""

    code: int | None
    out: str
    err: str


class Actor:
    """One process, held at its points."""

    def __init__(self, connection: Connection, output: Path) -> None:
        self._connection, self._output = connection, output
        self.pid = int(connection.recv())
        self._process = os.pidfd_open(self.pid)
        connection.send(True)
        self.held: Point | None = None
        self.seen: list[tuple[str, str]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self.code: int | None = None
        self.over = False

    def go(self, until: Hold | str) -> None:
        """Go on until there."""
        if until == KILL:
            self.kill()
        while not self.over:
            if self.held is not None:
                self._connection.send(True)
                self.held = None
            if not self._connection.poll(PATIENCE_S):
                self.kill()
                raise AssertionError(f"silent after {self.seen[-3:]}; it said {self.said().err}")
            try:
                heard = self._connection.recv()
            except EOFError:
                self._wait()
                return
            if isinstance(heard, Ended):
                self.code = heard.code
                self._wait()
                return
            self.held = heard
            key = kind_of(heard), heard.phase
            self.seen.append(key)
            self._counts[key] += 1
            wanted = isinstance(until, Hold) and key == (until.kind, until.phase)
            if wanted and self._counts[key] == until.nth:  # type: ignore[union-attr]
                return

    def kill(self) -> None:
        """kill -9."""
        if not self.over:
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
            self._wait()

    def _wait(self) -> None:
        assert select([self._process], [], [], PATIENCE_S)[0], "it does not end"
        os.close(self._process)
        self._connection.close()
        self.over, self.held = True, None

    def said(self) -> Said:
        """What it wrote and how it ended."""
        files = (self._output.with_suffix(f".{end}") for end in ("out", "err"))
        out, err = (file.read_text(errors="replace") for file in files)
        return Said(self.code, out, err)


class Theatre:
    """Starts gated processes; any number at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()  # a socket's name must be short
        self._address = f"{self._folder.name}/gate"
        self._listener = Listener(self._address, family="AF_UNIX", backlog=16)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.full.gated import main; main()"],
            cwd=CHECKOUT,
            env=base_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._lock = self._process.stdin, threading.Lock()
        assert self._process.stdout.readline() == b"ready\n"

    def __enter__(self) -> Theatre:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=PATIENCE_S)
        self._listener.close()
        self._folder.cleanup()

    def start(
        self,
        arguments: Sequence[str],
        environment: dict[str, str],
        output: Path,
        *,
        command: str = "tessera",
        gated: bool = True,
        tokens: str = "e",
        nudge: float = 0.0,
        poisoned: tuple[int, ...] = (),
    ) -> Actor:
        """Start one; nothing of it runs beyond its first point before ``go``."""
        order = {
            "arguments": list(arguments), "environment": base_environment() | environment,
            "output": str(output), "address": self._address, "command": command, "gated": gated,
            "tokens": tokens, "nudge": nudge, "poisoned": poisoned,
        }  # fmt: skip
        with self._lock:  # who is accepted is who was ordered
            self._orders.write(json.dumps(order).encode() + b"\n")
            return Actor(self._listener.accept(), output)
