"""GELU and its gradient in one pass: the arithmetic, for other kernels too, and the launchers.

The tanh form is u * sigmoid(2 z) with z = sqrt(2/pi) (u + 0.044715 u^3): the same function, without
the cancellation of 1 + tanh(z) for negative u, and it needs one exponential and one division.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_CUBIC = tl.constexpr(0.044715)
_EXPONENT = tl.constexpr(-2.0 * math.sqrt(2.0 / math.pi) / math.log(2.0))
"""exp(-2 z) = 2 ^ (_EXPONENT (u + _CUBIC u^3))."""
_LN_2 = tl.constexpr(math.log(2.0))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0 = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
_NEGATIVE_HALF_LOG2_E = tl.constexpr(-0.5 / math.log(2.0))


@triton.jit
def _sigmoid_of(u, square, PTX: tl.constexpr):
    """Sigmoid(2 z) of a float32 tile and its square, to about 2^-21."""
    x = u * (square * (_EXPONENT * _CUBIC) + _EXPONENT)
    if PTX:  # Triton's own exp2 and division guard denormals, at twice the instructions.
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / (1.0 + tl.exp2(x))


@triton.jit
def gelu_of(u, TANH: tl.constexpr, PTX: tl.constexpr):
    """GELU of a float32 tile; ``PTX`` on an NVIDIA GPU, not in the interpreter."""
    if TANH:
        return u * _sigmoid_of(u, u * u, PTX)
    return 0.5 * u * (1.0 + tl.erf(u * _SQRT_HALF))


@triton.jit
def gelu_slope_of(u, TANH: tl.constexpr, PTX: tl.constexpr):
    """The derivative of GELU at a float32 tile; ``PTX`` as in `gelu_of`."""
    if TANH:
        square = u * u
        s = _sigmoid_of(u, square, PTX)
        # d(2 z)/du, from the same constant: exp(-2 z) is a power of 2 here.
        inner = square * (-3.0 * _LN_2 * _EXPONENT * _CUBIC) - _LN_2 * _EXPONENT
        return s + u * (inner * (s - s * s))
    below = 0.5 * (1.0 + tl.erf(u * _SQRT_HALF))
    return below + u * (tl.exp2(u * u * _NEGATIVE_HALF_LOG2_E) * _DENSITY_AT_0)


@triton.jit
def _gelu_kernel(u, a, count, TANH: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = gelu_of(tl.load(u + at, mask=inside, other=0.0).to(tl.float32), TANH, PTX)
    tl.store(a + at, value.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward_kernel(
    da, u, du, count, TANH: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr
):
    # No pointer is declared exclusive: du may be da, each program reads its elements first.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    slope = gelu_slope_of(tl.load(u + at, mask=inside, other=0.0).to(tl.float32), TANH, PTX)
    grad = tl.load(da + at, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(du + at, grad.to(du.dtype.element_ty), mask=inside)


def gelu(u: Tensor, tanh: bool, *, block: int = 4096, num_warps: int = 8) -> Tensor:
    """See `tessera.model.fused.gelu.gelu`; ``block`` elements a program."""
    a = torch.empty_like(u)
    count = u.numel()
    _gelu_kernel[(triton.cdiv(count, block),)](
        u, a, count, TANH=tanh, PTX=u.is_cuda, BLOCK=block, num_warps=num_warps
    )
    return a


def gelu_backward(
    da: Tensor, u: Tensor, tanh: bool, out: Tensor, *, block: int = 4096, num_warps: int = 8
) -> Tensor:
    """See `tessera.model.fused.gelu.gelu_backward`; ``block`` elements a program."""
    count = u.numel()
    _gelu_backward_kernel[(triton.cdiv(count, block),)](
        da, u, out, count, TANH=tanh, PTX=u.is_cuda, BLOCK=block, num_warps=num_warps
    )
    return out
