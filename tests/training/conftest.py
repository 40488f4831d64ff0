"""A workplace for tests of training: a corpus of a few thousand tokens and runs of seconds."""

from __future__ import annotations

import json
import logging
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tessera.cli.attempts import place_of
from tessera.cli.common import run_command
from tessera.cli.main import tessera
from tessera.cloud.machine import describe_machine
from tessera.corpus.build import build
from tessera.experiment import Experiment, load_experiment
from tessera.model.peak import Peak
from tessera.runs import Attempt, Ending, Run, list_runs
from tessera.storage import Root
from tessera.tracking.records import Record, read_journal
from tessera.training import attempt, session
from tessera.training.checkpoint.saver import Saver
from tessera.training.loop import Loop
from tests.training.disturb import UNDISTURBED, Disturbance, and_finish

STEPS = 30
VOCABULARY = 300
PATIENCE_S = 120.0
CACHE = "TESSERA_CACHE"
SAVE = Saver.save

BASE: dict[str, Any] = {
    "name": "tiny",
    "kind": "pretrain",
    "seed": 20260614,
    "model": {
        "layers": 2, "d_model": 32, "heads": 2, "context": 64, "vocab_size": VOCABULARY,
    },
    "data": {"corpus": "tiny", "sequence": 32},
    "optimizer": {"lr": 1e-2},
    "schedule": {"name": "cosine", "warmup_steps": 3, "final_lr": 1e-4},
    "batch": {"tokens_per_step": 256, "micro_batch": 8},
    "tokens": STEPS * 256,
    "evaluation": {"every_steps": 10, "tokens": 512},
    "checkpoint": {"every_steps": 5, "keep": 2},
    "log_every_steps": 3,
    "compile": "off",
    "price": {"usd_per_hour": 1.0},
}  # fmt: skip
# A log point is not a multiple of a checkpoint on purpose: the loss since the last one must survive
# a restart.

VOICE: dict[str, Any] = {
    "name": "voice",
    "kind": "sft",
    "seed": 7,
    "base": "tiny",
    "data": {"conversations": ["talk.jsonl"], "holdout": 0.25},
    "lora": {"rank": 8, "alpha": 16},
    "optimizer": {"lr": 2e-2, "weight_decay": 0.0},
    "schedule": {"name": "cosine", "warmup_steps": 2, "final_lr": 1e-4},
    "batch": {"conversations_per_step": 4, "micro_batch": 1},
    "epochs": 3,
    "compile": "off",
    "checkpoint": {"every_steps": 2, "keep": 2},
    "log_every_steps": 3,
}


