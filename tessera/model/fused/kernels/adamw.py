"""AdamW's update of one parameter: every number is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["number"])
def _adamw(
    weights,
    gradients,
    means,
    squares,
    copies,
    rates,
    roots,
    number,
    factor,
    forbidden,
    count,
    shrink,
    take1,
    take2,
    eps,
    COPY: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    # Not `<= 0`: a step whose verdict is not a number goes ahead in torch's kernel too.
    if not (tl.load(forbidden) > 0):
        g = tl.load(gradients + places, mask=inside) * tl.load(factor)
        mean = tl.load(means + places, mask=inside)
        mean += (g - mean) * take1
        square = tl.load(squares + places, mask=inside)
        square += (g * g - square) * take2
        update = tl.div_rn(mean, tl.sqrt_rn(square) * tl.load(roots + number) + eps)
        weight = tl.load(weights + places, mask=inside)
        # Of 1 - shrink, as of beta2, float32 keeps fewer digits than of its complement, and the
        # error would be the same in every step.
        weight -= shrink * weight
        weight -= tl.load(rates + number) * update
        tl.store(weights + places, weight, mask=inside)
        tl.store(means + places, mean, mask=inside)
        tl.store(squares + places, square, mask=inside)
        if COPY:
            tl.store(copies + places, weight.to(copies.dtype.element_ty), mask=inside)
    if ZERO:
        tl.store(gradients + places, tl.zeros((BLOCK,), tl.float32), mask=inside)


def launch_adamw(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    copy: Tensor | None,
    rates: Tensor,
    roots: Tensor,
    number: int,
    factor: Tensor,
    forbidden: Tensor,
    *,
    shrink: float,
    betas: tuple[float, float],
    eps: float,
    zero: bool,
    block: int = 1024,
    num_warps: int = 4,
) -> None:
    """Update ``weight``, ``mean`` and ``square`` (contiguous float32, one shape) in place.

    ``rates[number]`` is lr / (1 - beta1^step) and ``roots[number]`` 1 / sqrt(1 - beta2^step), both
    float32; ``factor`` scales the gradient, ``forbidden`` above 0 forbids the update (float32
    scalars on the device); ``shrink`` is lr x weight decay. ``copy`` receives the new weight in its
    dtype; with ``zero`` the gradient is zero afterwards, whatever was forbidden.
    """
    count = weight.numel()
    _adamw[(triton.cdiv(count, block),)](
        weight,
        gradient,
        mean,
        square,
        weight if copy is None else copy,
        rates,
        roots,
        number,
        factor,
        forbidden,
        count,
        shrink,
        1 - betas[0],
        1 - betas[1],
        eps,
        COPY=copy is not None,
        ZERO=zero,
        BLOCK=block,
        num_warps=num_warps,
    )
