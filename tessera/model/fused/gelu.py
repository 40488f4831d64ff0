"""GELU and its gradient, tanh form or exact, computed in float32 and rounded once."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.model.fused import backend

Approximate = Literal["tanh", "none"]
"""As in `torch.nn.functional.gelu`."""


def gelu(u: Tensor, approximate: Approximate) -> Tensor:
    """GELU of ``u`` (M, N), in its dtype."""
    if backend.use_triton(u):
        from tessera.model.fused.kernels import gelu as kernels

        return kernels.gelu(u, approximate == "tanh")
    return F.gelu(_wide(u), approximate=approximate).to(u.dtype)


def gelu_backward(
    da: Tensor, u: Tensor, approximate: Approximate, out: Tensor | None = None
) -> Tensor:
    """The gradient with respect to ``u`` (M, N), given ``da`` of `gelu`, in the dtype of ``da``.

    It is written to ``out`` if given, which may be ``da`` itself; else to new memory.
    """
    du = torch.empty_like(da) if out is None else out
    if backend.use_triton(u):
        from tessera.model.fused.kernels import gelu as kernels

        return kernels.gelu_backward(da, u, approximate == "tanh", du)
    return du.copy_(wide_gelu_backward(da, u, approximate))


def wide_gelu_backward(da: Tensor, u: Tensor, approximate: Approximate) -> Tensor:
    """The torch form before rounding: (M, N) in float32, or in float64 if ``u`` is."""
    wide = torch.ops.aten.gelu_backward(_wide(da), _wide(u), approximate=approximate)
    assert isinstance(wide, Tensor)
    return wide


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
