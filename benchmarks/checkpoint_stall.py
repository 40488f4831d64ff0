"""How long training stands still for a checkpoint, against torch's own ways to save the same state.

    python benchmarks/checkpoint_stall.py experiments/tessera_1b.yaml --usd-per-gb 0.01
    python benchmarks/checkpoint_stall.py experiments/smoke.yaml --device cpu   # a dry run

Ours is the trainer's `Saver`: a copy to host memory, then threads that write to the local disk,
digest and publish to a root in a folder of the same disk. In the same process, on the same model
and optimiser: `torch.distributed.checkpoint.save` and `torch.save`, both of which return when the
file is written. The steps beside our save are timed too, so that what the threads take away from
training counts: cost = stall + slower steps. Each figure is the median of `--saves`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from tessera.cli.attempts import place_of
from tessera.cli.common import run_script
from tessera.cloud.machine import describe_machine
from tessera.experiment import Pretrain, load_experiment
from tessera.model.loss import summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.runs import create_or_open
from tessera.storage import Root
from tessera.tracking.journal import Journal
from tessera.tracking.records import read_journal
from tessera.training.checkpoint.saver import Saver
from tessera.training.checkpoint.state import allocate_moments, training_state
from tessera.training.optim import build_optimizer
from tessera.training.parallel import World
from tessera.training.pretrain import model_shape
from tessera.training.replica import Replica
from tessera.training.stability import Watch

GB = 1e9
INTERVAL_S = 1800.0
"""One permanent checkpoint per 30 minutes."""


@dataclass(frozen=True)
class Figures:
    """Seconds; ``cost_s`` is the stall and what the steps beside the saving took longer."""

    step_s: float
    stall_s: float
    saving_s: float
    slower: float
    cost_s: float
    dcp_s: float
    torch_s: float
    bytes: int


class Bench:
    """The model of an experiment, training on random tokens."""

    def __init__(self, experiment: Pretrain, device: torch.device) -> None:
        self.experiment, self.device = experiment, device
        self.world = World(0, 1, 0, 1, device)
        shape = model_shape(experiment.model)
        model = ProtoGPT(shape)
        model.initialize(experiment.seed)
        model.to(device)
        on_gpu = device.type == "cuda"
        if on_gpu:
            for block in model.blocks:
                block.compile()
        loss = torch.compile(summed_cross_entropy) if on_gpu else summed_cross_entropy
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.replica = Replica.build(model, "auto", self.world, dtype, loss)
        self.optimizer = build_optimizer(experiment.optimizer, self.replica.trainable)
        allocate_moments(self.replica.trainable, self.optimizer)
        self.watch = Watch(experiment.stability, device)
        size = experiment.batch.micro_batch
        self.micro = 1 if size == "auto" else size
        self.vocabulary = shape.vocab_size
        self.done = 0

    def step(self) -> float:
        """One optimiser step; returns its seconds."""
        began = time.perf_counter()
        per_step = self.experiment.batch.tokens_per_step
        count = per_step // (self.micro * self.experiment.sequence)
        shape = (self.micro, self.experiment.sequence)
        total = torch.zeros((), device=self.device)
        for number in range(count):
            ids = torch.randint(self.vocabulary, shape, device=self.device)
            total += self.replica.micro_step(ids, ids, per_step, last=number == count - 1)
        norm = self.replica.clip(1.0)
        bad = self.watch.judge(self.done + 1, total, norm)
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.watch.read()  # waits for the device
        self.done += 1
        return time.perf_counter() - began

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state, as the trainer saves it."""
        return training_state(
            self.replica.trainable, {}, self.optimizer, self.watch.tensors(), rank=0
        )


