"""TFLOP/s of every attention backend of this GPU, forward and backward, in the 1B model's shape.

    python benchmarks/attention_speed.py [--batch 4 8] [--backends flash4 cudnn]

First each backend's result on a small shape is compared with float64; then the backends take turns,
ten calls at a time, so that a change of clock meets all of them, and the median of the rounds
counts. Backward includes what it costs to have one contiguous gradient of qkv. The whole takes
under 20 s, the first time some more for compiling flash4. Leaves with 2 where there is no CUDA.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tessera.model.fused.attention import (
    NAMES,
    AttentionBackend,
    available_backends,
    choose_backend,
)

LAYERS, STEP_TOKENS = 32, 65_536
SMALL = (2, 1000, 4)
"""Batch, tokens and heads of the comparison with float64; not a multiple of any block."""
CALLS, ROUNDS = 10, 7
FORMULA = "forward 4 B H T^2 D / 2 (causal: half of the square), backward 2.5 times that"


@dataclass(frozen=True)
class Shape:
    """qkv is (batch, tokens, 3, heads, dim)."""

    batch: int
    tokens: int
    heads: int
    dim: int

    @property
    def forward_flop(self) -> float:
        """By ``FORMULA``."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.dim / 2


def random_inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """Qkv and the gradient of out, bfloat16 on the GPU."""
    source = torch.Generator("cuda").manual_seed(1)
    sizes = (shape.batch, shape.tokens, 3, shape.heads, shape.dim)
    qkv = torch.randn(sizes, generator=source, device="cuda").bfloat16()
    dout = torch.randn(qkv[:, :, 0].shape, generator=source, device="cuda").bfloat16()
    return qkv, dout


def errors(backend: AttentionBackend, dim: int) -> list[float]:
    """Root mean square error relative to float64 of out, dq, dk and dv."""
    qkv, dout = random_inputs(Shape(*SMALL, dim))
    leaf = qkv.double().requires_grad_()
    q, k, v = (plane.transpose(1, 2) for plane in leaf.unbind(2))
    scores = q @ k.transpose(-1, -2) / math.sqrt(dim)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(1)
    expected = (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    (gradient,) = torch.autograd.grad(expected, leaf, dout.double())
    out, saved = backend.forward(qkv)
    found = backend.backward(dout, qkv, out, saved)
    pairs = [(out, expected.detach()), *zip(found.unbind(2), gradient.unbind(2), strict=True)]
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call, from ``CALLS`` in a row."""
    event: Any = torch.cuda.Event  # an untyped class
    began, ended = event(enable_timing=True), event(enable_timing=True)
    began.record()
    for _ in range(CALLS):
        call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / CALLS


def speeds(backends: Sequence[AttentionBackend], shape: Shape) -> dict[str, tuple[float, float]]:
    """Milliseconds of a forward and of a backward pass, by backend."""
    qkv, dout = random_inputs(shape)
    kept = {b.name: b.forward(qkv) for b in backends}
    times: dict[str, tuple[list[float], list[float]]] = {b.name: ([], []) for b in backends}
    for _ in range(ROUNDS + 1):
        for b in backends:
            out, saved = kept[b.name]
            forward, backward = times[b.name]
            forward.append(milliseconds(partial(b.forward, qkv)))
            backward.append(milliseconds(partial(b.backward, dout, qkv, out, saved)))
    # The first round is the warm-up.
    return {n: (statistics.median(f[1:]), statistics.median(g[1:])) for n, (f, g) in times.items()}


def working(names: Sequence[str], dim: int) -> list[AttentionBackend]:
    """The backends that can be used and do compute; says of each how exact it is, or what is wrong.

    One that breaks costs the others nothing: time on a GPU is rented.
    """
    device = torch.device("cuda")
    reasons = available_backends(device, torch.bfloat16, dim)
    found = []
    for name in names:
        if reasons[name] is not None:
            print(f"{name}: {reasons[name]}")
            continue
        began = time.perf_counter()
        try:
            backend = choose_backend(name, device, torch.bfloat16, dim)
            out, dq, dk, dv = errors(backend, dim)
        except Exception:
            print(f"{name}: failed\n{traceback.format_exc()}")
            continue
        print(
            f"{name}: error against float64 out {out:.4f}, dq {dq:.4f}, dk {dk:.4f}, dv {dv:.4f}; "
            f"first calls took {time.perf_counter() - began:.1f} s"
        )
        found.append(backend)
    return found


def print_speeds(backends: Sequence[AttentionBackend], shape: Shape) -> None:
    """One table."""
    found = speeds(backends, shape)
    whole = {name: sum(pair) for name, pair in found.items()}
    print(
        f"\nB {shape.batch}, H {shape.heads}, T {shape.tokens}, D {shape.dim}, causal, bfloat16:\n"
    )
    print(
        "| backend | forward ms | TFLOP/s | backward ms | TFLOP/s | speed, cuDNN = 1 | ms a step |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (forward, backward) in found.items():
        flop = shape.forward_flop / 1e9
        ratio = f"{whole['cudnn'] / whole[name]:.3f}" if "cudnn" in whole else "-"
        step = whole[name] * LAYERS * STEP_TOKENS / (shape.batch * shape.tokens)
        print(
            f"| {name} | {forward:.3f} | {flop / forward:.0f} "
            f"| {backward:.3f} | {2.5 * flop / backward:.0f} | {ratio} | {step:.1f} |"
        )


def main() -> int:
    """Print everything; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=96)
    parser.add_argument("--backends", nargs="+", choices=NAMES, default=list(NAMES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "attention speed is measured on a CUDA device and this machine has none",
            file=sys.stderr,
        )
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"FLOP: {FORMULA}; a step: {STEP_TOKENS} tokens through {LAYERS} layers\n")
    backends = working(arguments.backends, arguments.head_dim)
    for batch in arguments.batch:
        print_speeds(backends, Shape(batch, arguments.tokens, arguments.heads, arguments.head_dim))
    return 0


if __name__ == "__main__":
    sys.exit(main())
