"""How far the gradients of a precision are from exact ones, matrix by matrix, at trained weights.

    python -m benchmarks.gradient_error experiments/quality_136m.yaml --root ROOT --steps 300 \
        --variants bf16 bf16-fused fp8 fp8+exact

Takes ``--steps`` optimiser steps of the experiment on its corpus with the fused operations in bf16,
then two micro-batches' gradients at the weights reached: exact ones (float32 under autograd, no
TF32), and each variant's (names as in precision_quality.py). ``distance`` is the length of the
difference over the length of the exact gradient; ``common`` the part of the difference that is the
same for both micro-batches, which no larger batch averages out: sqrt(<e1, e2>) over the length. The
noise of a batch is printed for scale: how far the two exact gradients are from each other.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.precision_quality import settings_of
from tessera.cli.common import run_script
from tessera.experiment import Pretrain, load_experiment
from tessera.model.fused.engine import Engine
from tessera.model.loss import summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.storage import open_root
from tessera.training.bench.runner import StepRunner
from tessera.training.bench.tokens import corpus_batches
from tessera.training.fused import attention_backend, recipe_of
from tessera.training.parallel import World
from tessera.training.prepare import compute_dtype
from tessera.training.replica import Replica

KINDS = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
Pair = tuple[Tensor, Tensor]
Gradients = dict[str, Tensor]


def taken(model: ProtoGPT, micro: Pair, step: object) -> Gradients:
    """The gradients that one call of ``step`` gives, as copies."""
    for parameter in model.parameters():
        parameter.grad = None
    inputs, targets = micro
    step(inputs, targets, targets.numel(), True)  # type: ignore[operator]
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def of_variant(
    name: str, arguments: argparse.Namespace, model: ProtoGPT, batches: Sequence[Pair], world: World
) -> list[Gradients]:
    """The gradients of each batch in the precision called ``name``."""
    settings = [*arguments.overrides, *settings_of(name)]
    experiment = load_experiment(arguments.experiment, settings)
    assert isinstance(experiment, Pretrain)
    dtype = compute_dtype(experiment.precision, world.device)
    if name == "bf16":
        plain = Replica.build(model, "auto", world, dtype, summed_cross_entropy)
        return [taken(model, micro, plain.micro_step) for micro in batches]
    backend = attention_backend(experiment, world.device, dtype)
    recipe = recipe_of(experiment)
    engine = Engine(model, dtype, backend, float8=recipe)
    if recipe:  # its first step looks how large values are, in bf16
        for micro in batches:
            taken(model, micro, engine.micro_step)
    return [taken(model, micro, engine.micro_step) for micro in batches]


def rows(exact: list[Gradients], found: list[Gradients]) -> Iterator[tuple[str, float, float]]:
    """Name, distance and common part: of all blocks, by kind of matrix, by block, of the rest."""
    blocks = sorted(
        {name.split(".")[1] for name in exact[0] if name.startswith("blocks.")}, key=int
    )
    groups = {"all blocks": [n for n in exact[0] if any(kind in n for kind in KINDS)]}
    groups |= {kind: [n for n in exact[0] if kind in n] for kind in KINDS}
    groups |= {
        f"block {b}": [n for n in groups["all blocks"] if n.startswith(f"blocks.{b}.")]
        for b in blocks
    }
    groups["norms"] = [n for n in exact[0] if "norm" in n]
    groups["tokens"] = [n for n in exact[0] if "tokens" in n]
    for label, names in groups.items():
        length = distance = common = 0.0
        for name in names:
            off = [f[name].double() - e[name].double() for e, f in zip(exact, found, strict=True)]
            length += float(exact[0][name].double().square().sum())
            distance += float(off[0].square().sum())
            common += float((off[0] * off[1]).sum())
        yield label, math.sqrt(distance / length), math.sqrt(max(0.0, common) / length)


def main() -> None:
    """Train a little, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", nargs="+", default=["bf16", "bf16-fused", "fp8"])
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = ["precision=bf16" if device.type == "cuda" else "precision=float32", "kernels=fused"]
    experiment = load_experiment(arguments.experiment, [*arguments.overrides, *settings])
    assert isinstance(experiment, Pretrain)
    world = World(0, 1, 0, 1, device)
    count = arguments.steps + 1
    batches = corpus_batches(experiment, open_root(arguments.root), device, count=count)
    runner = StepRunner(experiment, device)
    for _ in range(arguments.steps):
        runner.step(batches)
    model = runner.replica.model
    last = batches.micro_batches(arguments.steps, runner.micro_batch)[:2]
    micro = [(inputs.to(device), targets.to(device)) for inputs, targets in last]
    if len(micro) < 2:
        sys.exit("A step has one micro-batch; make batch.micro_batch smaller, two are compared.")
    wide = Replica.build(model, "auto", world, torch.float32, summed_cross_entropy)
    exact = [taken(model, pair, wide.micro_step) for pair in micro]
    _, noise, _ = next(rows(exact[:1] * 2, exact[1:] * 2))
    print(f"after {arguments.steps} steps; noise of a batch {noise:.3f}")
    for name in arguments.variants:
        found = of_variant(name, arguments, model, micro, world)
        told = [f"{label} {d:.3f} ({c:.3f})" for label, d, c in rows(exact, found)]
        print(f"{name}: distance (common): {', '.join(told)}", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