def write_corpus(folder: Path) -> Path:
    """Documents of made-up words that follow one another by rule, so that a model can learn."""
    chance = random.Random(5)
    words = ["".join(chance.choices("aeioukstnm", k=chance.randint(2, 5))) for _ in range(40)]
    follow = {word: chance.choices(words, k=3) for word in words}
    rows = []
    for number in range(150):
        word = chance.choice(words)
        said = [word]
        for _ in range(40):
            word = chance.choice(follow[word])
            said.append(word)
        rows.append(json.dumps({"id": str(number), "text": " ".join(said) + "."}))
    (folder / "words.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    source = {"name": "words", "format": "jsonl", "path": "words.jsonl"}
    recipe = {
        "name": "tiny",
        "sources": [source | {"language": "en", "licence": "CC0-1.0"}],
        "holdout": {"fraction": 0.1, "salt": "s"},
        "tokenizer": {"train": {"vocab_size": VOCABULARY}},
        "shards": {"tokens": 1024},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def write_conversations(path: Path, count: int = 44) -> None:
    things = ["ka", "no", "se", "mi", "tu", "ra", "ne", "so", "ki", "mu", "ta"]
    rows = []
    for number in range(count):
        thing = things[number % len(things)] + things[number // len(things)]
        messages = [
            {"role": "user", "content": f"{thing}?"},
            {"role": "assistant", "content": f"yes {thing}." + " ok." * (number % 3)},
        ]
        rows.append(json.dumps({"id": str(number), "language": "en", "messages": messages}))
    path.write_text("\n".join(rows) + "\n", "utf-8")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


class Launcher:
    """Processes that run the command; see ``launcher.py``. One at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.launcher"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def launch(
        self,
        arguments: list[str],
        output: Path,
        environ: dict[str, str] | None = None,
        disturb: Disturbance = UNDISTURBED,
    ) -> Launched:
        """Start the command; what it says goes to ``output`` (``.out``, ``.err``)."""
        order = {"arguments": arguments, "output": str(output), "disturb": disturb.order()}
        order["environ"] = {CACHE: os.environ[CACHE], **(environ or {})}
        self._orders.write(json.dumps(order).encode() + b"\n")
        return Launched(int(self.answer()), output, self)

    def answered(self) -> bool:
        """Whether a line is waiting."""
        return bool(select.select([self._answers], [], [], 0)[0])

    def answer(self) -> bytes:
        """The launcher's next line."""
        if not select.select([self._answers], [], [], PATIENCE_S)[0]:
            raise AssertionError("the command never ended")
        return self._answers.readline()

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=PATIENCE_S)


@dataclass(frozen=True)
class Launched:
    """A running command."""

    pid: int
    output: Path
    launcher: Launcher

    def ended(self) -> bool:
        """Whether it has ended."""
        return self.launcher.answered()

    def end(self) -> Finished:
        """Wait for it."""
        code = int(self.launcher.answer())
        out, err = (self.output.with_suffix(end).read_text() for end in (".out", ".err"))
        return Finished(code, out, err)


class Bench:
    """One root with the tiny corpus, experiment files, and ways to run and to disturb them."""

    def __init__(self, folder: Path, launcher: Launcher | None = None) -> None:
        self.folder, self._launcher, self._count = folder, launcher, 0
        self.root = Root(str(folder / "root"), attempts=1)
        self.cache = folder / "cache"
        self.environ: dict[str, str] = {}
        self.url: str | None = None
        """Where launched processes find the root if not in ``root``."""
        for name, data in (("tiny", BASE), ("voice", VOICE)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(data), "utf-8")
        write_conversations(folder / "talk.jsonl")

    # -- running -----------------------------------------------------------------------------------

    def settings(self, *overrides: str, name: str = "tiny") -> Experiment:
        """The experiment ``name`` with ``--set`` overrides."""
        return load_experiment(self.folder / f"{name}.yaml", overrides)

    def place(self) -> Attempt:
        """This machine, as the command line describes it."""
        return place_of(describe_machine(experiment_price=1.0))

    def train(self, *overrides: str, name: str = "tiny", **options: Any) -> session.Result:
        """Train in this process."""
        settings = self.settings(*overrides, name=name)
        return session.train(settings, self.root, self.place(), quiet=True, **options)

    def arguments(self, *extra: str, name: str = "tiny") -> list[str]:
        """The command line of ``tessera train``."""
        return [
            "train",
            str(self.folder / f"{name}.yaml"),
            "--root",
            self.url or self.root.url,
            *extra,
        ]

    def command(
        self, capfd: pytest.CaptureFixture[str], *extra: str, name: str = "tiny"
    ) -> Finished:
        """``tessera train`` in this process, with its exit code and what it said."""
        capfd.readouterr()
        code = run_command(tessera, self.arguments(*extra, name=name))
        said = capfd.readouterr()
        return Finished(code, said.out, said.err)

    def start(
        self, *extra: str, name: str = "tiny", disturb: Disturbance = UNDISTURBED
    ) -> Launched:
        """``tessera train`` in a process of its own, to be disturbed."""
        self._count += 1
        output = self.folder / f"output-{self._count}"
        assert self._launcher is not None
        arguments = self.arguments(*extra, name=name)
        return self._launcher.launch(arguments, output, self.environ, disturb)

    def until(self, process: Launched, reached: Callable[[], bool]) -> None:
        """Wait until ``reached``, while the command runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            if process.ended():
                raise AssertionError(f"it ended too early: {process.end()}")
            if time.monotonic() > deadline:
                self.kill(process)
                raise AssertionError("what was waited for never came")
            time.sleep(0.002)

    def kill(self, process: Launched) -> None:
        """kill -9."""
        os.kill(process.pid, signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL

    # -- disturbing in this process ----------------------------------------------------------------

    def before_step(
        self, step: int, act: Callable[[Loop], None], patch: pytest.MonkeyPatch
    ) -> None:
        """Do something when optimiser step ``step`` (1-based) is about to be taken."""
        plain = Loop._step

        def disturbed(loop: Loop, batch: Any) -> bool:
            if loop.done + 1 == step:
                act(loop)
            return plain(loop, batch)

        patch.setattr(Loop, "_step", disturbed)

    def crash(self, step: int, *overrides: str, name: str = "tiny") -> None:
        """Train in this process until the plug is pulled before step ``step``."""

        def pull(_: Loop) -> None:
            raise RuntimeError("the plug")

        with pytest.MonkeyPatch.context() as patch:
            self.before_step(step, pull, patch)
            with pytest.raises(RuntimeError, match="the plug"):
                self.train(*overrides, name=name)

    def stop_before(self, step: int, *overrides: str, name: str = "tiny") -> session.Result:
        """Train in this process until a preemption comes while step ``step`` is about to begin.

        The step is finished and saved: it has no second micro-batch to stop before.
        """

        def stop(loop: Loop) -> None:
            loop.session.stop.signal = "SIGTERM"

        with pytest.MonkeyPatch.context() as patch:
            self.before_step(step, stop, patch)
            result = self.train(*overrides, name=name)
        assert result.exit_code == 75
        return result

    def die_then_finish(self, disturbance: Disturbance, *overrides: str) -> None:
        """A process of its own until it kills itself, then another attempt to the end."""
        died = self.start(*as_options(*overrides), disturb=disturbance).end()
        assert died.code == -signal.SIGKILL, died
        with disturbance.but(die_before=0, die_after_rollback=False).here():
            assert self.train(*overrides).exit_code == 0

    def forget_local(self) -> None:
        """The next attempt runs on another machine: nothing is there but what is in the root."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def move(self) -> None:
        """Put the root somewhere else."""
        moved = self.folder / "elsewhere"
        Path(self.root.base).rename(moved)
        self.root = Root(str(moved), attempts=1)

    # -- looking -----------------------------------------------------------------------------------

    def runs(self, kind: str = "pretrain") -> list[Run]:
        """The runs of the root."""
        return [run for run in list_runs(self.root) if run.record.kind == kind]

    def only_run(self, kind: str = "pretrain") -> Run:
        """The run of the root."""
        (run,) = self.runs(kind)
        return run

    def records(self, run: Run) -> Iterator[Record]:
        """The records of the surviving lineage."""
        for segment in run.lineage():
            first = segment.after if segment.after else -1
            for record in read_journal(run, segment.attempt):
                if first < record.step <= segment.upto:
                    yield record

    def points(self, run: Run, key: str = "train/loss") -> dict[int, float]:
        """One metric of the surviving lineage by step; a step recorded twice is an error."""
        found: dict[int, float] = {}
        for record in self.records(run):
            if (record.kind, record.key) == ("metric", key):
                assert record.step not in found, (key, record.step)
                found[record.step] = record.number
        return found

    def events(self, run: Run, key: str) -> list[Record]:
        """The events of that key, of every attempt."""
        every = (record for a in run.attempts() for record in read_journal(run, a.id))
        return [record for record in every if (record.kind, record.key) == ("event", key)]

    def digest(self, run: Run, folder: str = "model") -> str:
        """The published weights digest."""
        return str(self.root.read_json(run.path(folder, "weights.json"))["weights_digest"])

    def model_file(self, run: Run) -> str:
        """Path of the published tensors."""
        return run.path("model", str(self.root.read_json(run.path("model/weights.json"))["file"]))

    def last_ending(self, run: Run) -> Ending:
        """How the latest attempt says that it ended."""
        return run.endings()[run.attempts()[-1].id]

    def checkpoints(self, run: Run) -> list[int]:
        """Steps of the complete checkpoints, furthest first."""
        return [ref.step for ref in run.checkpoints()]

    def resumed(self, run: Run) -> list[int | None]:
        """The step that each attempt continued from."""
        return [a.resumed_from.step if a.resumed_from else None for a in run.attempts()]


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    """One thread, as in the launched processes; and no thousand lines of torch's on a failure."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Half of a tiny run would be the measurement of this machine's peak.
        peak = Peak(1e12, "the tests")
        patch.setattr(attempt, "peak_flops", lambda device, dtype: peak)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _a_store_that_keeps_up() -> Iterator[None]:
    """In this process every save is over before the next step; steps here take milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", and_finish(SAVE))
        yield


@pytest.fixture
def a_store_of_its_own_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves go on beside the steps, as outside of the tests."""
    monkeypatch.setattr(Saver, "save", SAVE)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Where commands of their own process come from."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that holds the tiny corpus and nothing else."""
    folder = tmp_path_factory.mktemp("corpus")
    build(write_corpus(folder), Root(str(folder / "root")))
    return folder / "root"


@pytest.fixture
def bench(
    corpus: Path, launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """A workplace of this test alone."""
    shutil.copytree(corpus, tmp_path / "root")
    for name in [name for name in os.environ if name.startswith("TESSERA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return Bench(tmp_path, launcher)


def as_options(*overrides: str) -> list[str]:
    """``--set`` options of the command line."""
    return [text for setting in overrides for text in ("--set", setting)]


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run of the tiny experiment came to."""

    root: Path
    digest: str
    points: dict[str, dict[int, float]]


def assert_as_if_undisturbed(bench: Bench, whole: Whole) -> None:
    """Losses and weights are those of the undisturbed run, bit for bit."""
    run = bench.only_run()
    for key, expected in whole.points.items():
        assert bench.points(run, key) == expected, key
    assert bench.digest(run) == whole.digest


METRICS = ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "progress/tokens")


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Whole]:
    """Makes undisturbed runs in this process; arguments are overrides."""

    def make(*overrides: str) -> Whole:
        folder = tmp_path_factory.mktemp("whole")
        shutil.copytree(corpus, folder / "root")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE, str(folder / "cache"))
            bench = Bench(folder)
            run = bench.train(*overrides).run
            points = {key: bench.points(run, key) for key in METRICS}
            return Whole(folder / "root", bench.digest(run), points)

    return make


@pytest.fixture(scope="session")
def whole(undisturbed: Callable[..., Whole]) -> Whole:
    """The undisturbed run of the tiny experiment."""
    return undisturbed()
