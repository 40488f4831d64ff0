"""Matrix products whose result is added to a float32 buffer while the factors are narrower."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@torch.no_grad()
def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total`` += ``left`` @ ``right`` in place, every sum in the dtype of ``total``.

    total (N, K) float32 (or float64), left (N, M) and right (M, K) of one dtype, ``total``'s or a
    narrower one; they may be transposed views. On a GPU cuBLAS adds in its epilogue, so no product
    of ``total``'s size is ever written beside it.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif not total.is_cuda:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    elif _adds_in_place(left.dtype, total.dtype, total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))


@functools.cache
def _adds_in_place(narrow: torch.dtype, wide: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds a product of ``narrow`` factors to a ``wide`` matrix, and rightly.

    Tried once on a product whose result is exact: some versions of torch refuse the mixture of
    dtypes. Waits for the device, so the first call must not lie in the capture of a CUDA graph.
    """
    ones = torch.ones(16, 16, dtype=narrow, device=device)
    total = torch.full((16, 16), 0.5, dtype=wide, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=wide, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 16.5).all())
