"""Speed of the fused passes over memory, against a copy and against torch.compile, on one GPU.

    python benchmarks/fused_ops.py
    python benchmarks/fused_ops.py --quick --only cast
    python benchmarks/fused_ops.py --sweep --only backward

Each operation runs as the training step calls it, at the shapes of the 1B model (1536 features,
6144 hidden) and ``--tokens`` rows, over inputs that take turns and together exceed any L2 cache,
inside a CUDA graph, so that launches cost nothing: the median of ten replays. Bytes are those that
must move: every input read once, every output written once. The alternative is the operation's own
torch form under torch.compile. ``--sweep`` times what programs may take instead, the best last.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tessera.model.fused import backend, fp8, gelu, norm

D, HIDDEN = 1536, 6144
EPS = 1e-5
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROTATE_BYTES = 256_000_000


@dataclass(frozen=True)
class Op:
    """``run`` takes one set of inputs, drawn by ``make``; ``sweep`` names other launches of it."""

    name: str
    moved: int
    make: Callable[[], tuple[Tensor, ...]]
    run: Callable[..., object]
    sweep: dict[str, Callable[..., object]]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values on the GPU."""
    return torch.randn(*shape, device="cuda").to(dtype)


def scalars() -> tuple[Tensor, Tensor]:
    """A scale and an amax."""
    return torch.full((1,), 16.0, device="cuda"), torch.zeros(1, device="cuda")


def norms(M: int) -> Iterator[Op]:
    """Passes over (M, 1536)."""
    from tessera.model.fused.kernels import norm as kernels

    weight, rstd = random(D, dtype=torch.float32), random(M, dtype=torch.float32).abs()
    dweight = torch.zeros(D, device="cuda")

    def backward(dh: Tensor, total: Tensor, dres: Tensor) -> Tensor:
        return norm.rms_norm_backward(dh, total, rstd, weight, dres, dweight)

    yield Op(
        "add_rms_norm",
        8 * M * D,
        lambda: (random(M, D), random(M, D)),
        lambda x, delta: norm.add_rms_norm(x, delta, weight, EPS),
        {
            f"rows {rows}, {warps} warps": lambda x, delta, rows=rows, warps=warps: kernels.add_rms(
                x, delta, weight, EPS, rows=rows, num_warps=warps
            )
            for rows, warps in ((1, 2), (1, 4), (2, 4), (4, 4), (4, 8), (8, 16))
        },
    )
    yield Op(
        "add_rms alone",
        6 * M * D,
        lambda: (random(M, D), random(M, D)),
        lambda x, delta: norm.add_rms(x, delta, EPS),
        {},
    )
    yield Op(
        "rms_norm_backward",
        8 * M * D,
        lambda: (random(M, D), random(M, D), random(M, D)),
        backward,
        {
            f"{programs} programs, {warps} warps, {stages} stages": (
                lambda dh, total, dres, programs=programs, warps=warps, stages=stages: (
                    kernels.rms_norm_backward(
                        dh,
                        total,
                        rstd,
                        weight,
                        dres,
                        dweight,
                        programs=programs,
                        num_warps=warps,
                        stages=stages,
                    )
                )
            )
            for programs, warps, stages in itertools.product((264, 528, 660), (4, 8), (1, 2, 3))
        },
    )


def gelus(M: int) -> Iterator[Op]:
    """Passes over (M, 6144) in bf16."""
    from tessera.model.fused.kernels import gelu as kernels

    launches = list(itertools.product((1024, 2048, 4096, 8192), (4, 8)))
    yield Op(
        "gelu",
        4 * M * HIDDEN,
        lambda: (random(M, HIDDEN),),
        lambda u: gelu.gelu(u, "tanh"),
        {
            f"block {block}, {warps} warps": lambda u, block=block, warps=warps: kernels.gelu(
                u, True, block=block, num_warps=warps
            )
            for block, warps in launches
        },
    )
    yield Op(
        "gelu_backward, in place",
        6 * M * HIDDEN,
        lambda: (random(M, HIDDEN), random(M, HIDDEN)),
        lambda da, u: gelu.gelu_backward(da, u, "tanh", da),
        {
            f"block {block}, {warps} warps": lambda da, u, block=block, warps=warps: (
                kernels.gelu_backward(da, u, True, da, block=block, num_warps=warps)
            )
            for block, warps in launches
        },
    )


