"""Two attempts of one run, each held and let go at any of its publications.

A ``Case`` is a list of moves: this attempt goes on until it is held at one of its points, has
ended, or is killed there. Each is a ``tessera train`` process (``gated.py``) on a machine of its
own; afterwards a further attempt finishes the run, and ``lineages.py`` judges before and after.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from select import select
from typing import Any, Protocol

import yaml

from tests.chaos.objects import BucketObjects, FolderObjects, Objects
from tests.full.gated import Ended, Point
from tests.full.lineages import Snapshot, Whole
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


class Cleared(Objects, Protocol):
    """Objects that can be removed."""

    def clear(self) -> None:
        """Remove all runs."""


class Folder(FolderObjects):
    """A root that is a folder."""

    def clear(self) -> None:
        shutil.rmtree(self.folder / "runs", ignore_errors=True)


class Bucket(BucketObjects):
    """A root in a bucket."""

    def clear(self) -> None:
        for key in self.keys("runs/"):
            self._s3.delete_object(Bucket=self._bucket, Key=self._prefix + key)


@dataclass
class Tally:
    """What the cases came to."""

    tried: int = 0
    problems: list[str] = field(default_factory=list)
    facts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        facts = ", ".join(f"{count} {name}" for name, count in sorted(self.facts.items()))
        return f"{self.tried} interleavings, {len(self.problems)} with a problem; {facts}"


class Stage:
    """One root, used for one case after the other; its corpus stays, its runs go."""

    def __init__(
        self,
        theatre: Theatre,
        folder: Path,
        root: str,
        objects: Cleared,
        environment: dict[str, str],
        shards: Path | None = None,
    ) -> None:
        """``shards`` is a cache folder that a machine begins with, to save the downloads."""
        self._theatre, self._folder, self._root, self._objects = theatre, folder, root, objects
        self._environment, self._shards = environment, shards
        self._count = 0
        self._first: dict[Variant, tuple[dict[str, bytes], Path]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    # -- processes ---------------------------------------------------------------------------------

    def _machine(self, name: str) -> Path:
        cache = self._folder / f"case-{self._count}" / name
        if not cache.exists():
            cache.parent.mkdir(exist_ok=True)
            if self._shards:
                shutil.copytree(self._shards, cache)
        return cache

    def start(
        self, who: str, case: Case, *, machine: str, gated: bool = True, tokens: str = "e"
    ) -> Actor:
        """``tessera train`` of the case's experiment."""
        path = self._folder / "experiment.yaml"
        case.variant.write(path)
        cache = self._machine(machine)
        return self._theatre.start(
            ["train", str(path), "--root", self._root, "--quiet"],
            self._environment | {
                "TESSERA_CACHE": str(cache), "TESSERA_HEARTBEAT_S": "3600",
                "TESSERA_USD_PER_HOUR": "3.6", "VAST_CONTAINERLABEL": f"C.{machine}",
            },
            cache.parent / f"output-{who}",
            gated=gated,
            tokens=tokens,
            nudge=1e-3 if who == case.nudged else 0.0,
            poisoned=case.variant.samples,
        )  # fmt: skip

    def run_whole(self, who: str, case: Case, *, machine: str) -> Said:
        """One attempt to its end with nobody in the way."""
        actor = self.start(who, case, machine=machine, gated=False)
        actor.go(END)
        return actor.said()

    def listed(self) -> dict[str, Any]:
        """The only run in ``tessera-exp list --json``."""
        output = self._folder / "list"
        arguments = ["list", "--json", "--root", self._root]
        cache = {"TESSERA_CACHE": str(self._folder / "laptop")}
        actor = self._theatre.start(
            arguments, self._environment | cache, output, command="tessera-exp", gated=False
        )
        actor.go(END)
        said = actor.said()
        if said.code != 0:
            raise AssertionError(f"tessera-exp list ended with {said.code}: {said.err}")
        (row,) = json.loads(said.out)
        found: dict[str, Any] = row
        return found

    # -- the root ----------------------------------------------------------------------------------

    def clear(self) -> None:
        """No run is left, and no machine."""
        self._objects.clear()
        shutil.rmtree(self._folder / f"case-{self._count}", ignore_errors=True)
        self._count += 1

    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        return Snapshot(self._objects)

    def undisturbed(self, variant: Variant) -> tuple[Whole, list[tuple[str, str]]]:
        """What a run comes to that nobody disturbs, and its points."""
        case = Case((), variant)
        self.clear()
        actor = self.start("A", case, machine="A")
        actor.go(END)
        assert actor.code == 0, actor.said().err
        return self.snapshot().whole(), actor.seen

    def points_of_later(self, variant: Variant) -> list[tuple[str, str]]:
        """The points of an attempt that continues from the first checkpoint."""
        case = Case((), variant, later=True)
        self._begin(case)
        actor = self.start("A", case, machine="A", tokens="a")
        actor.go(END)
        assert actor.code == 0, actor.said().err
        return actor.seen

    def _begin(self, case: Case) -> None:
        """A root without runs; for ``later`` with one whose first attempt died at step 2."""
        self.clear()
        if not case.later:
            return
        if case.variant not in self._first:
            actor = self.start("first", case, machine="A", tokens="f")
            actor.go(Hold("latest", 1, "after"))
            actor.kill()
            kept = self._folder / f"first-{len(self._first)}"
            shutil.copytree(self._machine("A"), kept)
            files = {key: self._objects.read(key) for key in self._objects.keys("runs/")}
            self._first[case.variant] = files, kept
            return
        files, kept = self._first[case.variant]
        for key, data in files.items():
            self._objects.write(key, data)
        shutil.rmtree(self._machine("A"), ignore_errors=True)
        shutil.copytree(kept, self._machine("A"))

    # -- one case ----------------------------------------------------------------------------------

    def perform(self, case: Case) -> dict[str, Said]:
        """Make the moves; everybody has ended or was killed afterwards."""
        self._begin(case)
        actors: dict[str, Actor] = {}
        tokens = dict(case.tokens)
        try:
            for move in case.moves:
                if move.who not in actors:
                    machine = "A" if case.same_machine else move.who
                    actors[move.who] = self.start(
                        move.who, case, machine=machine, tokens=tokens[move.who]
                    )
                actors[move.who].go(move.until)
        finally:
            for actor in actors.values():
                actor.kill()
        return {who: actor.said() for who, actor in actors.items()}

    def judge(self, case: Case, whole: Whole, tally: Tally) -> None:
        """Perform a case and add what is wrong with it to the tally."""
        tally.tried += 1
        problems: list[str] = []
        try:
            problems += self._judged(case, whole, tally.facts)
        except (AssertionError, LookupError, ValueError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        if problems:
            tally.problems.append(f"{case}: {'; '.join(problems)}")

    def _judged(self, case: Case, whole: Whole, facts: Counter[str]) -> list[str]:
        ended = self.perform(case)
        problems = [text for who, said in ended.items() for text in ended_badly(who, said)]
        facts["stopped because another took over"] += sum(s.code == 2 for s in ended.values())
        before = self.snapshot()
        problems += before.differs_from(whole)
        problems += disagreements(self.listed(), before)
        facts["finished by both"] += len(before.finished) > 1
        facts["with a broken checkpoint"] += bool(before.broken)

        last = self.run_whole("Z", case, machine="A" if case.same_machine else "Z")
        if last.code != 0 or "Traceback" in last.err:
            return [*problems, f"the next attempt ended with {last.code}: {last.err[-600:]}"]
        furthest = before.counting[:1]
        if furthest and furthest[0] in before.broken and not before.finished:
            facts["passed over by the next"] += 1
            if "is passed over" not in last.err:
                problems.append("a broken checkpoint was passed over without a note")
        after = self.snapshot()
        if not after.finished:
            problems.append("the run is not finished")
        problems += after.differs_from(whole) + disagreements(self.listed(), after)
        problems += after.model_problems()
        if not case.nudged and after.whole().tensors_sha256 != whole.tensors_sha256:
            problems.append("the weights differ from the undisturbed run's")
        return problems


def ended_badly(who: str, said: Said) -> list[str]:
    """An attempt may finish, be killed, or stop because of another one."""
    if "Traceback" in said.err or "Traceback" in said.out:
        return [f"{who} ended with a traceback: {said.err[-600:]}"]
    if said.code == 2 and "took over" in said.err:
        return []
    return [] if said.code in (0, None) else [f"{who} ended with {said.code}: {said.err[-600:]}"]


def disagreements(row: dict[str, Any], run: Snapshot) -> list[str]:
    """Whether ``tessera-exp list`` says the same."""
    step = run.tip[1] if run.tip else None
    problems = []
    if row["step"] != step:
        problems.append(f"tessera-exp lists step {row['step']}, the files say {step}")
    if (row["status"] == "finished") != bool(run.finished):
        problems.append(f"tessera-exp lists it as {row['status']}")
    if row["attempts"] != len(run.attempts):
        problems.append(f"tessera-exp lists {row['attempts']} attempts of {len(run.attempts)}")
    return problems
