"""The undisturbed run, and one run under fire on each store."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.chaos.driver import ChaosError, Course, Driver, Kill, Watch
from tests.chaos.machines import Dollars, Machine
from tests.chaos.moments import plan
from tests.chaos.objects import BucketObjects, FolderObjects, FolderWatch, Objects, RunFiles
from tests.chaos.verdict import Check, judge, listed
from tests.services.faults import Faults
from tests.services.proxied import Proxy, proxy_for
from tests.services.stores import Store, serve
from tests.services.trainers import Forker
from tests.training.conftest import BASE, write_corpus

TOKENS_PER_STEP = 256
EVERY_STEPS = 5
STEPS_A_KILL = 30


@dataclass(frozen=True)
class Setting:
    """What is asked for."""

    kills: int
    seed: int
    faults: Faults
    margin_steps: int = 150

    @property
    def steps(self) -> int:
        """Enough that the run does not finish before the last kill but one.

        Checkpoints are published while the loop goes on, so by the time that a kill is due and its
        moment has come the loop may be some seconds further; a step takes about 20 ms.
        """
        return STEPS_A_KILL * self.kills + self.margin_steps


@dataclass(frozen=True)
class Bench:
    """The experiment, and what it comes to if nobody disturbs it."""

    experiment: Path
    root: FolderObjects
    undisturbed: RunFiles


@dataclass(frozen=True)
class Outcome:
    """One store's run. ``stopped`` says why it could not be carried to its end."""

    store: str
    steps: int
    planned: int
    kills: list[Kill]
    gave_up: int
    machines: int
    faults: dict[str, int]
    requests: int
    seconds: float
    checks: list[Check]
    dollars: Dollars | None
    stopped: str | None

    @property
    def good(self) -> bool:
        """Whether all of it came to pass and all of it holds."""
        all_hold = bool(self.checks) and all(check.holds for check in self.checks)
        return self.stopped is None and len(self.kills) == self.planned and all_hold


def prepare(forker: Forker, folder: Path, setting: Setting) -> Bench:
    """Build the corpus and train once, undisturbed, in a plain folder."""
    settings = BASE | {
        "tokens": setting.steps * TOKENS_PER_STEP,
        "batch": {"tokens_per_step": TOKENS_PER_STEP, "micro_batch": 1},
        "checkpoint": {"every_steps": EVERY_STEPS, "keep": 2},
        "evaluation": {"every_steps": 4 * EVERY_STEPS, "tokens": 512},
        "log_every_steps": 1,
        # A spike that is not applied leaves no loss, and every step has to leave one here. With the
        # weights of this seed the undisturbed run has one.
        "stability": {"sigma": 1000.0},
    }
    experiment = folder / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(settings), "utf-8")
    root = folder / "undisturbed"
    environment = {"TESSERA_CACHE": str(folder / "cache-undisturbed")}
    recipe = str(write_corpus(folder))
    for arguments in (
        ["corpus", "build", recipe, "--root", str(root)],
        ["train", str(experiment), "--root", str(root), "--quiet"],
    ):
        end = forker.run(arguments, environment, folder / "output")
        if end.code != 0:
            raise AssertionError(f"tessera {arguments[0]} ended with {end.code}: {end.err}")
    objects = FolderObjects(root)
    return Bench(experiment, objects, RunFiles(objects))


@dataclass(frozen=True)
class Place:
    """A store that holds the corpus and nothing else. ``reader`` leads there past the proxy."""

    root: str
    trainer: dict[str, str]
    reader: dict[str, str]
    objects: Objects
    watch: Watch
    proxy: Proxy | None


@contextmanager
def place(store: str, bench: Bench, folder: Path, setting: Setting) -> Iterator[Place]:
    """Serve ``store`` (or a folder) and put the corpus there."""
    if store == "folder":
        root = folder / "root"
        objects = FolderObjects(root)
        _copy_corpus(bench, objects)
        yield Place(str(root), {}, {}, objects, FolderWatch(root), None)
        return
    with (
        serve(store, folder / "server") as served,
        proxy_for(served, folder, faults=setting.faults, seed=setting.seed) as proxy,
    ):
        yield _in_bucket(served, proxy, bench)


def _in_bucket(served: Store, proxy: Proxy, bench: Bench) -> Place:
    prefix = "chaos"
    objects = BucketObjects(served, prefix)
    _copy_corpus(bench, objects)
    return Place(
        served.url(prefix), proxy.store.environment(), served.environment(), objects, proxy.log(),
        proxy,
    )  # fmt: skip


def _copy_corpus(bench: Bench, objects: Objects) -> None:
    for key in bench.root.keys("corpora/"):
        objects.write(key, bench.root.read(key))


def run_store(
    store: str,
    forker: Forker,
    bench: Bench,
    folder: Path,
    setting: Setting,
    report: Callable[[str, Kill, int], None],
) -> Outcome:
    """One run under fire on ``store``, judged."""
    folder.mkdir()
    began = time.monotonic()
    checks: list[Check] = []
    dollars: Dollars | None = None
    stopped: str | None = None
    with place(store, bench, folder, setting) as where:
        files = RunFiles(where.objects)
        chance = random.Random(f"{setting.seed} {store}")
        driver = Driver(
            forker,
            ["train", str(bench.experiment), "--root", where.root, "--quiet"],
            where.trainer,
            files,
            where.watch,
            folder,
            Course([Machine.rent(1, folder)]),
            lambda kill: report(store, kill, setting.steps),
        )
        strikes = plan(setting.kills, chance, reads_visible=where.proxy is not None)
        try:
            driver.run(strikes)
            row = listed(where.root, where.reader)
            checks, dollars = judge(files, bench.undisturbed, driver.course, setting.steps, row)
        except (ChaosError, AssertionError) as error:
            stopped = str(error)
        counts = where.proxy.counts() if where.proxy else {}
        requests = where.proxy.requests() if where.proxy else 0
    return Outcome(
        store, setting.steps, setting.kills, driver.course.kills, driver.course.gave_up,
        len(driver.course.machines), counts, requests, time.monotonic() - began, checks, dollars,
        stopped,
    )  # fmt: skip
