"""Output head and cross-entropy in one: the gradient is formed while the logits are at hand.

Tokens go through in chunks, so the logits of a whole micro-batch never exist; the gradient of a
chunk's logits takes their place in memory and is gone when both of its products are taken. The
three products of a token (logits, its state's gradient, the weight's) are those of the plain form:
nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessera.model.fused import backend
from tessera.model.fused.matmul import accumulate
from tessera.model.loss import IGNORE

CHUNK = 8192
"""Tokens at a time. 65,536 bf16 logits each are 1 GiB; fewer would add to dweight more often."""


@torch.no_grad()
def head_loss(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: int | Tensor,
    dweight: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy / ``divisor`` and its gradient: (loss, dstates).

    states (M, C) and weight (V, C) in the compute dtype, targets (M,) int64 with ``IGNORE`` where
    nothing counts; ``divisor`` is a number or a scalar tensor on the device, which the host never
    reads. The loss is a float32 scalar in nats, dstates (M, C) is in the compute dtype, and the
    weight's gradient is added to dweight (V, C) float32. As in ``summed_cross_entropy`` the logits
    are rounded to the compute dtype, the soft-max is float32 and the gradient of the logits is
    rounded again. No atomics: equal inputs give equal bits. A target that is neither ``IGNORE`` nor
    below V raises on a CPU and makes the loss not-a-number on a GPU.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    losses = torch.empty(targets.shape, dtype=wide, device=states.device)
    dstates = torch.empty_like(states)
    if not isinstance(divisor, Tensor):  # a GPU divides by a number through its reciprocal
        divisor = torch.full((), divisor, dtype=wide, device=states.device)
    scale = torch.ones((), dtype=wide, device=states.device) / divisor
    for part, logits in _logits(states, weight, chunk):
        _gradient_(logits, targets[part], losses[part], scale)
        torch.mm(logits, weight, out=dstates[part])
        accumulate(dweight, logits.t(), states[part])
    return losses.sum() / divisor, dstates


@torch.no_grad()
def head_sum(states: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """The summed cross-entropy alone, for evaluation: float32 scalar in nats.

    Arguments as in ``head_loss``.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    losses = torch.empty(targets.shape, dtype=wide, device=states.device)
    for part, logits in _logits(states, weight, chunk):
        _gradient_(logits, targets[part], losses[part], None)
    return losses.sum()


def _logits(states: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """For each chunk of tokens its place and its logits (tokens, V), which the next overwrite."""
    tokens = states.size(0)
    space = states.new_empty(min(chunk, tokens), weight.size(0))
    for first in range(0, tokens, chunk):
        part = slice(first, min(first + chunk, tokens))
        yield part, torch.mm(states[part], weight.t(), out=space[: part.stop - first])


def _gradient_(logits: Tensor, targets: Tensor, losses: Tensor, scale: Tensor | None) -> None:
    """Write each row's loss; with ``scale``, overwrite logits by (soft-max - one-hot) x scale.

    logits (M, V), targets (M,) int64, losses (M,) and the scalar ``scale`` float32.
    """
    if backend.use_triton(logits):
        from tessera.model.fused.kernels.cross_entropy import launch_cross_entropy

        launch_cross_entropy(logits, targets, losses, scale)
        return
    wide = logits.to(losses.dtype)
    counts = targets != IGNORE
    places = torch.where(counts, targets, 0)[:, None]
    norms = wide.logsumexp(1, keepdim=True)
    losses.copy_((norms - wide.gather(1, places))[:, 0].masked_fill_(~counts, 0.0))
    if scale is not None:
        softmax = wide.sub_(norms).exp_() if wide is not logits else (wide - norms).exp_()
        softmax.scatter_add_(1, places, softmax.new_full((), -1.0).expand_as(places))
        logits.copy_(softmax.mul_((counts * scale)[:, None]))
