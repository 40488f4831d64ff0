"""Several workers train as one: the same samples, the losses of one, checkpoints for any number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tessera.corpus.build import build
from tessera.storage import Root
from tests.services.trainers import CHECKOUT
from tests.training.conftest import Bench, write_corpus

TOLERANCE = 1e-5
"""Relative, float32, 30 steps: the order of sums differs. Measured: 5.2e-6 for two, then four."""
SETTINGS = ("log_every_steps=1", "batch.micro_batch=2", "checkpoint.every_steps=5")


def command(bench: Bench, gpus: int, *settings: str) -> list[str]:
    arguments = [sys.executable, "-m", "tessera", *bench.arguments("--gpus", str(gpus))]
    for setting in (*SETTINGS, *settings):
        arguments += ["--set", setting]
    return arguments


def environment(bench: Bench) -> dict[str, str]:
    return {**os.environ, "TESSERA_CACHE": str(bench.cache), "OMP_NUM_THREADS": "1"}


HALT = """\
from tests.training.disturb import Disturbance
Disturbance(halt_before={before}).install(setattr)
"""


def start_and_halt(bench: Bench, gpus: int, step: int, *settings: str) -> subprocess.Popen[bytes]:
    """Start; return once a checkpoint of ``step`` or later is whole.

    Every worker stands still some steps later until it is told to stop: they take milliseconds.
    """
    site = bench.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HALT.format(before=step + 8), "utf-8")
    halting = environment(bench) | {"PYTHONPATH": f"{site}{os.pathsep}{CHECKOUT}"}
    process = subprocess.Popen(command(bench, gpus, *settings), env=halting)
    deadline = time.monotonic() + 120
    while not any(done >= step for run in bench.runs() for done in bench.checkpoints(run)):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)
    return process


def stop_after(bench: Bench, gpus: int, step: int, *settings: str) -> int:
    """Stop with SIGTERM once a checkpoint of ``step`` or later is whole; the exit code."""
    process = start_and_halt(bench, gpus, step, *settings)
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def finish(bench: Bench, gpus: int, *settings: str) -> None:
    done = subprocess.run(
        command(bench, gpus, *settings), env=environment(bench), timeout=180, check=False
    )
    assert done.returncode == 0


@pytest.fixture(scope="module")
def corpus_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build(write_corpus(folder), Root(str(folder / "root")))
    return folder / "root"


def workplace(folder: Path, corpus_root: Path) -> Bench:
    folder.mkdir(exist_ok=True)
    shutil.copytree(corpus_root, folder / "root")
    return Bench(folder)


@pytest.fixture(scope="module")
def alone(corpus_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one worker, undisturbed."""
    bench = workplace(tmp_path_factory.mktemp("alone"), corpus_root)
    finish(bench, 1)
    return bench.points(bench.only_run())


@pytest.mark.parametrize(
    ("strategy", "then", "other"), [("ddp", 1, "ddp"), ("fsdp", 1, "ddp"), ("ddp", 4, "fsdp")]
)
def test_saved_on_two_continued_on_another_number(
    tmp_path: Path,
    corpus_root: Path,
    alone: dict[int, float],
    strategy: str,
    then: int,
    other: str,
) -> None:
    bench = workplace(tmp_path / "b", corpus_root)
    assert stop_after(bench, 2, 5, f"parallel={strategy}") == 75
    finish(bench, then, f"parallel={other}")
    run = bench.only_run()
    resumed = bench.resumed(run)
    assert resumed[0] is None
    assert resumed[1] is not None
    assert resumed[1] >= 5
    losses = bench.points(run)
    assert losses.keys() == alone.keys()
    worst = max(abs(losses[step] - alone[step]) / alone[step] for step in alone)
    print(f"{strategy} on 2, {other} on {then}: largest relative difference {worst:.2g}")
    assert worst < TOLERANCE


def test_bad_input_is_one_sentence_of_one_worker(
    tmp_path: Path, corpus_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench = workplace(tmp_path / "b", corpus_root)
    done = subprocess.run(
        command(bench, 2, "data.corpus=nowhere"), env=environment(bench), check=False, timeout=120
    )
    said = capfd.readouterr().err
    assert done.returncode == 2
    assert said.count("Error: Corpus 'nowhere' is not built in ") == 1
    assert "Traceback" not in said


def test_workers_do_not_outlive_a_command_that_was_killed(
    tmp_path: Path, corpus_root: Path
) -> None:
    bench = workplace(tmp_path / "b", corpus_root)
    process = start_and_halt(bench, 2, 5)
    workers = psutil.Process(process.pid).children()
    try:
        assert len(workers) == 2
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while any(_runs(worker) for worker in workers):
            assert time.monotonic() < deadline, "workers live on"
            time.sleep(0.05)
    finally:
        for worker in workers:
            if worker.is_running():
                worker.kill()


def _runs(process: psutil.Process) -> bool:
    """Whether it is there and no zombie: nobody may be left who asks for its exit code."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
