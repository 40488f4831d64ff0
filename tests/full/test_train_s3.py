"""From text to a trained model on real S3 servers behind a proxy that injects every fault.

Build, train, SIGTERM, continue on another machine, list: with the losses and weights of a run that
nobody disturbed and that never left a folder.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos.objects import COMPLETE, BucketObjects, FolderObjects, RunFiles
from tests.chaos.verdict import points, repeated
from tests.services.faults import MODERATE, NONE
from tests.services.proxied import Proxy
from tests.services.stores import Store
from tests.services.trainers import CHECKOUT, Finished, Forker, Running, base_environment
from tests.training.conftest import BASE, STEPS, write_corpus
from tests.training.disturb import UNDISTURBED, Disturbance

PATIENCE_S = 120.0
USD_PER_HOUR = 3.6


@dataclass(frozen=True)
class Machine:
    """One machine: a folder with the experiment and a cache of its own, and a way to the root."""

    forker: Forker
    folder: Path
    root: str
    environment: dict[str, str]

    def run(self, *arguments: str) -> Finished:
        """``tessera`` to its end, which must be a good one."""
        end = self.start(*arguments).wait(PATIENCE_S)
        assert end.code == 0, end.err
        return end

    def start(self, *arguments: str, disturb: Disturbance = UNDISTURBED) -> Running:
        """``tessera`` in a process of its own."""
        environment = {"TESSERA_CACHE": str(self.folder / "cache")} | self.environment
        command = [*arguments, "--root", self.root]
        return self.forker.start(command, environment, self.folder / "output", disturb)

    def train(self, disturb: Disturbance = UNDISTURBED) -> Running:
        experiment = str(self.folder / "experiment.yaml")
        return self.start("train", experiment, "--quiet", disturb=disturb)

    def exp(self, *arguments: str) -> Any:
        """What ``tessera-exp`` prints as JSON."""
        done = subprocess.run(
            [
                *(sys.executable, "-c", "from tessera.cli.exp import main; main()"),
                *(*arguments, "--json", "--root", self.root),
            ],
            cwd=CHECKOUT,
            env=base_environment() | self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def machine(forker: Forker, folder: Path, root: str, **environment: str) -> Machine:
    """A fresh machine with the experiment on it."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = BASE | {"log_every_steps": 1}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    return Machine(forker, folder, root, environment)


@pytest.fixture(scope="module")
def undisturbed(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """The same commands on a folder, with nobody in the way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    here = machine(forker, folder, str(folder / "root"))
    here.run("corpus", "build", str(write_corpus(folder)))
    assert here.train().wait(PATIENCE_S).code == 0
    return RunFiles(FolderObjects(folder / "root"))


def until(process: Running, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert not process.ended(), process.wait()
        assert time.monotonic() < deadline, process.said()
        time.sleep(0.01)


def test_a_run_on_a_bad_store_ends_like_one_on_a_good_disk(
    store: Store,
    proxy: Proxy,
    prefix: str,
    forker: Forker,
    undisturbed: RunFiles,
    tmp_path: Path,
) -> None:
    way = proxy.store.environment() | {"TESSERA_USD_PER_HOUR": str(USD_PER_HOUR)}
    one, other = (
        machine(forker, tmp_path / name, store.url(prefix), **way, VAST_CONTAINERLABEL=name)
        for name in ("C.1", "C.2")
    )
    files = RunFiles(BucketObjects(store, prefix))
    before = proxy.counts()
    proxy.set(MODERATE)

    one.run("corpus", "build", str(write_corpus(one.folder)))
    log = proxy.log()
    log.fresh()

    def one_is_whole() -> bool:
        return any(entry.arrived and COMPLETE.search(f"/{entry.key}") for entry in seen())

    entries: list[Any] = []

    def seen() -> list[Any]:
        entries.extend(log.fresh())
        return [entry for entry in entries if entry.method == "PUT"]

    # Past two checkpoints, of which a slow store gets at least one, and short of the third.
    process = one.train(Disturbance(halt_before=STEPS // 2 - 1))
    until(process, one_is_whole)
    process.kill(signal.SIGTERM)
    stopped = process.wait(PATIENCE_S)
    assert stopped.code == 75, stopped.err
    furthest = max(files.complete())
    assert 0 < furthest < STEPS, "it was to be interrupted in the middle"

    process = other.train()
    finished = process.wait(PATIENCE_S)
    assert finished.code == 0, finished.err
    first, second = files.attempt_names()
    assert files.attempt(second)["resumed_from"] == {"step": furthest, "attempt": first}

    (row,) = other.exp("list")
    assert (row["status"], row["step"], row["attempts"]) == ("finished", STEPS, 2)
    proxy.set(NONE)

    assert points(files) == points(undisturbed)
    assert sorted(points(files)["train/loss"]) == list(range(1, STEPS + 1))
    assert repeated(files) == []
    assert files.weights_digest() == undisturbed.weights_digest()
    injected = {kind: count - before[kind] for kind, count in proxy.counts().items()}
    assert sum(injected.values()) >= 5, f"too few faults to prove anything: {injected}"
