"""What a tracking server that hangs costs the trainer: step times with one and without tracking.

    python benchmarks/tracking_cost.py
    python benchmarks/tracking_cost.py --pairs 10 --steps 3000

Both are a training as ``tessera train`` does it, in a process of its own, with the same small
model, on the CPU with one thread. With tracking, MLFLOW_TRACKING_URI names a server on the loopback
that takes every connection and never answers, so the replayer beside the trainer waits, gives up
and tries again all the time; the journal's uploads come every second.

The trainer's clock leaves out the time for which its thread was ready and other processes had the
core (Linux counts that in ``schedstat``), since a machine that others use varies by tens of
percent. What the replayer takes of the cores is therefore said by itself, as its CPU seconds. Runs
go in pairs whose order changes. Of each run count the step times of the second half, taken from the
journal: in the first one the replayer imports MLflow, once in a run. Said are the means of the
paired ratios and their 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import yaml

from tessera.cli.common import run_script
from tessera.runs import open_run
from tessera.storage import Root
from tessera.tracking.records import read_journal
from tests.training.conftest import BASE, write_corpus

TOKENS = 512
"""A step."""
CHECKOUT = Path(__file__).parents[1]
T95 = {3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 15: 2.131}
"""Student's t for 95 %, by degrees of freedom."""


@contextmanager
def hanging() -> Iterator[str]:
    """The URI of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def train(folder: Path, run_id: str, uri: str | None) -> list[float]:
    """One run; the seconds of its steps, from the journal's tokens a second."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TESSERA_"))}
    environment |= {
        "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "TESSERA_HEARTBEAT_S": "1",
        "TESSERA_CACHE": str(folder / "cache"), "TESSERA_ENV_FILE": os.devnull,
        "TESSERA_DEVICE": "cpu",
    }  # fmt: skip
    if uri is not None:
        environment["MLFLOW_TRACKING_URI"] = uri
    command = [sys.executable, __file__, "--one", run_id, "--folder", str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=folder
    )
    if done.returncode:
        raise SystemExit(f"the training failed: {done.stderr}")
    if ("MLflow follows this run" in done.stderr) != (uri is not None):
        raise SystemExit(f"the replayer was expected: {uri is not None}; it said: {done.stderr}")
    print(done.stdout.strip(), flush=True)
    run = open_run(Root(str(folder / "root")), run_id)
    (attempt,) = run.attempts()
    records = read_journal(run, attempt.id)
    speeds = [r.number for r in records if r.kind == "metric" and r.key == "train/tokens_per_s"]
    return [TOKENS / speed for speed in speeds]


def one(folder: Path, run_id: str) -> None:
    """The measured process."""
    import resource

    from tessera.cli.attempts import place_of
    from tessera.cli.beside import Beside
    from tessera.cloud.machine import describe_machine
    from tessera.experiment import load_experiment
    from tessera.training import session
    from tessera.training.workplace import Instruments

    schedule = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)

    def clock() -> float:
        ready_ns = int(os.pread(schedule, 100, 0).split()[1])
        return time.monotonic() - ready_ns / 1e9

    root = Root(str(folder / "root"))
    settings = load_experiment(folder / "small.yaml", ())
    began = time.monotonic()
    with Beside(root) as beside:
        instruments = Instruments(clock=clock, began=beside.start)
        place = place_of(describe_machine(experiment_price=1.0))
        session.train(settings, root, place, run_id=run_id, quiet=True, instruments=instruments)
        seconds = time.monotonic() - began
        process = beside._process
        if process is not None:
            # It need not be waited for here; -9, and its CPU seconds are those of a child.
            process.kill()
            process.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{run_id}: {seconds:.1f} s, replayer's CPU {used.ru_utime + used.ru_stime:.2f} s")


def ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of tracked / plain over the pairs, and half of its 95 % interval."""
    ratios = [tracked / plain for plain, tracked in pairs]
    spread = statistics.stdev(ratios) / math.sqrt(len(ratios))
    return statistics.mean(ratios), T95.get(len(ratios) - 1, 1.96) * spread


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Step times beside a tracking server that hangs.")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.folder, given.one)
        return
    libraries = f"torch {version('torch')}, mlflow {version('mlflow')}"
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"Python {platform.python_version()}, {libraries}, {load}")
    with tempfile.TemporaryDirectory() as temporary, hanging() as uri:
        folder = Path(temporary)
        settings = BASE | {
            "name": "small", "tokens": given.steps * TOKENS, "log_every_steps": 1,
            "model": BASE["model"] | {"layers": 2, "d_model": 64, "heads": 2},
            "batch": {"tokens_per_step": TOKENS, "micro_batch": 8},
            "checkpoint": {"every_steps": given.steps}, "evaluation": {"every_steps": given.steps},
        }  # fmt: skip
        (folder / "small.yaml").write_text(yaml.safe_dump(settings), "utf-8")
        recipe = write_corpus(folder)
        subprocess.run(
            [sys.executable, "-m", "tessera", "corpus", "build", str(recipe), "--quiet",
             "--root", str(folder / "root")],
            check=True, cwd=folder, stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )  # fmt: skip
        pairs: dict[str, list[tuple[float, float]]] = {"median": [], "tenth percentile": []}
        for number in range(given.pairs):
            found = {}
            for tracked in (False, True) if number % 2 == 0 else (True, False):
                name = f"pair-{number}-{'tracked' if tracked else 'plain'}"
                steps = train(folder, name, uri if tracked else None)
                later = sorted(steps[len(steps) // 2 :])
                found[tracked] = statistics.median(later), later[len(later) // 10]
            for place, what in enumerate(pairs):
                plain, beside = found[False][place], found[True][place]
                pairs[what].append((plain, beside))
                print(f"pair {number}, {what}: plain {plain * 1e3:.3f} ms, "
                      f"tracked {beside * 1e3:.3f} ms, ratio {beside / plain:.4f}",
                      flush=True)  # fmt: skip
        for what, measured in pairs.items():
            mean, half = ratio(measured)
            print(f"{what}: tracked / plain = {mean:.4f} +- {half:.4f} (95 %, {given.pairs} pairs)")


if __name__ == "__main__":
    sys.exit(run_script(main))