def timed(action: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(bench: Bench, folder: Path, saves: int, steps: int) -> Figures:
    """Time steps and saves in ``folder``."""
    os.environ["TESSERA_CACHE"] = str(folder / "cache")
    root = Root(str(folder / "root"))
    experiment = bench.experiment
    run, _ = create_or_open(root, experiment, fingerprint="0" * 64, data={}, run_id="stall")
    attempt = run.start_attempt(place_of(describe_machine()), None)
    journal = Journal(run, attempt.id)
    settings = experiment.checkpoint.model_copy(update={"every_steps": 1, "keep": 1})
    saver = Saver(run, attempt, journal, bench.world, settings, lambda text: print(text))
    state = {"tokens": 0, "ledger": {"records": 0}}
    print(f"host memory: {timed(lambda: saver.prepare(bench.tensors())):.1f} s", flush=True)
    for _ in range(4):
        bench.step()
    plain = [bench.step() for _ in range(steps)]
    step_s = statistics.median(plain)
    saving, slow, costs = [], [], []
    for _ in range(saves):
        saver.finish()
        began = time.perf_counter()
        saver.save(bench.done, bench.tensors, lambda: state)
        stall = time.perf_counter() - began
        during = []
        while not saver.finish(time.monotonic()):
            during.append(bench.step())
        saving.append(time.perf_counter() - began)
        extra = sum(during) - len(during) * step_s
        slow.append(statistics.mean(during) / step_s - 1 if during else 0.0)
        costs.append(stall + max(0.0, extra))
        bench.step()
        print(f"saved: stall {stall:.2f} s, {saving[-1]:.1f} s in all", flush=True)
    journal.close()
    stalls = [r.number for r in read_journal(run, attempt.id) if r.key == "checkpoint/stall_s"]
    size = sum(t.numel() * t.element_size() for t in bench.tensors().values())

    def other(save: Callable[[Path], object]) -> float:
        target = folder / "other"
        shutil.rmtree(target, ignore_errors=True)
        seconds = timed(lambda: save(target))
        shutil.rmtree(target, ignore_errors=True)
        return seconds

    def with_torch(target: Path) -> None:
        target.mkdir()
        with (target / "state.pt").open("wb") as file:
            torch.save(bench.tensors(), file)
            file.flush()
            os.fsync(file.fileno())

    shutil.rmtree(folder / "cache" / "checkpoints", ignore_errors=True)
    dcp = other(lambda target: dcp_save(bench.tensors(), checkpoint_id=target, no_dist=True))
    plain_torch = other(with_torch)
    return Figures(
        step_s, statistics.median(stalls), statistics.median(saving), statistics.median(slow),
        statistics.median(costs), dcp, plain_torch, size,
    )  # fmt: skip


def show(figures: Figures, usd_per_gb: float) -> None:
    """The table, and the ratios."""
    gb = figures.bytes / GB
    rows = [
        ("step without a save", f"{figures.step_s:.3f} s"),
        (f"stall of a save ({gb:.2f} GB)", f"{figures.stall_s:.2f} s"),
        ("until it is published", f"{figures.saving_s:.1f} s"),
        ("steps meanwhile slower by", f"{figures.slower:.1%}"),
        ("cost: stall and slower steps", f"{figures.cost_s:.2f} s"),
        ("share of training, one per 30 min", f"{figures.cost_s / INTERVAL_S:.3%}"),
        (f"traffic at ${usd_per_gb:g}/GB", f"${gb * usd_per_gb:.3f}"),
        ("torch.distributed.checkpoint.save", f"{figures.dcp_s:.1f} s of stall"),
        ("torch.save", f"{figures.torch_s:.1f} s of stall"),
    ]
    for name, value in rows:
        print(f"  {name:36}{value:>20}")
    print(f"torch.distributed.checkpoint.save / ours: {figures.dcp_s / figures.stall_s:.1f}x")
    print(f"torch.save / ours: {figures.torch_s / figures.stall_s:.1f}x")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--usd-per-gb", type=float, default=0.0, help="dollars per 10^9 bytes up")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    if not isinstance(experiment, Pretrain):
        sys.exit("Error: this benchmark needs an experiment of kind pretrain.")
    bench = Bench(experiment, torch.device(arguments.device))
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(bench, Path(folder), arguments.saves, arguments.steps)
    on_gpu = arguments.device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else platform.processor()
    print(f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {sys.argv}")
    if arguments.json:
        print(json.dumps(asdict(figures)))
    else:
        show(figures, arguments.usd_per_gb)


if __name__ == "__main__":
    sys.exit(run_script(main))
