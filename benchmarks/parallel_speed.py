"""Tokens per second on one GPU and on all of this machine, the same global batch, random tokens.

    python benchmarks/parallel_speed.py experiments/tessera_1b.yaml
    python benchmarks/parallel_speed.py experiments/tessera_1b.yaml --device cpu --tiny   # dry run

Each variant is a fresh set of workers that this script starts: the model of the experiment, its
blocks compiled one by one, bf16, ``batch.tokens_per_step`` split evenly, clipping and fused AdamW.
Batches lie on the device already, so neither the loader nor the disk is measured.

One GPU is measured on every card at the same time, each training for itself: cards of one machine
differ by some per cent, and together they go as fast as the slowest. Ratios are to their mean.

Speed: rounds of three whole steps without a look at the device in between, the median round after
three steps of warm-up; the slowest worker counts. Synchronisation: what forward and backward take
longer with it than without, timed step by step, so it is what nothing hides (under FSDP only the
sum of gradients: parameters are fetched in both). ``bf16 gradients`` rounds them and changes the
loss: it is not the default, and its figure stands for itself. A variant that fails or does not fit
the time is named above the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tessera.cli.common import run_script
from tessera.model.loss import summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape
from tessera.training.parallel import World, join, leave
from tessera.training.replica import DDP, FSDP, SINGLE, Replica, Tuning

GIB = 2**30
BUDGET_S = 225.0
VARIANT_S = 90.0  # the first one compiles; the others find most of that in the cache
LEAST_S = 20.0
WARM_UP = 2
ROUND = 3

ALONE = "one GPU"
VARIANTS: dict[str, tuple[str, Tuning]] = {
    ALONE: (SINGLE, Tuning()),
    "ddp": (DDP, Tuning()),
    "fsdp": (FSDP, Tuning()),
    "ddp: bf16 gradients": (DDP, Tuning(bf16_gradients=True)),
    "ddp: buckets of 25 MB": (DDP, Tuning(bucket_mb=25)),
    "fsdp: blocks kept whole": (FSDP, Tuning(reshard=False)),
    "ddp: buckets of 500 MB": (DDP, Tuning(bucket_mb=500)),
    "ddp: gradients beside the buckets": (DDP, Tuning(bucket_view=False)),
}
"""In the order of interest: what comes last falls to the time limit first."""


@dataclass(frozen=True)
class Size:
    """What one step is: sequences of ``sequence`` tokens, ``micro`` at once, ``total`` a step."""

    shape: ModelShape
    sequence: int
    micro: int
    total: int

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all workers."""
        return self.total * self.sequence


@dataclass(frozen=True)
class Measured:
    """Of one worker: seconds a step, of synchronisation and of the update, peak, first loss."""

    step_s: float
    sync_s: float
    update_s: float
    peak_gib: float | None
    rounds: int
    loss: float


