"""Cross-entropy and its gradient, row by row, in place.

A row of 65,536 bf16 logits is 128 KiB. The first loop reads it from memory and keeps a running
maximum and sum for each lane, so that warps meet only once a row; the second reads it again from
the L2 cache and overwrites it. Rows in flight must fit that cache: with 16 warps one or two
programs share a multiprocessor, 17 to 34 MB on 132 of them, of 50 MB.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tessera.model.loss import IGNORE

LOWEST = tl.constexpr(-3.0e38)
"""Finite, so that a lane without a logit yields exp(-inf) and not inf - inf."""


@triton.jit
def _cross_entropy(
    logits,
    targets,
    losses,
    scale,
    V,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    row_logits = logits + row.to(tl.int64) * V
    places = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            nothing = tl.zeros((DEPTH, LANES), logits.dtype.element_ty)
            for first in range(0, V, DEPTH * LANES):
                columns = first + places
                tl.store(row_logits + columns, nothing, mask=columns < V)
    else:
        known = (target >= 0) & (target < V)
        wanted = tl.load(row_logits + target, mask=known, other=float("nan")).to(tl.float32)
        top = tl.full((LANES,), LOWEST, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for first in range(0, V, DEPTH * LANES):
            columns = first + places
            x = tl.load(
                row_logits + columns,
                mask=columns < V,
                other=float("-inf"),
                eviction_policy="evict_last",
            ).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[None, :]), 0)
            top = higher
        highest = tl.max(top, 0)
        norm = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
        tl.store(losses + row, norm - wanted)
        if GRADIENT:
            # Every warp has read the whole row: the reductions above are barriers.
            factor = tl.load(scale)
            place = target.to(tl.int32)
            for first in range(0, V, DEPTH * LANES):
                columns = first + places
                inside = columns < V
                x = tl.load(
                    row_logits + columns, mask=inside, other=0.0, eviction_policy="evict_first"
                ).to(tl.float32)
                softmax = tl.exp(x - norm)
                slope = tl.where(columns == place, softmax - 1.0, softmax) * factor
                tl.store(
                    row_logits + columns,
                    slope.to(logits.dtype.element_ty),
                    mask=inside,
                    eviction_policy="evict_first",
                )


def launch_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    scale: Tensor | None,
    *,
    depth: int = 4,
    lanes: int = 4096,
    num_warps: int = 16,
) -> None:
    """Write losses (M,) float32; with ``scale`` overwrite logits (M, V) by their gradient.

    targets (M,) int64, ``scale`` a float32 scalar on the device. ``depth`` x ``lanes`` columns are
    read at a time, both powers of two; with 8 x 32 x ``num_warps`` lanes a thread's loads are 16
    bytes of bf16 and its ``depth`` values of a lane are reduced without talking to other threads.
    """
    _cross_entropy[(logits.size(0),)](
        logits,
        targets,
        losses,
        losses if scale is None else scale,
        logits.size(1),
        IGNORED=IGNORE,
        GRADIENT=scale is not None,
        DEPTH=depth,
        LANES=lanes,
        num_warps=num_warps,
    )
