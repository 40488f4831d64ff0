"""Seconds from `tessera train` to its first optimiser step, with empty and with filled caches.

    python benchmarks/start_up.py experiments/tessera_1b.yaml --root ROOT [--set KEY=VALUE ...]

Twice the same run of three steps, each logged: with the compilers' caches (Triton, Inductor,
flash-attn-4) and the shards' cache empty, then with what the first left there. Each is a process of
its own, and the clock begins before it; the evaluation before the first step counts too. Prints
when the attempt began (imports, corpus, weights) and when the first and the last step were done.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tessera.cli.common import run_script
from tessera.experiment import Pretrain, load_experiment
from tessera.runs import find_run
from tessera.storage import open_root
from tessera.tracking.records import read_journal

STEPS = 3
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash4",
    "TESSERA_CACHE": "tessera",
}


def seconds_to(arguments: argparse.Namespace, caches: Path) -> dict[str, float]:
    """One run: seconds from before the start of its process to what its journal tells."""
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    assert isinstance(experiment, Pretrain)
    tokens = STEPS * experiment.batch.tokens_per_step
    command = [sys.executable, "-m", "tessera", "train", arguments.experiment, "--new", "--quiet"]
    settings = [f"tokens={tokens}", "log_every_steps=1", "evaluation.tokens=65536"]
    for setting in [*arguments.overrides, *settings]:
        command += ["--set", setting]
    command += ["--root", arguments.root]
    places = {name: str(caches / folder) for name, folder in CACHES.items()}
    environment = {**os.environ, "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", **places}
    began = time.time()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    run = find_run(open_root(arguments.root), done.stdout.split(":", 1)[0])
    (attempt,) = run.attempts()
    found: dict[str, float] = {}
    for record in read_journal(run, attempt.id):
        if record.key == "attempt/started":
            found["attempt"] = record.time - began
        if record.key == "train/loss":
            found[f"step {record.step}"] = record.time - began
    return found


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--root", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    print("| caches | attempt began | first step done | third step done |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("empty", "filled"):
            found = seconds_to(arguments, Path(folder))
            shown = (found["attempt"], found["step 1"], found[f"step {STEPS}"])
            print(
                f"| {name} | " + " | ".join(f"{value:.1f} s" for value in shown) + " |", flush=True
            )


if __name__ == "__main__":
    sys.exit(run_script(main))
