"""Gather of two tables in one pass, and the sum of rows that share a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _embed(ids, tokens, positions, out, T, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + row).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    x = tl.load(tokens + token * C + columns, mask=inside)
    x += tl.load(positions + (row % T) * C + columns, mask=inside)
    tl.store(out + row * C + columns, x.to(out.dtype.element_ty), mask=inside)


def launch_embed(ids: Tensor, tokens: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """ids (B, T), tokens (V, C), positions (P, C) -> (B*T, C) in ``dtype``; a row a program."""
    B, T = ids.shape
    C = tokens.size(1)
    out = torch.empty((B * T, C), dtype=dtype, device=tokens.device)
    _embed[(B * T,)](
        ids.contiguous(), tokens, positions, out, T, C, BLOCK=triton.next_power_of_2(C), num_warps=4
    )
    return out


@triton.jit
def _scatter(ids, ends, order, dx, dtokens, C, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.program_id(0)
    token = tl.load(ids + place)
    # Only the first place of a token's run works; the others leave at once.
    if token != tl.load(ids + place - 1, mask=place > 0, other=-1):
        end = tl.load(ends + place).to(tl.int32)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < C
        sums = tl.zeros((DEPTH, COLUMNS), tl.float32)
        for first in range(place, end, DEPTH):
            places = first + tl.arange(0, DEPTH)
            rows = tl.load(order + places, mask=places < end, other=0).to(tl.int64)
            sums += tl.load(
                dx + rows[:, None] * C + columns[None, :],
                mask=(places < end)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
        target = dtokens + token.to(tl.int64) * C + columns
        tl.store(target, tl.load(target, mask=inside) + tl.sum(sums, 0), mask=inside)


def launch_scatter(
    dx: Tensor,
    ids: Tensor,
    dtokens: Tensor,
    *,
    depth: int = 16,
    columns: int = 512,
    num_warps: int = 4,
) -> None:
    """dtokens[ids[i]] += dx[i]: dx (N, C), ids of N elements, dtokens (V, C) float32.

    ``depth`` rows are in flight at once, so that a token with thousands of rows is not the last to
    end; ``columns`` are those of one program. Both are powers of two.
    """
    # 32-bit keys halve the passes of the radix sort; stable, so the order of sums is fixed.
    keys, order = torch.sort(ids.reshape(-1).to(torch.int32), stable=True)
    ends = torch.searchsorted(keys, keys, right=True, out_int32=True)
    C = dx.size(1)
    _scatter[(keys.numel(), triton.cdiv(C, columns))](
        keys, ends, order, dx, dtokens, C, DEPTH=depth, COLUMNS=columns, num_warps=num_warps
    )
