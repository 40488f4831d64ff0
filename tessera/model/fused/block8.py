"""Forward and backward of one block with its matrix products in float8.

The residual stream, norms, attention, GELU and the gradients of weights stay as in ``block``. Each
operand of a product is cast in the pass that computes it, together with its transpose, which the
product that makes the weight's gradient needs. Between forward and backward only the transposes of
the operands are kept, at one byte a number.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tessera.model.fused.attention import AttentionBackend, Saved
from tessera.model.fused.block import BlockTensors, Dimensions
from tessera.model.fused.fp8 import (
    Float8,
    cast,
    cast_gelu,
    cast_gelu_backward,
    cast_normed,
)
from tessera.model.fused.matmul8 import multiply
from tessera.model.fused.norm import add_rms, rms_norm_backward
from tessera.model.fused.scaling import Site

FORWARD = ("h1", "attended", "h2", "gelu")
BACKWARD = ("d_down", "d_up", "d_out", "d_qkv")
"""The tensors of a block that are cast, by the names that ``block.forward`` shows them under."""


class Weight8(NamedTuple):
    """A matrix (out, in) in float8, its transpose, and the float32 scalar that undoes its scale."""

    cast: Float8
    inverse: Tensor


class Weights8(NamedTuple):
    """The matrices of a block."""

    qkv: Weight8
    out: Weight8
    up: Weight8
    down: Weight8


class Activations8(NamedTuple):
    """What the backward pass of a block needs; the float8 ones are transposes, (features, M)."""

    total1: Tensor
    rstd1: Tensor
    h1: Tensor
    qkv: Tensor
    attended: Tensor
    saved: Saved
    attended8: Tensor
    total2: Tensor
    rstd2: Tensor
    h2: Tensor
    up: Tensor
    gelu: Tensor


Sites = dict[str, Site]
"""The sites of one block, by the names in ``FORWARD`` and ``BACKWARD``."""


def forward(
    x: Tensor,
    delta: Tensor | None,
    w: BlockTensors,
    w8: Weights8,
    sites: Sites,
    attention: AttentionBackend,
    dims: Dimensions,
) -> tuple[Tensor, Tensor, Activations8]:
    """As ``block.forward``; of ``w`` only the norms' weights are used."""

    def product(operand: Float8, name: str, weight: Weight8) -> Tensor:
        inverse = sites[name].inverse
        return multiply(operand.rows, weight.cast.rows, inverse, weight.inverse, x.dtype)

    def normed(total: Tensor, rstd: Tensor, weight: Tensor, name: str) -> Float8:
        site = sites[name]
        return cast_normed(total, rstd, weight, site.scale, site.amax, site.dtype)

    total1, rstd1 = add_rms(x, delta, dims.eps)
    h1 = normed(total1, rstd1, w.norm1, "h1")
    qkv = product(h1, "h1", w8.qkv)
    attended, saved = attention.forward(dims.heads_of(qkv))
    merged = attended.view(x.shape)
    site = sites["attended"]
    attended8 = cast(merged, site.scale, site.amax, site.dtype)
    total2, rstd2 = add_rms(total1, product(attended8, "attended", w8.out), dims.eps)
    h2 = normed(total2, rstd2, w.norm2, "h2")
    up = product(h2, "h2", w8.up)
    site = sites["gelu"]
    activated = cast_gelu(up, dims.gelu, site.scale, site.amax, site.dtype)
    kept = Activations8(
        total1, rstd1, h1.columns, qkv, merged, saved, attended8.columns, total2, rstd2,
        h2.columns, up, activated.columns,
    )  # fmt: skip
    return total2, product(activated, "gelu", w8.down), kept


def backward(
    dx: Tensor,
    kept: Activations8,
    w: BlockTensors,
    w8: Weights8,
    sites: Sites,
    grads: BlockTensors,
    attention: AttentionBackend,
    dims: Dimensions,
    fresh: bool = False,
    fast: bool = True,
    fast_weights: bool = True,
) -> Tensor:
    """As ``block.backward``; with ``fresh`` the gradients are zero so far, which saves a pass.

    ``fast`` is how ``multiply`` sums, ``fast_weights`` how it does for the gradients of weights.
    """

    def through(gradient: Float8, name: str, weight: Weight8) -> Tensor:
        inverse = sites[name].inverse
        columns = weight.cast.columns
        return multiply(gradient.rows, columns, inverse, weight.inverse, dx.dtype, fast=fast)

    def add_weights(into: Tensor, gradient: Float8, name: str, operand: Tensor, of: str) -> None:
        left, right = sites[name].inverse, sites[of].inverse
        if fresh:
            multiply(
                gradient.columns, operand, left, right, into.dtype, fast=fast_weights, out=into
            )
        else:
            into.add_(multiply(gradient.columns, operand, left, right, dx.dtype, fast=fast_weights))

    def gradient_of(tensor: Tensor, name: str) -> Float8:
        site = sites[name]
        return cast(tensor, site.scale, site.amax, site.dtype)

    d_down = gradient_of(dx, "d_down")
    add_weights(grads.down, d_down, "d_down", kept.gelu, "gelu")
    site = sites["d_up"]
    d_up = cast_gelu_backward(
        through(d_down, "d_down", w8.down), kept.up, dims.gelu, site.scale, site.amax, site.dtype
    )
    add_weights(grads.up, d_up, "d_up", kept.h2, "h2")
    d_middle = rms_norm_backward(
        through(d_up, "d_up", w8.up), kept.total2, kept.rstd2, w.norm2, dx, grads.norm2
    )
    d_out = gradient_of(d_middle, "d_out")
    add_weights(grads.out, d_out, "d_out", kept.attended8, "attended")
    d_attended = through(d_out, "d_out", w8.out)
    d_qkv = attention.backward(
        dims.split(d_attended), dims.heads_of(kept.qkv), dims.split(kept.attended), kept.saved
    ).view(kept.qkv.shape)
    d_qkv8 = gradient_of(d_qkv, "d_qkv")
    add_weights(grads.qkv, d_qkv8, "d_qkv", kept.h1, "h1")
    return rms_norm_backward(
        through(d_qkv8, "d_qkv", w8.qkv), kept.total1, kept.rstd1, w.norm1, d_middle, grads.norm1
    )
