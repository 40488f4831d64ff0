"""Matrix products of float8 operands, each with one scale for the whole tensor.

Hopper multiplies float8 only with both operands contiguous along the summed dimension, so every
product here is ``left (m, k) x right (n, k)``, both row-major, and who needs another orientation
keeps the transposed copy (``fp8.Float8.columns``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(
    left: Tensor,
    right: Tensor,
    left_inverse: Tensor,
    right_inverse: Tensor,
    out_dtype: torch.dtype,
    *,
    fast: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """(m, k) float8 x (n, k) float8 -> (m, n): sums of products, times both inverse scales.

    The inverse scales are float32 tensors of one element on the device, at addresses that are
    multiples of 16 on a GPU (``scaling.aligned_inverses``); the host never reads them.
    On a GPU the sums are kept in float32 with ``fast`` off, and in the tensor cores' own fewer
    bits with it on (14 of the mantissa, NVIDIA's figure of Hopper); k, m and n are multiples of 16
    there. Elsewhere the product is taken in float32. ``out`` (m, n) of ``out_dtype`` receives the
    product if it is given.
    """
    if left.is_cuda:
        return (
            torch._scaled_mm(  # no public name before torch 2.10's scaled_mm, which wants recipes
                left,
                right.t(),
                scale_a=left_inverse.reshape(()),
                scale_b=right_inverse.reshape(()),
                out_dtype=out_dtype,
                use_fast_accum=fast,
                out=out,
            )
        )
    product = left.float() @ right.float().t()
    result = (product * (left_inverse * right_inverse)).to(out_dtype)
    return result if out is None else out.copy_(result)
