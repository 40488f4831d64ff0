"""Casts to 8-bit floats that write the rows and the transposed copy in one pass over the input.

A program takes a tile of tokens x features. Its threads hold 16 features of several tokens each, so
rows are stored as they lie. For the transposed copy every thread first packs 4 tokens of a feature
into a 32-bit word in its own registers; the words, a quarter as many as the bytes, then change
hands through shared memory and are stored along the tokens. For the 4 tokens to be in one thread,
the tile's rows are taken from memory in the order 0, 4, 8, ..., 1, 5, 9, ...: threads repeat along
the rows of a tile, and a quarter of the tile must be one or more such repetitions
(block_m / 4 >= 512 num_warps / block_n, which the defaults keep and no result depends on).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.model.fused.kernels.gelu import gelu_of, gelu_slope_of

PLAIN, NORMED, GELU, GELU_BACKWARD = range(4)
"""What is cast: x, x * rstd * weight, gelu(x), x * gelu'(u)."""
_NORMED, _GELU, _GELU_BACKWARD = (tl.constexpr(kind) for kind in (NORMED, GELU, GELU_BACKWARD))


class Tile(NamedTuple):
    """What a program takes: tokens, features, warps.

    ``group`` tiles along the tokens follow one another before the next block of features, so that
    transposed rows are written in longer runs.
    """

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 4
    group: int = 16


TILE = Tile()
"""64 elements a thread: 4 tokens x 16 features. About 100 registers, so 5 programs share an SM."""


