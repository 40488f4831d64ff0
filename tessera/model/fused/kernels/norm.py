"""RMSNorm forward and backward, each in one pass over its inputs.

Rows are whole: a power of two of columns at least C, those past the end masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_kernel(
    x,
    delta,
    weight,
    total,
    rstd,
    h,
    M,
    C,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    inside = (row < M)[:, None] & (column < C)[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        v += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        v = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, axis=1) / C + eps)
    tl.store(rstd + row, r, mask=row < M)
    if weight is not None:
        w = tl.load(weight + column, mask=column < C, other=0.0)
        tl.store(h + at, (v * r[:, None] * w[None, :]).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dh,
    total,
    rstd,
    weight,
    dres,
    dx,
    partial,
    M,
    C,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # A program takes rows pid, pid + programs, ...: neighbours read neighbouring rows, and the sum
    # over them for the weight stays in registers until the end.
    column = tl.arange(0, BLOCK)
    inside = column < C
    w = tl.load(weight + column, mask=inside, other=0.0)
    dw = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), M, tl.num_programs(0), num_stages=STAGES):
        at = row * C + column
        slope = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        past = tl.zeros([BLOCK], tl.float32)
        if dres is not None:
            past = tl.load(dres + at, mask=inside, other=0.0).to(tl.float32)
        normed *= r
        dw += slope * normed
        slope *= w
        mean = tl.sum(slope * normed, axis=0) / C
        grad = (slope - normed * mean) * r + past
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * C + column, dw, mask=inside)


@triton.jit
def _add_rows_kernel(partial, out, rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        total += tl.load(partial + row[:, None] * C + column[None, :], mask=inside, other=0.0)
    added = tl.load(out + column, mask=column < C, other=0.0) + tl.sum(total, axis=0)
    tl.store(out + column, added, mask=column < C)


def add_rms(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    eps: float,
    *,
    rows: int | None = None,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Total, rstd and, with ``weight``, h of `tessera.model.fused.norm.add_rms_norm`.

    ``rows`` a program; the default keeps 32 elements or fewer a thread.
    """
    M, C = x.shape
    block = triton.next_power_of_2(C)
    rows = rows or max(1, min(4, 8192 // block))
    num_warps = num_warps or max(1, min(16, rows * block // 1024))
    total = x if delta is None else torch.empty_like(x)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    h = None if weight is None else torch.empty_like(x)
    _add_rms_kernel[(triton.cdiv(M, rows),)](
        x, delta, weight, total, rstd, h, M, C, eps, ROWS=rows, BLOCK=block, num_warps=num_warps
    )
    return total, rstd, h


def rms_norm_backward(
    dh: Tensor,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dres: Tensor | None,
    dweight: Tensor,
    *,
    programs: int = 528,
    num_warps: int | None = None,
    stages: int = 3,
) -> Tensor:
    """See `tessera.model.fused.norm.rms_norm_backward`.

    ``programs`` share the rows; the default is 4 for each of a Hopper GPU's 132 multiprocessors.
    ``stages`` rows a program are on their way at once.
    """
    M, C = total.shape
    block = triton.next_power_of_2(C)
    num_warps = num_warps or max(1, min(16, block // 512))
    programs = min(programs, M)
    dx = torch.empty_like(total)
    partial = torch.empty(programs, C, dtype=torch.float32, device=total.device)
    _backward_kernel[(programs,)](
        dh,
        total,
        rstd,
        weight,
        dres,
        dx,
        partial,
        M,
        C,
        BLOCK=block,
        STAGES=stages,
        num_warps=num_warps,
    )
    _add_rows_kernel[(triton.cdiv(C, 16),)](
        partial, dweight, programs, C, ROWS=128, BLOCK=16, num_warps=8
    )
    return dx
