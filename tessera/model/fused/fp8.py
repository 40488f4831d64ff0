"""Casts to 8-bit floats, each with the copy that the backward matrix products read.

A matrix product in 8 bits wants both factors with the summed dimension innermost. Forward sums over
the features, the gradient of a weight over the tokens: so every cast writes the tensor as it lies
(``rows``) and transposed (``columns``), from one read of the input, which may be the input of a
norm or of a GELU. Scales come from earlier steps, so the cast also records the largest magnitude
that it saw, for the scales of later ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.model.fused import backend
from tessera.model.fused.gelu import Approximate, wide_gelu_backward


class Float8(NamedTuple):
    """A matrix in 8 bits and its transpose, both contiguous; the scale is the caller's."""

    rows: Tensor
    """(M, C), ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``."""
    columns: Tensor
    """(C, M), the transpose of ``rows``; (0,) if it was not asked for."""


def cast(
    x: Tensor,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
    columns: bool = True,
) -> Float8:
    """``x`` (M, C), bf16 or float32, times ``scale``, clamped to what ``dtype`` holds, rounded.

    ``scale`` and ``amax`` are one float32 each, on the device of ``x``. ``amax`` is raised in place
    to the largest |x|: to infinity or NaN if there is one in ``x``, NaN above all. NaN stays NaN;
    infinity becomes the largest number of ``dtype``, so it shows in ``amax`` only. The same holds
    for the other casts, with the value that they cast, in float32, instead of ``x``.
    """
    if backend.use_triton(x):
        from tessera.model.fused.kernels import fp8 as kernels

        return Float8(*kernels.cast(kernels.PLAIN, x, scale, amax, dtype, columns=columns))
    return _cast(x.float(), scale, amax, dtype, columns)


def cast_dithered(x: Tensor, scale: Tensor, amax: Tensor, number: int, step: int) -> Float8:
    """``x`` (M, C) float32 times ``scale`` in e4m3, each number up or down, on average itself.

    Up with the probability of where it lies between its two neighbours: the bits of the mantissa
    that e4m3 cuts off (20 of 23) carry over when a random number of as many bits is added. That
    number is a hash of the element's place, of ``number``, which tells matrices apart, and of
    ``step``: no generator's state is needed to draw it again. What is too small for e4m3's normal
    numbers (below 2^-6) is rounded to the nearest after that.
    """
    key = _key(number, step)
    if backend.use_triton(x):
        from tessera.model.fused.kernels import fp8 as kernels

        signed = key - 2**32 if key >= 2**31 else key
        return Float8(
            *kernels.cast(kernels.PLAIN, x, scale, amax, torch.float8_e4m3fn, dither=signed)
        )
    torch.maximum(amax, x.abs().amax().reshape(amax.shape), out=amax)
    return _cast_dithered(x.float(), scale, key)


def cast_normed(
    total: Tensor, rstd: Tensor, weight: Tensor, scale: Tensor, amax: Tensor, dtype: torch.dtype
) -> Float8:
    """The normed ``total`` (M, C): total * rstd * weight, with ``rstd`` (M,) of `norm.add_rms`."""
    if backend.use_triton(total):
        from tessera.model.fused.kernels import fp8 as kernels

        return Float8(
            *kernels.cast(kernels.NORMED, total, scale, amax, dtype, rstd=rstd, weight=weight)
        )
    return _cast(total.float() * rstd[:, None] * weight, scale, amax, dtype)


def cast_gelu(
    u: Tensor, approximate: Approximate, scale: Tensor, amax: Tensor, dtype: torch.dtype
) -> Float8:
    """GELU of ``u`` (M, C)."""
    if backend.use_triton(u):
        from tessera.model.fused.kernels import fp8 as kernels

        tanh = approximate == "tanh"
        return Float8(*kernels.cast(kernels.GELU, u, scale, amax, dtype, tanh=tanh))
    return _cast(F.gelu(u.float(), approximate=approximate), scale, amax, dtype)


def cast_gelu_backward(
    da: Tensor,
    u: Tensor,
    approximate: Approximate,
    scale: Tensor,
    amax: Tensor,
    dtype: torch.dtype,
) -> Float8:
    """The gradient with respect to ``u`` (M, C), given ``da`` (M, C) of `gelu.gelu`."""
    if backend.use_triton(u):
        from tessera.model.fused.kernels import fp8 as kernels

        tanh = approximate == "tanh"
        kind = kernels.GELU_BACKWARD
        return Float8(*kernels.cast(kind, da, scale, amax, dtype, u=u, tanh=tanh))
    return _cast(wide_gelu_backward(da, u, approximate), scale, amax, dtype)