@triton.jit
def _tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile coordinates: ``GROUP`` tiles along the tokens, then the next block of features."""
    per_group = GROUP * tiles_n
    first = (pid // per_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def _largest_bits(v):
    """The bits of the largest |v| of a row of float32; NaN lies above infinity, as its bits do.

    Of numbers that are not negative the bits grow with the number, so integers are compared. A
    maximum of floats that passes NaN on (``max.NaN``) would save an instruction an element, but
    beside it Triton mixed up the bytes of transposed float8 stores (triton-lang/triton#11111).
    """
    return tl.max(tl.abs(v).to(tl.int32, bitcast=True), axis=0)


@triton.jit
def _words_of(q, QUARTER: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr):
    """Bytes (4 QUARTER, BLOCK_N) -> 32-bit words (QUARTER, BLOCK_N), byte k from quarter k."""
    byte = tl.reshape(q.to(tl.uint8, bitcast=True), [2, 2, QUARTER, BLOCK_N])
    low, high = tl.split(tl.permute(byte, [2, 3, 1, 0]))
    b0, b1 = tl.split(low)
    b2, b3 = tl.split(high)
    if PTX:  # A 4 x 4 transpose of bytes: 4 features of 4 tokens in 8 instructions.
        word = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t<4>;
            prmt.b32 t0, $4, $5, 0x5140;
            prmt.b32 t1, $4, $5, 0x7362;
            prmt.b32 t2, $6, $7, 0x5140;
            prmt.b32 t3, $6, $7, 0x7362;
            prmt.b32 $0, t0, t2, 0x5410;
            prmt.b32 $1, t0, t2, 0x7632;
            prmt.b32 $2, t1, t3, 0x5410;
            prmt.b32 $3, t1, t3, 0x7632;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r",
            [b0, b1, b2, b3],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
        # A reduction over one element costs nothing, and the compiler does not look behind it. It
        # would find that the 16-bit input can change hands instead, and compute everything twice.
        return tl.max(tl.reshape(word, [1, QUARTER, BLOCK_N]), axis=0)
    word = b0.to(tl.uint32) | (b1.to(tl.uint32) << 8)
    word |= (b2.to(tl.uint32) << 16) | (b3.to(tl.uint32) << 24)
    return word.to(tl.int32, bitcast=True)


@triton.jit
def _mixed(x):
    """A bijection of 32-bit words whose bits look independent (lowbias32 of C. Wellons, 2018)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dithered(y, at, key):
    """Float32 ``y`` with bits of e4m3 alone, up or down by chance; `fp8.cast_dithered` says how."""
    below = _mixed(_mixed(at.to(tl.uint32)) ^ key.to(tl.uint32, bitcast=True)) >> 12
    moved = ((y.to(tl.uint32, bitcast=True) + below) & 0xFFF00000).to(tl.float32, bitcast=True)
    return tl.where(y == y, moved, y)  # the bits of a NaN could carry into the sign


@triton.jit(do_not_specialize=["key"], do_not_specialize_on_alignment=["scale", "amax"])
def _cast_kernel(
    x,
    u,
    rstd,
    weight,
    scale,
    amax,
    rows,
    columns,
    M,
    C,
    key,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    PTX: tl.constexpr,
    DITHER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    QUARTER: tl.constexpr = BLOCK_M // 4
    tile_m, tile_n = _tile_of(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP=GROUP
    )
    i = tl.arange(0, BLOCK_M)
    token = tile_m * BLOCK_M + (i % QUARTER) * 4 + i // QUARTER
    feature = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = token.to(tl.int64)[:, None] * C + feature[None, :]
    inside = (token < M)[:, None] & (feature < C)[None, :]

    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == _NORMED:
        v = v * tl.load(rstd + token, mask=token < M, other=0.0)[:, None]
        v = v * tl.load(weight + feature, mask=feature < C, other=0.0)[None, :]
    elif KIND == _GELU:
        v = gelu_of(v, TANH, PTX)
    elif KIND == _GELU_BACKWARD:
        v = v * gelu_slope_of(tl.load(u + at, mask=inside, other=0.0).to(tl.float32), TANH, PTX)

    tl.atomic_max(amax, _largest_bits(tl.reshape(v, [BLOCK_M * BLOCK_N])), sem="relaxed")

    # To nearest even; what is too large becomes the largest number, NaN stays NaN (cvt.satfinite).
    y = v * tl.load(scale)
    if DITHER:
        y = _dithered(y, at, key)
    q = y.to(rows.dtype.element_ty)
    tl.store(rows + at, q, mask=inside)

    if COLUMNS:
        if PACK:
            words = _words_of(q, QUARTER, BLOCK_N, PTX)
            four = tile_m * QUARTER + tl.arange(0, QUARTER)
            to = feature.to(tl.int64)[:, None] * (M // 4) + four[None, :]
            written = (feature < C)[:, None] & (four < M // 4)[None, :]
            tl.store(columns + to, tl.trans(words), mask=written)
        else:
            to = feature.to(tl.int64)[:, None] * M + token[None, :]
            written = (feature < C)[:, None] & (token < M)[None, :]
            tl.store(columns + to, tl.trans(q), mask=written)


@triton.jit(do_not_specialize_on_alignment=["amax"])
def _amax_kernel(x, amax, count, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.int32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
        at = start + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(v).to(tl.int32, bitcast=True))
    tl.atomic_max(amax, tl.max(largest, axis=0), sem="relaxed")


def cast(
    kind: int,
    x: Tensor,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    *,
    u: Tensor | None = None,
    rstd: Tensor | None = None,
    weight: Tensor | None = None,
    tanh: bool = False,
    columns: bool = True,
    dither: int | None = None,
    tile: Tile = TILE,
) -> tuple[Tensor, Tensor]:
    """Rows (M, C) and columns (C, M), or (0,) without them, of one of the casts above.

    ``PLAIN`` takes ``x``; ``NORMED`` the total as ``x``, ``rstd`` and ``weight``; ``GELU`` u as
    ``x``; ``GELU_BACKWARD`` da as ``x`` and ``u``. ``dither`` is the key, a signed 32-bit
    integer, of what is rounded by chance.
    """
    M, C = x.shape
    rows = torch.empty(M, C, dtype=dtype, device=x.device)
    turned = torch.empty((C, M) if columns else (0,), dtype=dtype, device=x.device)
    # Where threads hold fewer than 16 features Triton 3.6 mixes up the bytes of the words.
    pack = M % 4 == 0 and C % 16 == 0
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(C, tile.block_n)
    _cast_kernel[(tiles,)](
        x,
        u,
        rstd,
        weight,
        scale,
        amax.view(torch.int32),
        rows,
        turned.view(torch.int32) if pack else turned,
        M,
        C,
        dither or 0,
        KIND=kind,
        TANH=tanh,
        PTX=x.is_cuda,
        DITHER=dither is not None,
        COLUMNS=columns,
        PACK=pack,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        GROUP=tile.group,
        num_warps=tile.num_warps,
    )
    return rows, turned


def amax_of(x: Tensor, *, block: int = 8192, programs: int = 1024, num_warps: int = 8) -> Tensor:
    """The largest |x| as a new (1,) float32, in one pass over ``x``."""
    amax = torch.zeros(1, device=x.device)
    grid = (min(programs, triton.cdiv(x.numel(), block)),)
    _amax_kernel[grid](x, amax.view(torch.int32), x.numel(), BLOCK=block, num_warps=num_warps)
    return amax
