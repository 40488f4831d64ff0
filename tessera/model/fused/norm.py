"""RMSNorm with the residual addition before it, and its backward pass with the one after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tessera.model.fused import backend


class Normed(NamedTuple):
    """What `add_rms_norm` returns."""

    total: Tensor
    """x + delta, rounded to the dtype of x (M, C)."""
    rstd: Tensor
    """1 / root of the mean square of each row of ``total`` (M,); float32 (float64 for float64)."""
    h: Tensor
    """total * rstd * weight, rounded to the dtype of x (M, C)."""


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Normed:
    """Add ``delta`` to ``x``, both (M, C) of one dtype, and norm the sum with ``weight`` (C,).

    Without ``delta`` the total is ``x`` itself. The numbers are those of `protogpt.RMSNorm`.
    """
    if backend.use_triton(x):
        from tessera.model.fused.kernels import norm as kernels

        total, rstd, h = kernels.add_rms(x, delta, weight, eps)
        assert h is not None
        return Normed(total, rstd, h)
    total, rstd = add_rms(x, delta, eps)
    return Normed(total, rstd, (_wide(total) * rstd[:, None] * weight).to(x.dtype))


def add_rms(x: Tensor, delta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``total`` and ``rstd`` of `add_rms_norm`, for where another kernel applies the norm."""
    if backend.use_triton(x):
        from tessera.model.fused.kernels import norm as kernels

        return kernels.add_rms(x, delta, None, eps)[:2]
    total = x if delta is None else x + delta
    return total, torch.rsqrt(_wide(total).square().mean(-1) + eps)


def rms_norm_backward(
    dh: Tensor, total: Tensor, rstd: Tensor, weight: Tensor, dres: Tensor | None, dweight: Tensor
) -> Tensor:
    """The gradient with respect to ``total`` (M, C): through the norm, plus ``dres`` (M, C).

    ``dh`` (M, C) is the gradient of ``h``, ``dres`` what reaches ``total`` past the norm. The sum
    is made in float32 and rounded once, to the dtype of ``total``. The gradient of ``weight`` is
    added to ``dweight`` (C,) in place; equal inputs give equal bits.
    """
    if backend.use_triton(total):
        from tessera.model.fused.kernels import norm as kernels

        return kernels.rms_norm_backward(dh, total, rstd, weight, dres, dweight)
    normed, slope = _wide(total) * rstd[:, None], _wide(dh)
    dweight += (slope * normed).sum(0)
    slope = slope * weight
    dx = (slope - normed * (slope * normed).mean(-1, keepdim=True)) * rstd[:, None]
    if dres is not None:
        dx += dres
    return dx.to(total.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
