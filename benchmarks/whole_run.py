"""Tokens per second of a whole `tessera train` against its bare optimiser step on the same GPU.

    python benchmarks/whole_run.py experiments/tessera_1b_fp8.yaml --root ROOT \
        --set data.corpus=novels-ja-en --set tokens=31457280 --out run.json

The bare step is what `tessera bench` measures, the median of 20 steps on the run's own first
tokens, before and after the run, for a card that has been busy for minutes is slower than a cool
one. The run is the whole command: loader, journal, progress, evaluations and checkpoints as the
experiment says. From its journal: the median of the log points, and the tokens from the first log
point to the last over all the time between, evaluations and checkpoints included. Losses go to
--out as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from tessera.cli.common import run_script
from tessera.experiment import Pretrain, load_experiment
from tessera.runs import find_run
from tessera.storage import Root, open_root
from tessera.tracking.records import Record, read_journal
from tessera.training.bench.runner import StepRunner
from tessera.training.bench.tokens import corpus_batches

STEPS, WARM_UP = 20, 3


def bare(experiment: Pretrain, root: Root, device: torch.device) -> float:
    """Tokens a second at the median step."""
    runner = StepRunner(experiment, device)
    batches = corpus_batches(experiment, root, device, count=STEPS + WARM_UP)
    timing = runner.time(batches, STEPS, WARM_UP, lambda: None)
    del runner
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return experiment.batch.tokens_per_step / statistics.median(timing.seconds)


def train(arguments: argparse.Namespace) -> list[Record]:
    """Run `tessera train` to its end, or for ``seconds``, and read its journal."""
    name = f"whole-{os.getpid()}-{int(time.time())}"
    command = [sys.executable, "-m", "tessera", "train", arguments.experiment, "--run-id", name]
    for setting in arguments.overrides:
        command += ["--set", setting]
    training = subprocess.Popen([*command, "--root", arguments.root])
    try:
        training.wait(arguments.seconds)
    except subprocess.TimeoutExpired:
        training.terminate()  # it writes a checkpoint and leaves with 75
        training.wait()
    if training.returncode not in (0, 75):
        sys.exit(training.returncode)
    run = find_run(open_root(arguments.root), name)
    return [record for attempt in run.attempts() for record in read_journal(run, attempt.id)]


def by_step(records: list[Record], key: str) -> dict[int, Record]:
    """The records of one metric."""
    return {r.step: r for r in records if r.kind == "metric" and r.key == key}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--root", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--seconds", type=float, help="stop the run after so many")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    assert isinstance(experiment, Pretrain)
    root = open_root(arguments.root)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = bare(experiment, root, device)
    print(f"bare step before: {before:,.0f} tokens/s", flush=True)
    records = train(arguments)
    after = bare(experiment, root, device)
    print(f"bare step after: {after:,.0f} tokens/s")
    points = list(by_step(records, "progress/tokens").values())
    tokens = points[-1].number - points[0].number
    seconds = points[-1].time - points[0].time
    speeds = [record.number for record in by_step(records, "train/tokens_per_s").values()]
    middle, whole = statistics.median(speeds[1:]), tokens / seconds
    print(f"log points: median {middle:,.0f} tokens/s, {middle / after:.1%} of the bare step after")
    print(
        f"whole: {tokens:,.0f} tokens in {seconds:.0f} s, {whole:,.0f} tokens/s, "
        f"{whole / after:.1%} of the bare step after, {whole / before:.1%} of the one before"
    )
    if arguments.out:
        losses = {step: r.number for step, r in by_step(records, "train/loss").items()}
        held = {step: r.number for step, r in by_step(records, "eval/loss").items()}
        figures = {"before": before, "after": after, "median": middle, "whole": whole}
        document = {**figures, "seconds": seconds, "train": losses, "validation": held}
        arguments.out.write_text(json.dumps(document) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(run_script(main))
