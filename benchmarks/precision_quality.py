"""Does a precision learn as well as bf16? The same runs in each, compared by validation loss.

    python benchmarks/precision_quality.py experiments/quality_136m.yaml --root ROOT \
        --precisions bf16 fp8 --seeds 1 2 --devices 0 1 --out curves.json

Every pair of precision and seed is one `tessera train` from the same initial weights on the same
samples in the same order; with several devices that many run at once. ``bf16`` is torch's plain
path under autograd, ``bf16-fused`` the fused operations. Prints the final validation loss of each,
the difference to the first precision for each seed, and whether the largest stays within --limit
nats. The curves go to --out as JSON; --also adds those of an earlier call to the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tessera.cli.common import run_script
from tessera.runs import find_run
from tessera.storage import open_root
from tessera.tracking.journal import read_journal

SETTINGS = {
    "bf16": ["precision=bf16", "kernels=torch"],
    "bf16-fused": ["precision=bf16", "kernels=fused"],
}
"""Where a name means more than a precision."""


@dataclass(frozen=True)
class Curve:
    """One finished run; losses in nats by step."""

    precision: str
    seed: int
    run_id: str
    train: dict[int, float]
    validation: dict[int, float]
    tokens_per_s: float
    seconds: float
    notes: list[str]

    @property
    def final(self) -> float:
        """Validation loss after the last step."""
        return self.validation[max(self.validation)]


def run(arguments: argparse.Namespace, precision: str, seed: int, device: str | None) -> Curve:
    """One `tessera train` to its end."""
    command = [sys.executable, "-m", "tessera", "train", arguments.experiment, "--new"]
    settings = [f"seed={seed}", *SETTINGS.get(precision, [f"precision={precision}"])]
    settings += arguments.overrides
    for setting in settings:
        command += ["--set", setting]
    command += ["--root", arguments.root, "--quiet"]
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    began = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds = time.monotonic() - began
    found = find_run(open_root(arguments.root), done.stdout.split(":", 1)[0])
    (attempt,) = found.attempts()
    records = list(read_journal(found, attempt.id))
    metrics = [record for record in records if record.kind == "metric"]

    def by_step(key: str) -> dict[int, float]:
        return {record.step: record.number for record in metrics if record.key == key}

    speeds = sorted(by_step("train/tokens_per_s").values())
    notes = [
        f"step {record.step}: {record.value['reason']}"
        for record in records
        if (record.kind, record.key) == ("event", "precision/changed")
    ]
    return Curve(
        precision, seed, found.id, by_step("train/loss"), by_step("eval/loss"),
        speeds[len(speeds) // 2], seconds, notes,
    )  # fmt: skip


def run_all(arguments: argparse.Namespace) -> list[Curve]:
    """All runs, one at a time on each device."""
    waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for seed in arguments.seeds:
        for precision in arguments.precisions:
            waiting.put((precision, seed))
    curves: list[Curve] = []
    failures: list[BaseException] = []

    def work(device: str | None) -> None:
        while not failures:
            try:
                precision, seed = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                curve = run(arguments, precision, seed, device)
            except BaseException as error:
                failures.append(error)
                return
            curves.append(curve)
            print(
                f"{precision} seed {seed}: {curve.final:.4f} nats, {curve.tokens_per_s:,.0f} "
                f"tokens/s, {curve.seconds:.0f} s {'; '.join(curve.notes)}",
                flush=True,
            )

    threads = [threading.Thread(target=work, args=(d,)) for d in arguments.devices or [None]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return curves


def _curve(entry: dict[str, Any]) -> Curve:
    """From JSON, whose keys are strings."""
    for key in ("train", "validation"):
        entry[key] = {int(step): value for step, value in entry[key].items()}
    return Curve(**entry)


def verdict(curves: Sequence[Curve], precisions: Sequence[str], limit: float) -> bool:
    """Print the comparison; whether every difference is within ``limit``."""
    finals = {(curve.precision, curve.seed): curve.final for curve in curves}
    every = sorted({curve.seed for curve in curves})
    seeds = [seed for seed in every if all((p, seed) in finals for p in precisions)]
    print("| seed | " + " | ".join(precisions) + " | " + " | ".join(
        f"{other} - {precisions[0]}" for other in precisions[1:]
    ) + " |")  # fmt: skip
    print("|---" * (2 * len(precisions)) + "|")
    worst, passed = 0.0, bool(seeds)
    for seed in seeds:
        row = [finals[precision, seed] for precision in precisions]
        differences = [value - row[0] for value in row[1:]]
        worst = max([worst, *(abs(difference) for difference in differences)])
        passed = passed and all(abs(difference) <= limit for difference in differences)  # no NaN
        cells = [f"{value:.4f}" for value in row] + [f"{value:+.4f}" for value in differences]
        print(f"| {seed} | " + " | ".join(cells) + " |")
    print(f"largest difference {worst:.4f} nats, limit {limit}")
    return passed


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--root", required=True)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--devices", nargs="*", help="CUDA devices, one run at a time on each")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--limit", type=float, default=0.01, help="nats")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    curves = []
    for path in arguments.also:
        curves += [_curve(entry) for entry in json.loads(path.read_text("utf-8"))]
    curves += run_all(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(curve) for curve in curves]) + "\n", "utf-8")
    sys.exit(0 if verdict(curves, arguments.precisions, arguments.limit) else 1)


if __name__ == "__main__":
    sys.exit(run_script(main))
