"""What a tracking server that hangs costs the trainer: step times with one and without tracking.

    python benchmarks/tracking_cost.py
    python benchmarks/tracking_cost.py --pairs 10 --steps 3000

Both are ``tessera train`` as a process of its own on the same small model on the CPU, with one
thread. With tracking, MLFLOW_TRACKING_URI names a server on the loopback that takes every
connection and never answers, so the replayer beside the trainer waits, gives up and tries again all
the time; the journal's uploads come every second. Runs go in pairs whose order changes. Of each run
count the step times of the second half, taken from the journal: in the first one the replayer
imports MLflow, once in a run. Said are the means of the paired ratios and their 95 % intervals
(Student's t), of the median and of the tenth percentile, which others on the machine disturb less.
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
    """One run; the seconds of its steps by the journal's spans."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TESSERA_"))}
    environment |= {
        "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "TESSERA_HEARTBEAT_S": "1",
        "TESSERA_CACHE": str(folder / "cache"), "TESSERA_ENV_FILE": os.devnull,
        "TESSERA_DEVICE": "cpu",
    }  # fmt: skip
    if uri is not None:
        environment["MLFLOW_TRACKING_URI"] = uri
    command = [sys.executable, "-m", "tessera", "train", str(folder / "small.yaml"), "--quiet"]
    command += ["--run-id", run_id, "--root", str(folder / "root")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=folder
    )
    if done.returncode:
        raise SystemExit(f"the training failed: {done.stderr}")
    if ("MLflow follows this run" in done.stderr) != (uri is not None):
        raise SystemExit(f"the replayer was expected: {uri is not None}; it said: {done.stderr}")
    run = open_run(Root(str(folder / "root")), run_id)
    (attempt,) = run.attempts()
    found = [r for r in read_journal(run, attempt.id) if r.kind == "span" and r.key == "train"]
    return [record.number for record in found]


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
    given = parser.parse_args()
    libraries = f"torch {version('torch')}, mlflow {version('mlflow')}"
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"Python {platform.python_version()}, {libraries}, {load}")
    with tempfile.TemporaryDirectory() as temporary, hanging() as uri:
        folder = Path(temporary)
        settings = BASE | {
            "name": "small", "tokens": given.steps * 512, "log_every_steps": 1,
            "model": BASE["model"] | {"layers": 2, "d_model": 64, "heads": 2},
            "batch": {"tokens_per_step": 512, "micro_batch": 8},
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