def size_of(path: str, tiny: bool) -> Size:
    """The experiment's, or one that two CPU cores step in a fraction of a second."""
    if tiny:
        shape = ModelShape(layers=2, d_model=64, heads=2, context=128, vocab_size=512)
        return Size(shape, 128, 2, 8)
    try:
        from tessera.experiment import load_experiment
    except ModuleNotFoundError:  # a bare GPU machine without a YAML library
        return _read_size(path)
    experiment = load_experiment(path)
    if experiment.kind != "pretrain":
        sys.exit(f"{path} is no pretraining.")
    model, batch = experiment.model, experiment.batch
    micro = 4 if batch.micro_batch == "auto" else batch.micro_batch
    shape = ModelShape(**model.model_dump(exclude={"init_std"}))
    return Size(shape, experiment.sequence, micro, batch.tokens_per_step // experiment.sequence)


def _read_size(path: str) -> Size:
    """The same from ``key: value`` lines, for a file that extends no other."""
    pairs = dict(re.findall(r"^\s*(\w+):\s*([\w.+-]+)", Path(path).read_text(), re.MULTILINE))
    names = ("layers", "d_model", "heads", "context", "vocab_size", "mlp_ratio")
    shape = ModelShape(
        **{name: int(pairs[name]) for name in names},
        gelu=pairs["gelu"],
        norm_eps=float(pairs["norm_eps"]),
    )
    sequence = int(pairs["sequence"])
    total = int(pairs["tokens_per_step"]) // sequence
    return Size(shape, sequence, int(pairs["micro_batch"]), total)


# -- a worker --------------------------------------------------------------------------------------


class Bench:
    """One worker's model, optimiser and batches."""

    def __init__(self, size: Size, name: str, world: World) -> None:
        strategy, tuning = VARIANTS[name]
        self.size, self.world, device = size, world, world.device
        on_gpu = device.type == "cuda"  # a CPU needs minutes to compile
        torch.manual_seed(1)
        with torch.device(device):
            model = ProtoGPT(size.shape)
        with torch.no_grad():  # on the device: drawing 10^9 weights on the CPU takes half a minute
            for parameter in model.parameters():
                parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        for block in model.blocks if on_gpu else ():
            block.compile()
        loss = torch.compile(summed_cross_entropy) if on_gpu else summed_cross_entropy
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.replica = Replica.build(model, strategy, world, dtype, loss, tuning)
        self.optimizer = torch.optim.AdamW(self.replica.trainable.values(), lr=1e-4, fused=True)
        shape = (size.total, size.sequence + 1)
        ids = torch.randint(size.shape.vocab_size, shape, device=device)  # equal seeds, equal ids
        mine = ids.chunk(world.size)[world.rank]
        self.micro = [(part[:, :-1], part[:, 1:]) for part in torch.split(mine, size.micro)]

    def wait(self) -> float:
        """Seconds on a clock after everything so far is done."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def passes(self, synchronise: bool = True) -> Tensor:
        """Forward and backward of all micro-batches; this worker's part of the loss."""
        total = torch.zeros((), device=self.world.device)
        for number, (inputs, targets) in enumerate(self.micro):
            last = synchronise and number == len(self.micro) - 1
            total += self.replica.micro_step(inputs, targets, self.size.tokens, last)
        return total

    def update(self) -> None:
        """Clip and step."""
        self.replica.clip(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def rounds(self, seconds: float) -> list[float]:
        """Seconds a step, one figure a round; at least two rounds."""
        took: list[float] = []
        began = time.monotonic()
        while len(took) < 2 or not self.world.any(time.monotonic() - began > seconds):
            self.world.barrier()
            start = self.wait()
            for _ in range(ROUND):
                self.world.any(False)  # as the loop asks for a stop request
                self.passes()
                self.update()
            took.append((self.wait() - start) / ROUND)
        return took

    def parts(self) -> tuple[float, float, float]:
        """Median seconds of the passes, of the same without synchronisation, and of the update."""
        whole, update, alone = [], [], []
        for _ in range(3):
            self.world.barrier()
            start = self.wait()
            self.passes()
            between = self.wait()
            self.update()
            whole.append(between - start)
            update.append(self.wait() - between)
        for _ in range(3):  # last, because gradients that stay at home pile up
            self.world.barrier()
            start = self.wait()
            self.passes(synchronise=False)
            alone.append(self.wait() - start)
            if self.replica.strategy != FSDP:
                self.optimizer.zero_grad(set_to_none=True)
        return statistics.median(whole), statistics.median(alone), statistics.median(update)

    def measure(self, seconds: float) -> Measured:
        """Warm up, then measure rounds for ``seconds``, then the parts of a step."""
        loss = float(self.world.sum(self.passes()))
        self.update()
        for _ in range(WARM_UP):
            self.passes()
            self.update()
        on_gpu = self.world.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        rounds = self.rounds(seconds)
        peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
        passes, alone, update = self.parts()
        step = statistics.median(rounds)
        return Measured(step, passes - alone, update, peak, len(rounds), loss)


def work(arguments: argparse.Namespace) -> None:
    """A worker's life: measure one variant; rank 0 writes what the slowest worker measured."""
    world = join(arguments.device, timeout_s=60)
    bench = Bench(size_of(arguments.experiment, arguments.tiny), arguments.variant, world)
    everyone = world.gather(bench.measure(arguments.seconds))
    if world.is_main:
        slowest = max(everyone, key=lambda one: one.step_s)
        Path(arguments.result).write_text(json.dumps(asdict(slowest)))
    leave(world)


# -- the parent ------------------------------------------------------------------------------------


def run_variant(arguments: argparse.Namespace, name: str, workers: int, limit_s: float) -> Measured:
    """Start the workers of one variant; a RuntimeError says why there is no figure."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, *sys.argv, "--variant", name, "--result", str(result)]
        command += ["--device", arguments.device]
        processes = []
        for rank in range(workers):
            torchrun = {"RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1"}
            torchrun |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": workers, "MASTER_PORT": port}
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
            environ = os.environ | threads | {k: str(v) for k, v in torchrun.items()}
            processes.append(subprocess.Popen(command, env=environ))
        try:
            _wait(processes, time.monotonic() + limit_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return Measured(**json.loads(result.read_text()))


def run_alone(arguments: argparse.Namespace, cards: int, limit_s: float) -> list[Measured]:
    """One GPU's variant on every card at once, each for itself: what the cards differ by."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{card}.json" for card in range(cards)]
        processes = []
        for card, result in enumerate(results):
            command = [sys.executable, *sys.argv, "--variant", ALONE, "--result", str(result)]
            command += ["--device", arguments.device]
            alone = {"CUDA_VISIBLE_DEVICES": str(card), "WORLD_SIZE": "1"}
            alone |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cards))}
            processes.append(subprocess.Popen(command, env=os.environ | alone))
        try:
            _wait(processes, time.monotonic() + limit_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [Measured(**json.loads(result.read_text())) for result in results]


def _wait(processes: Sequence[subprocess.Popen[bytes]], until: float) -> None:
    """Return once all ended well; a RuntimeError as soon as one did not."""
    while True:
        codes = [process.poll() for process in processes]
        bad = [code for code in codes if code]
        if bad:
            raise RuntimeError(f"a worker left with {bad[0]}")
        if None not in codes:
            return
        if time.monotonic() > until:
            raise RuntimeError("it did not fit the time")
        time.sleep(0.1)


def print_table(rows: dict[str, tuple[int, Measured]], size: Size) -> None:
    """Markdown, one line a variant; ratios are to the mean speed of the cards alone."""
    print(
        "| variant | GPUs | tokens/s | to one GPU | ms a step | unhidden sync ms | "
        "clip + AdamW ms | peak GiB | rounds | first loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    alone = [1 / m.step_s for workers, m in rows.values() if workers == 1]
    for name, (workers, measured) in rows.items():
        ratio = f"{1 / measured.step_s / statistics.mean(alone):.3f}" if alone else ""
        sync = "" if workers == 1 else f"{1e3 * measured.sync_s:.1f}"
        peak = "" if measured.peak_gib is None else f"{measured.peak_gib:.1f}"
        print(
            f"| {name} | {workers} | {size.tokens / measured.step_s:,.0f} | {ratio} | "
            f"{1e3 * measured.step_s:.1f} | {sync} | {1e3 * measured.update_s:.1f} | {peak} | "
            f"{measured.rounds} x {ROUND} | {measured.loss:.5f} |"
        )


def main() -> None:
    """Measure what fits the time, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model for a dry run")
    parser.add_argument("--workers", type=int, help="by default one a GPU; two on a CPU")
    parser.add_argument("--seconds", type=float, default=9.0, help="of rounds, a variant")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, comma-separated")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        work(arguments)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here; try --device cpu --tiny.")
    workers = arguments.workers or (2 if arguments.device == "cpu" else torch.cuda.device_count())
    size = size_of(arguments.experiment, arguments.tiny)
    if size.total % (workers * size.micro):
        sys.exit(f"{size.total} sequences a step do not divide by {workers} x {size.micro}.")
    rows: dict[str, tuple[int, Measured]] = {}
    ends = time.monotonic() + BUDGET_S
    for name in arguments.variants.split(","):
        count = 1 if VARIANTS[name][0] == SINGLE else workers
        left = min(VARIANT_S, ends - time.monotonic())
        try:
            if left < LEAST_S:
                raise RuntimeError("the time is up")
            if count == 1:
                cards = workers if arguments.device == "cuda" else 1
                for card, measured in enumerate(run_alone(arguments, cards, left)):
                    rows[f"{name}, card {card}"] = (1, measured)
                    print(f"{name}, card {card}: {measured}", flush=True)
                continue
            rows[name] = (count, run_variant(arguments, name, count, left))
            print(f"{name}: {rows[name][1]}", flush=True)
        except RuntimeError as error:
            print(f"{name}: no figure, {error}", flush=True)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(f"{device} x {workers}, torch {torch.__version__}, {size.tokens:,} tokens a step")
    print_table(rows, size)


if __name__ == "__main__":
    sys.exit(run_script(main))
