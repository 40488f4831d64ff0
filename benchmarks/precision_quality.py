"""Does a precision learn as well as bf16? The same runs in each, compared by validation loss.

    python benchmarks/precision_quality.py experiments/quality_136m.yaml --root ROOT \
        --precisions bf16 fp8 --seeds 1 2 --devices 0 1 --out curves.json

Every pair of precision and seed is one `tessera train` from the same initial weights on the same
samples in the same order; with several devices that many run at once. ``bf16`` is torch's plain
path under autograd, ``bf16-fused`` the fused operations, ``fp8+e4m3+exact`` fp8 with what
`VARIANTS` has under the names after it. Prints the final validation loss of each, the difference to
the first precision for each seed, and whether the largest stays within --limit nats. The curves go
to --out as JSON; --also adds those of an earlier call to the comparison.

Where time is short, differences show long before the end:

    python benchmarks/precision_quality.py experiments/quality_136m.yaml --root ROOT --seeds 1 \
        --precisions bf16 fp8+e4m3 fp8+exact --also benchmarks/measured/136m_bf16.json \
        --until 660 --finish 1 --seconds 480

takes each run to step 660 (what --also has is not run again), prints how far their losses are then
from the first precision's, and goes on to the end with the nearest one. Their learning rates are
those of the whole run. No run is begun for which, with what is to be finished, --seconds are too
few.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import secrets
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tessera.cli.common import run_script
from tessera.experiment import Pretrain, load_experiment
from tessera.runs import Run, find_run
from tessera.storage import Root, open_root
from tessera.tracking.records import Record, read_journal

SETTINGS = {
    "bf16": ["precision=bf16", "kernels=torch"],
    "bf16-fused": ["precision=bf16", "kernels=fused"],
}
"""Where a name means more than a precision."""
VARIANTS = {
    "e4m3": ["float8.gradients=e4m3"],
    "random": ["float8.weights=stochastic"],
    "sums": ["float8.sums=weights"],
    "exact": ["float8.sums=exact"],
    "first": ["float8.keep_first=1"],
    "first2": ["float8.keep_first=2"],
    "ends": ["float8.keep_first=1", "float8.keep_last=1"],
    "ends2": ["float8.keep_first=2", "float8.keep_last=2"],
}
"""What may follow a precision."""
STOPPED = 75
"""How `tessera train` leaves when it was told to go."""
WINDOW = 300
"""Steps over which training losses are compared at a step before the end."""


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


def settings_of(name: str) -> list[str]:
    """``--set`` of a precision and its variants."""
    precision, *variants = name.split("+")
    settings = list(SETTINGS.get(precision, [f"precision={precision}"]))
    for variant in variants:
        settings += VARIANTS[variant]
    return settings


def run(
    arguments: argparse.Namespace,
    precision: str,
    seed: int,
    device: str | None,
    *,
    run_id: str | None = None,
    until: int | None = None,
) -> Curve:
    """One `tessera train`: to its end or to ``until``, from the beginning or from where it was."""
    run_id = run_id or f"{precision.replace('+', '-')}-{seed}-{secrets.token_hex(4)}"
    command = [sys.executable, "-m", "tessera", "train", arguments.experiment, "--run-id", run_id]
    for setting in [f"seed={seed}", *settings_of(precision), *arguments.overrides]:
        command += ["--set", setting]
    command += ["--root", arguments.root, "--quiet"]
    environment = {**os.environ, "TESSERA_HEARTBEAT_S": "1"}  # how soon the journal can be read
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    root = open_root(arguments.root)
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        while until is not None and process.poll() is None:
            time.sleep(0.5)
            if reached(root, run_id) >= until:
                process.send_signal(signal.SIGTERM)
                until = None
    if process.returncode not in (0, STOPPED):
        raise subprocess.CalledProcessError(process.returncode, command)
    return curve_of(find_run(root, run_id), precision, seed, time.monotonic() - began)


def reached(root: Root, run_id: str) -> int:
    """The last step with a training loss in the root; 0 if there is none, or no such run yet."""
    if not root.exists(f"runs/{run_id}/run.json"):
        return 0
    records = records_of(find_run(root, run_id))
    return max((record.step for record in records if record.key == "train/loss"), default=0)


def records_of(found: Run) -> list[Record]:
    """Of all attempts, one after the other."""
    return [record for a in found.attempts() for record in read_journal(found, a.id)]


def curve_of(found: Run, precision: str, seed: int, seconds: float) -> Curve:
    """What its journals say so far."""
    records = records_of(found)
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


def run_all(arguments: argparse.Namespace, known: Sequence[Curve]) -> list[Curve]:
    """All runs that are not ``known``, one at a time on each device."""
    began = time.monotonic()
    have = {(curve.precision, curve.seed) for curve in known}
    waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for seed in arguments.seeds:
        for precision in arguments.precisions:
            if (precision, seed) not in have:
                waiting.put((precision, seed))
    curves: list[Curve] = []
    failures: list[BaseException] = []

    def work(device: str | None) -> None:
        while not failures:
            try:
                precision, seed = waiting.get_nowait()
            except queue.Empty:
                return
            if needed(arguments, curves) > arguments.seconds - (time.monotonic() - began):
                print(f"{precision} seed {seed}: not begun, the time is short", flush=True)
                continue
            try:
                curve = run(arguments, precision, seed, device, until=arguments.until)
            except BaseException as error:
                failures.append(error)
                return
            curves.append(curve)
            report(curve)
            if arguments.until:
                compare([*known, *curves], arguments.precisions[0], arguments.until)

    threads = [threading.Thread(target=work, args=(d,)) for d in arguments.devices or [None]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return curves


def needed(arguments: argparse.Namespace, curves: Sequence[Curve]) -> float:
    """Seconds for one more run like the last and then all that are to be finished; 0 if unknown."""
    if not curves:
        return 0.0
    last = curves[-1].seconds
    if not arguments.until:
        return last
    rest: float = arguments.finish * (steps_of(arguments) / arguments.until - 1)
    return last * (1 + rest)


def steps_of(arguments: argparse.Namespace) -> int:
    """Of a whole run."""
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    assert isinstance(experiment, Pretrain)
    assert experiment.steps is not None, "curves are compared at their last step, so say tokens"
    return experiment.steps


def finish(
    arguments: argparse.Namespace, known: Sequence[Curve], curves: list[Curve]
) -> list[Curve]:
    """``curves`` with those whose losses are lowest at ``until`` taken to their ends.

    Of the variants, that is: ``bf16-fused`` is there to say what the fused operations do alone.
    """
    first = arguments.precisions[0]
    gaps = {
        (curve.precision, curve.seed): distance(curve, other, arguments.until)[0]
        for curve in curves
        for other in [*known, *curves]
        if (other.precision, other.seed) == (first, curve.seed) and curve.precision not in SETTINGS
    }
    nearest = sorted(gaps, key=lambda pair: gaps[pair])[: arguments.finish]
    done = []
    for curve in curves:
        if (curve.precision, curve.seed) in nearest:
            curve = run(arguments, curve.precision, curve.seed, None, run_id=curve.run_id)
            report(curve)
        done.append(curve)
    return done


def report(curve: Curve) -> None:
    """One line about a run."""
    step = max(curve.validation, default=0)
    loss = f"{curve.final:.4f} nats at step {step}, " if curve.validation else ""
    print(
        f"{curve.precision} seed {curve.seed}: {loss}{curve.tokens_per_s:,.0f} tokens/s, "
        f"{curve.seconds:.0f} s {'; '.join(curve.notes)}",
        flush=True,
    )


def distance(curve: Curve, other: Curve, at: int) -> tuple[float, float | None]:
    """How much higher the losses of ``curve`` are than those of ``other`` up to step ``at``.

    Training losses on average over the last ``WINDOW`` steps; validation at the last step that both
    have, None if there is none.
    """
    steps = [s for s in curve.train if s in other.train and at - WINDOW < s <= at]
    train = statistics.fmean(curve.train[s] - other.train[s] for s in steps)
    both = [s for s in curve.validation if s in other.validation and s <= at]
    if not both:
        return train, None
    return train, curve.validation[max(both)] - other.validation[max(both)]


def compare(curves: Sequence[Curve], first: str, at: int) -> None:
    """Print the distance of each curve from the ``first`` precision's of its seed."""
    references = {curve.seed: curve for curve in curves if curve.precision == first}
    print(f"| at step {at} | seed | training - {first} | validation - {first} |\n|---|---|---|---|")
    for curve in curves:
        if curve.precision == first or curve.seed not in references:
            continue
        train, validation = distance(curve, references[curve.seed], at)
        shown = "" if validation is None else f"{validation:+.4f}"
        print(f"| {curve.precision} | {curve.seed} | {train:+.4f} | {shown} |", flush=True)


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
    parser.add_argument("--until", type=int, help="stop runs at this step and compare there")
    parser.add_argument("--finish", type=int, default=0, help="runs to take on to the end then")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all of it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    known = []
    for path in arguments.also:
        known += [_curve(entry) for entry in json.loads(path.read_text("utf-8"))]

    def keep(curves: Sequence[Curve]) -> None:
        if arguments.out:
            document = json.dumps([asdict(curve) for curve in curves])
            arguments.out.write_text(document + "\n", "utf-8")

    curves = run_all(arguments, known)
    keep(known + curves)
    if arguments.until and arguments.finish:
        curves = finish(arguments, known, curves)
        keep(known + curves)
    steps = steps_of(arguments)
    ended = [curve for curve in known + curves if max(curve.validation, default=0) == steps]
    complete = {curve.precision for curve in ended}
    precisions = [name for name in arguments.precisions if name in complete]
    sys.exit(0 if verdict(ended, precisions, arguments.limit) else 1)


if __name__ == "__main__":
    sys.exit(run_script(main))
