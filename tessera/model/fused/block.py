"""Forward and backward of one block, written out, in the compute dtype.

Names: D is d_model, M the tokens of the micro-batch. The residual stream reaches a block as two
tensors, ``x`` and the ``delta`` that the block before has still to add, so that the sum is taken in
the pass that also norms it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tessera.model.fused.attention import AttentionBackend, Saved
from tessera.model.fused.gelu import Approximate, gelu, gelu_backward
from tessera.model.fused.matmul import accumulate
from tessera.model.fused.norm import add_rms_norm, rms_norm_backward

Watch = Callable[[str, Tensor], None]
"""Is shown a tensor of the step under the name of its float8 site."""


@dataclass(frozen=True)
class Dimensions:
    """Of a micro-batch: B sequences of T tokens through H heads; and what the experiment names."""

    batch: int
    tokens: int
    heads: int
    eps: float
    gelu: Approximate

    def heads_of(self, qkv: Tensor) -> Tensor:
        """(M, 3D) -> (B, T, 3, H, head width), the same memory."""
        return qkv.view(self.batch, self.tokens, 3, self.heads, -1)

    def split(self, out: Tensor) -> Tensor:
        """(M, D) -> (B, T, H, head width), the same memory."""
        return out.view(self.batch, self.tokens, self.heads, -1)


class BlockTensors(NamedTuple):
    """One tensor for each parameter of a block: its weights, working copies or gradients."""

    norm1: Tensor
    qkv: Tensor
    out: Tensor
    norm2: Tensor
    up: Tensor
    down: Tensor


class Activations(NamedTuple):
    """What the backward pass of a block needs."""

    total1: Tensor
    rstd1: Tensor
    h1: Tensor
    qkv: Tensor
    attended: Tensor
    saved: Saved
    total2: Tensor
    rstd2: Tensor
    h2: Tensor
    up: Tensor
    gelu: Tensor


def see_nothing(name: str, tensor: Tensor) -> None:
    """The ``Watch`` of those who do not want to know."""


def forward(
    x: Tensor,
    delta: Tensor | None,
    w: BlockTensors,
    attention: AttentionBackend,
    dims: Dimensions,
    see: Watch = see_nothing,
) -> tuple[Tensor, Tensor, Activations]:
    """x, delta (M, D) -> the stream after the attention, the delta of the MLP, and what to keep.

    Norm weights in ``w`` are float32, matrices in the compute dtype.
    """
    total1, rstd1, h1 = add_rms_norm(x, delta, w.norm1, dims.eps)
    qkv = h1 @ w.qkv.t()
    attended, saved = attention.forward(dims.heads_of(qkv))
    merged = attended.view(x.shape)
    total2, rstd2, h2 = add_rms_norm(total1, merged @ w.out.t(), w.norm2, dims.eps)
    up = h2 @ w.up.t()
    activated = gelu(up, dims.gelu)
    for name, tensor in (("h1", h1), ("attended", merged), ("h2", h2), ("gelu", activated)):
        see(name, tensor)
    kept = Activations(
        total1, rstd1, h1, qkv, merged, saved, total2, rstd2, h2, up, activated
    )  # fmt: skip
    return total2, activated @ w.down.t(), kept


def backward(
    dx: Tensor,
    kept: Activations,
    w: BlockTensors,
    grads: BlockTensors,
    attention: AttentionBackend,
    dims: Dimensions,
    see: Watch = see_nothing,
) -> Tensor:
    """Gradient of the block's output (M, D) -> that of its input; adds the weights' to ``grads``.

    ``see`` is shown each gradient that a float8 block would cast.
    """
    see("d_down", dx)
    accumulate(grads.down, dx.t(), kept.gelu)
    d_gelu = dx @ w.down
    d_up = gelu_backward(d_gelu, kept.up, dims.gelu, out=d_gelu)
    see("d_up", d_up)
    accumulate(grads.up, d_up.t(), kept.h2)
    d_middle = rms_norm_backward(d_up @ w.up, kept.total2, kept.rstd2, w.norm2, dx, grads.norm2)
    see("d_out", d_middle)
    accumulate(grads.out, d_middle.t(), kept.attended)
    d_attended = d_middle @ w.out
    d_qkv = attention.backward(
        dims.split(d_attended), dims.heads_of(kept.qkv), dims.split(kept.attended), kept.saved
    ).view(kept.qkv.shape)
    see("d_qkv", d_qkv)
    accumulate(grads.qkv, d_qkv.t(), kept.h1)
    return rms_norm_backward(d_qkv @ w.qkv, kept.total1, kept.rstd1, w.norm1, d_middle, grads.norm1)
