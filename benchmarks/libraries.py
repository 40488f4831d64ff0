"""The 1B model's step with parts from libraries beside ours, in one run on one GPU.

    python benchmarks/libraries.py experiments/tessera_1b.yaml --set batch.micro_batch=8
    python benchmarks/libraries.py experiments/tessera_1b.yaml --only norm

* step: whole optimiser steps. Ours (``fused``, ``fp8``) against torch's plain path, each block
  compiled, and that path with its blocks' linears replaced by torchao's Float8Linear, by recipe.
  Where a recipe runs out of memory at the experiment's micro-batch it gets half of it.
* norm: x + delta, RMSNorm and both gradients, at the model's width and ``--tokens`` rows: ours,
  liger-kernel's and quack-kernels', each by its own low-level functions, as CUDA graphs.

The head's libraries are rows of head_speed.py. Speeds are medians; the ratio is to the first row.
What is not installed, or fails, is named and left out. Leaves with 2 without CUDA.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tessera.cli.common import run_script
from tessera.experiment import Pretrain, load_experiment
from tessera.model.fused import norm
from tessera.model.protogpt import ProtoGPT
from tessera.training.bench.ladder import WARM_UP, reason_of, release
from tessera.training.bench.runner import StepRunner
from tessera.training.bench.tokens import random_batches

EPS = 1e-6
OUT_OF_MEMORY = reason_of(torch.OutOfMemoryError())
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
Convert = Callable[[ProtoGPT], object]


def torchao(recipe: str) -> Convert:
    """The blocks' linears as torchao's, by one of its recipes."""

    def convert(model: ProtoGPT) -> None:
        float8 = importlib.import_module("torchao.float8")
        config = float8.Float8LinearConfig.from_recipe_name(recipe)
        for block in model.blocks:
            float8.convert_to_float8_training(block, config=config)

    return convert


def whole(
    path: str, overrides: Sequence[str], steps: int, convert: Convert | None
) -> tuple[float, str] | str:
    """Tokens a second at the median step, and the most memory; or why there is no such thing."""
    device = torch.device("cuda")
    experiment = load_experiment(path, overrides)
    assert isinstance(experiment, Pretrain)
    runner: StepRunner | None = None
    try:
        runner = StepRunner(experiment, device, convert)
        timing = runner.time(random_batches(experiment, device), steps, WARM_UP, lambda: None)
    except Exception as error:  # a library that fails must not cost the others
        return reason_of(error)
    finally:
        runner = None
        release(device)
    peak = (timing.peak_bytes or 0) / 2**30
    return experiment.batch.tokens_per_step / statistics.median(timing.seconds), f"{peak:.1f} GiB"


def step_rows(arguments: argparse.Namespace) -> Iterator[tuple[str, float, str]]:
    """Name, tokens a second, memory."""
    first = load_experiment(arguments.experiment, arguments.overrides)
    assert isinstance(first, Pretrain)
    assert first.batch.micro_batch != "auto", "main has refused it"
    plain, fp8 = ["kernels=torch", "compile=on"], ["kernels=fused", "precision=fp8"]
    rows: list[tuple[str, list[str], Convert | None]] = [
        ("tessera fused, bf16", ["kernels=fused"], None),
        ("tessera fp8", fp8, None),
        ("torch, each block compiled", plain, None),
        *((f"the same with torchao {recipe}", plain, torchao(recipe)) for recipe in RECIPES),
    ]
    for name, settings, convert in rows:
        for size in (first.batch.micro_batch, first.batch.micro_batch // 2):
            overrides = [*arguments.overrides, *settings, f"batch.micro_batch={size}"]
            found = whole(arguments.experiment, overrides, arguments.steps, convert)
            if isinstance(found, tuple):
                yield f"{name}, micro-batch {size}", *found
                break
            print(f"{name}, micro-batch {size}: {found}", file=sys.stderr, flush=True)
            if found != OUT_OF_MEMORY:
                break


def norm_rows(arguments: argparse.Namespace) -> Iterator[tuple[str, float, str]]:
    """Name, calls a second of both passes, milliseconds of each."""
    from triton.testing import do_bench_cudagraph

    experiment = load_experiment(arguments.experiment, arguments.overrides)
    assert isinstance(experiment, Pretrain)
    M, D = arguments.tokens, experiment.model.d_model

    def draw() -> Tensor:
        return torch.randn(M, D, device="cuda").to(torch.bfloat16)

    x, delta, dh, dres = draw(), draw(), draw(), draw()
    weight = torch.randn(D, device="cuda")
    for name, make in NORMS.items():
        try:
            passes = make(x, delta, weight, dh, dres)
            times = [do_bench_cudagraph(p, rep=100, return_mode="median") for p in passes]
        except Exception as error:
            print(f"{name}: {reason_of(error)}", file=sys.stderr)
            continue
        yield name, 1e3 / sum(times), f"{times[0]:.3f} ms forward, {times[1]:.3f} ms backward"


Passes = tuple[Callable[[], object], Callable[[], object]]


def _ours(x: Tensor, delta: Tensor, weight: Tensor, dh: Tensor, dres: Tensor) -> Passes:
    total, rstd, _ = norm.add_rms_norm(x, delta, weight, EPS)
    dweight = torch.zeros_like(weight)
    return (
        lambda: norm.add_rms_norm(x, delta, weight, EPS),
        lambda: norm.rms_norm_backward(dh, total, rstd, weight, dres, dweight),
    )


def _liger(x: Tensor, delta: Tensor, weight: Tensor, dh: Tensor, dres: Tensor) -> Passes:
    module: Any = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")

    def forward() -> tuple[Any, ...]:
        made: tuple[Any, ...] = module.fused_add_rms_norm_forward(
            x, delta, weight, EPS, 0.0, "llama"
        )
        return made

    _, total, rstd, block, warps, stages, casting = forward()
    return forward, lambda: module.fused_add_rms_norm_backward(
        dh, dres, total, weight, rstd, 0.0, casting, block, warps, stages, False
    )


def _quack(x: Tensor, delta: Tensor, weight: Tensor, dh: Tensor, dres: Tensor) -> Passes:
    module: Any = importlib.import_module("quack.rmsnorm")

    def forward() -> tuple[Any, ...]:
        made: tuple[Any, ...] = module.rmsnorm_fwd(
            x, weight, residual=delta, eps=EPS, store_rstd=True
        )
        return made

    _, total, rstd = forward()
    return forward, lambda: module.rmsnorm_bwd(
        total, weight, dh, rstd, dresidual_out=dres, has_residual=True
    )


NORMS = {"tessera norm": _ours, "liger-kernel norm": _liger, "quack-kernels norm": _quack}


def installed(*names: str) -> str:
    """Versions, or that a package is missing."""
    told = []
    for name in names:
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            told.append(f"{name} missing")
    return ", ".join(told)


def main() -> None:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--only", choices=["norm", "step"], help="one part")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32_768, help="rows of the norm")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This measures steps on a GPU, and there is no CUDA device here.", file=sys.stderr)
        sys.exit(2)
    chosen = load_experiment(arguments.experiment, arguments.overrides)
    if not isinstance(chosen, Pretrain) or chosen.batch.micro_batch == "auto":
        sys.exit("This wants a pretraining with a size: --set batch.micro_batch=N.")
    names = ("torchao", "liger-kernel", "quack-kernels", "flash-attn-4", "triton")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {installed(*names)}")
    parts = {"norm": (norm_rows, "calls/s"), "step": (step_rows, "tokens/s")}
    for part, (rows, unit) in parts.items():
        if arguments.only not in (None, part):
            continue
        print(f"| {part} | {unit} | ratio | |\n|---|---|---|---|")
        first: float | None = None
        for name, speed, note in rows(arguments):
            first = first or speed
            print(f"| {name} | {speed:,.0f} | {speed / first:.2f} | {note} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
