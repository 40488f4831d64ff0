"""Where the time of one training step goes, by kind of work, for one experiment on this GPU.

    python benchmarks/step_profile.py experiments/tessera_1b.yaml --set kernels=fused \
        --set batch.micro_batch=8 [--steps 3] [--top 25]

Steps of random tokens as `tessera bench` takes them, first timed alone, then under torch's
profiler. Kernels are sorted into kinds by their names; what no kernel covers is the gap. The
profiled steps are slower than the plain ones; both are printed. Leaves with 2 without CUDA.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile

from tessera.cli.common import run_script
from tessera.experiment import Pretrain, load_experiment
from tessera.training.bench.runner import StepRunner
from tessera.training.bench.tokens import random_batches

KINDS = (
    ("attention", r"flash|fmha|sdpa|attn|cudnn_generated|cutlass_wrapper|FlashAttention"),
    ("casts to float8", r"_cast_kernel|_amax_kernel"),
    ("loss", r"_cross_entropy|log_softmax|nll_loss"),
    ("optimiser, clip", r"multi_tensor|[Aa]dam|lpnorm|_adamw"),
    ("matrix products", r"nvjet|gemm|xmma|cutlass|splitK|cublas"),
    ("norm", r"_add_rms|^_backward_kernel$|_add_rows|rms"),
    ("GELU", r"gelu"),
    ("embedding", r"_embed|_scatter|embedding|[Rr]adix|[Ss]ort"),
    ("copies, fills", r"[Mm]emcpy|[Mm]emset|copy|[Ff]ill|Cat"),
)
"""Kind and a pattern of its kernels' names; the first that matches counts."""


@dataclass(frozen=True)
class Kernel:
    """All launches of one name in one step."""

    name: str
    milliseconds: float
    launches: float

    @property
    def kind(self) -> str:
        """Of ``KINDS``, or other."""
        for kind, pattern in KINDS:
            if re.search(pattern, self.name):
                return kind
        return "other"


def launches_of(recorded: profile) -> list[tuple[int, int, str]]:
    """Begin and end in ns, and name, of all that ran on the device, in order."""
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    return sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in recorded.profiler.kineto_results.events()
        if str(event.device_type()).endswith("CUDA") and "#" not in event.name()
    )


def kernels_of(launches: Sequence[tuple[int, int, str]], steps: int) -> list[Kernel]:
    """Kernels, copies and fills of the device, longest first, as averages of a step."""
    spent: dict[str, list[int]] = defaultdict(list)
    for began, ended, name in launches:
        spent[name].append(ended - began)
    found = [Kernel(n, sum(t) / 1e6 / steps, len(t) / steps) for n, t in spent.items()]
    return sorted(found, key=lambda kernel: -kernel.milliseconds)


def gaps_of(launches: Sequence[tuple[int, int, str]], steps: int) -> list[Kernel]:
    """Pauses of the device, by what ran before and after; longest first, averages of a step."""
    spent: dict[str, list[int]] = defaultdict(list)
    busy_until = launches[0][0]
    for (_, _, before), (began, ended, after) in pairwise(launches):
        if began > busy_until:
            spent[f"{before[:50]} -> {after[:50]}"].append(began - busy_until)
        busy_until = max(busy_until, ended)
    found = [Kernel(n, sum(t) / 1e6 / steps, len(t) / steps) for n, t in spent.items()]
    return sorted(found, key=lambda gap: -gap.milliseconds)


def table(kernels: Iterable[Kernel], step_ms: float, profiled_ms: float) -> None:
    """Print milliseconds by kind."""
    kinds: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        kinds[kernel.kind] += kernel.milliseconds
    print(f"a step {step_ms:.1f} ms, under the profiler {profiled_ms:.1f} ms")
    print("| kind | ms a step |\n|---|---|")
    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {spent:.1f} |")
    print(f"| no kernel running | {profiled_ms - sum(kinds.values()):.1f} |")


def main() -> None:
    """Time, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=25, help="kernels to list")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This profiles kernels on a CUDA device and there is none here.", file=sys.stderr)
        sys.exit(2)
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    assert isinstance(experiment, Pretrain)
    device = torch.device("cuda")
    batches = random_batches(experiment, device)
    runner = StepRunner(experiment, device)
    step_ms = 1e3 * statistics.median(runner.time(batches, 10, 3, lambda: None).seconds)
    torch.cuda.synchronize()
    began_host = time.perf_counter()
    runner.step(batches)
    host_ms = 1e3 * (time.perf_counter() - began_host)
    torch.cuda.synchronize()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        began.record()
        for _ in range(arguments.steps):
            runner.step(batches)
        ended.record()
        torch.cuda.synchronize()
    launches = launches_of(recorded)
    kernels = kernels_of(launches, arguments.steps)
    print(f"the host takes {host_ms:.0f} ms to launch a step (less if the queue was never full)")
    table(kernels, step_ms, began.elapsed_time(ended) / arguments.steps)
    print("\n| kernel | kind | launches | ms a step |\n|---|---|---|---|")
    for kernel in kernels[: arguments.top]:
        print(
            f"| {kernel.name[:90]} | {kernel.kind} | {kernel.launches:.0f} "
            f"| {kernel.milliseconds:.2f} |"
        )
    gaps = gaps_of(launches, arguments.steps)
    print("\n| pause between | times | ms a step |\n|---|---|---|")
    for gap in gaps[: arguments.top]:
        print(f"| {gap.name} | {gap.launches:.0f} | {gap.milliseconds:.2f} |")


if __name__ == "__main__":
    sys.exit(run_script(main))