def verify(
    device: torch.device, gradients: torch.dtype, approximate: Approximate, dithered: bool = False
) -> None:
    """Raise ``ValueError``, a sentence, if the compiler of this device mixes up bytes.

    Compilers have mixed up transposed copies (triton-lang/triton#11111), and the loss would tell
    only days later. Takes the casts that a step takes, with gradients in the type ``gradients`` and
    with ``dithered`` weights; compares every byte of each with its transpose, and where nothing but
    a rounding lies between, with the torch form too.
    """
    M, C = 256, 192  # of the multiples for which models' kernels are compiled
    x = torch.linspace(-3.0, 3.0, M * C, device=device).reshape(M, C).sin().bfloat16()
    scale, amax = torch.full((1,), 8.0, device=device), torch.zeros(1, device=device)
    rstd, weight = torch.ones(M, device=device), torch.ones(C, device=device)
    e4m3 = torch.float8_e4m3fn
    rounded = [
        (cast(x, scale, amax, e4m3), _cast(x.float(), scale, amax, e4m3)),
        (cast(x.float(), scale, amax, e4m3), _cast(x.float(), scale, amax, e4m3)),
        (cast(x, scale, amax, gradients), _cast(x.float(), scale, amax, gradients)),
    ]
    if dithered:
        wide = x.float()
        dither = cast_dithered(wide, scale, amax, 1, 1), _cast_dithered(wide, scale, _key(1, 1))
        rounded.append(dither)
    computed = [
        cast_normed(x, rstd, weight, scale, amax, e4m3),
        cast_gelu(x, approximate, scale, amax, e4m3),
        cast_gelu_backward(x, x, approximate, scale, amax, gradients),
    ]
    right = all(_same_bytes(made.rows, plain.rows) for made, plain in rounded)
    casts = [*(made for made, _ in rounded), *computed]
    if not (right and all(_same_bytes(made.columns, made.rows.t()) for made in casts)):
        raise ValueError(
            "the float8 casts that were compiled for this GPU write wrong bytes, so precision fp8 "
            "cannot be used with this version of Triton; set precision: bf16, or install another "
            "PyTorch"
        )


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int8), other.view(torch.int8))


def restore(x8: Tensor, scale: Tensor) -> Tensor:
    """The float32 values that ``x8``, cast with ``scale``, stands for."""
    return x8.float() / scale


def amax_of(x: Tensor) -> Tensor:
    """The largest |x| of a tensor that is not empty, as (1,) float32; NaN if there is one."""
    if backend.use_triton(x):
        from tessera.model.fused.kernels import fp8 as kernels

        return kernels.amax_of(x)
    return x.abs().amax().float().reshape(1)


def _cast(
    v: Tensor, scale: Tensor, amax: Tensor, dtype: torch.dtype, columns: bool = True
) -> Float8:
    torch.maximum(amax, v.abs().amax().reshape(amax.shape), out=amax)
    limit = torch.finfo(dtype).max
    rows = (v * scale).clamp(-limit, limit).to(dtype)
    turned = rows.t().contiguous() if columns else torch.empty(0, dtype=dtype, device=v.device)
    return Float8(rows, turned)


def _cast_dithered(x: Tensor, scale: Tensor, key: int) -> Float8:
    y = x * scale
    place = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    below = _mixed(_mixed(place) ^ key) >> 12
    up_or_down = ((y.view(torch.int32).long() + below) & 0xFFF00000).int().view(torch.float32)
    dithered = torch.where(y == y, up_or_down, y)
    return _cast(dithered, torch.ones_like(scale), torch.empty_like(scale), torch.float8_e4m3fn)


_WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """``kernels.fp8._mixed`` of int64 numbers below 2^32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _key(number: int, step: int) -> int:
    """One word from both; the order matters, so matrix 3 in step 7 is not matrix 7 in step 3."""
    return _mix(_mix(number) + step)


def _mix(number: int) -> int:
    """``_mixed`` of one number; 0 would stay 0."""
    x = (number + 1) & _WORD
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _WORD
    x ^= x >> 15
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