def casts(M: int) -> Iterator[Op]:
    """Casts to 8 bits; rows and columns are written, a byte each."""
    from tessera.model.fused.kernels import fp8 as kernels

    weight, rstd = random(D, dtype=torch.float32), random(M, dtype=torch.float32).abs()
    scale, amax = scalars()
    tiles = [
        kernels.Tile(m, n, warps, group)
        for (m, n, warps), group in itertools.product(
            ((128, 64, 4), (64, 128, 4), (128, 128, 8), (64, 64, 2), (256, 64, 8)), (1, 16)
        )
    ]

    def over(kind: int, **given: Any) -> dict[str, Callable[..., object]]:
        def launch(tile: kernels.Tile) -> Callable[..., object]:
            def run(x: Tensor, u: Tensor | None = None) -> object:
                return kernels.cast(kind, x, scale, amax, E4M3, u=u, tile=tile, **given)

            return run

        return {" ".join(map(str, tile)): launch(tile) for tile in tiles}

    def draw(width: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (random(M, width),)

    for width in (D, 3 * D, HIDDEN):
        yield Op(
            f"cast, {width} features",
            4 * M * width,
            draw(width),
            lambda x: fp8.cast(x, scale, amax, E5M2),
            over(kernels.PLAIN) if width == HIDDEN else {},
        )
    yield Op(
        "cast, a float32 weight",
        6 * HIDDEN * D,
        lambda: (random(HIDDEN, D, dtype=torch.float32),),
        lambda x: fp8.cast(x, scale, amax, E4M3),
        over(kernels.PLAIN),
    )
    yield Op(
        "cast_normed",
        4 * M * D,
        lambda: (random(M, D),),
        lambda x: fp8.cast_normed(x, rstd, weight, scale, amax, E4M3),
        over(kernels.NORMED, rstd=rstd, weight=weight),
    )
    yield Op(
        "cast_gelu",
        4 * M * HIDDEN,
        lambda: (random(M, HIDDEN),),
        lambda u: fp8.cast_gelu(u, "tanh", scale, amax, E4M3),
        over(kernels.GELU, tanh=True),
    )
    yield Op(
        "cast_gelu_backward",
        6 * M * HIDDEN,
        lambda: (random(M, HIDDEN), random(M, HIDDEN)),
        lambda da, u: fp8.cast_gelu_backward(da, u, "tanh", scale, amax, E5M2),
        over(kernels.GELU_BACKWARD, tanh=True),
    )
    yield Op("amax_of", 2 * M * HIDDEN, lambda: (random(M, HIDDEN),), lambda x: fp8.amax_of(x), {})


def median_ms(run: Callable[[], object]) -> float:
    """Median time of ten replays of a graph of calls, in milliseconds a call."""
    from triton.testing import do_bench_cudagraph  # not on every machine without a GPU

    return float(do_bench_cudagraph(run, rep=REP_MS, return_mode="median"))


def milliseconds(run: Callable[..., object], sets: list[tuple[Tensor, ...]]) -> float:
    """Time of one call, the input sets taking turns."""

    def turn() -> None:
        for inputs in sets:
            run(*inputs)

    turn()  # compiles
    return median_ms(turn) / len(sets)


def never(tensor: Tensor) -> bool:
    """Stands in for `backend.use_triton`: the torch form, on a GPU too."""
    return False


def compiled_milliseconds(op: Op, sets: list[tuple[Tensor, ...]]) -> float:
    """The same for the torch form under torch.compile."""
    torch.compiler.reset()
    with mock.patch.object(backend, "use_triton", never):
        return milliseconds(torch.compile(op.run, dynamic=False), sets)


def copy_gb_per_s() -> float:
    """Bytes read and written by a device-to-device copy, per second."""
    source, target = random(ROTATE_BYTES), random(ROTATE_BYTES)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6


REP_MS = 100
"""How long a graph takes that is replayed ten times; ``--quick`` sets 10."""


def main() -> None:
    """Measure and print the table, or the sweep."""
    global REP_MS
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=32_768, help="rows")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--sweep", action="store_true", help="other launches of each operation")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This measures kernels on a CUDA device and there is none here.", file=sys.stderr)
        sys.exit(2)
    if arguments.quick:
        REP_MS = 10
    copy = copy_gb_per_s()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {version('triton')}, "
        f"{arguments.tokens} tokens; a copy moves {copy:,.0f} GB/s"
    )
    M = arguments.tokens
    for op in itertools.chain(norms(M), gelus(M), casts(M)):
        if arguments.only in op.name and (op.sweep or not arguments.sweep):
            report(op, copy, arguments.sweep)


def report(op: Op, copy: float, sweep: bool) -> None:
    """One line for the operation; with ``sweep`` one for each launch."""
    first = op.make()
    size = sum(tensor.nbytes for tensor in first)
    sets = [first, *(op.make() for _ in range(ROTATE_BYTES // size))]

    def line(name: str, took: float, note: str) -> None:
        rate = op.moved / took / 1e6
        print(
            f"| {name} | {op.moved / 1e6:,.0f} MB | {took * 1e3:,.1f} us | {rate:,.0f} GB/s "
            f"| {rate / copy:.0%} of a copy |{note}",
            flush=True,
        )

    if not sweep:
        ours, theirs = milliseconds(op.run, sets), compiled_milliseconds(op, sets)
        line(op.name, ours, f" torch.compile {theirs * 1e3:,.1f} us, {theirs / ours:.2f} x |")
        return
    took = {name: milliseconds(run, sets) for name, run in op.sweep.items()}
    for name in sorted(took, key=lambda name: -took[name]):
        line(f"{op.name}: {name}", took[name], "")


if __name__ == "__main__":
    main()
