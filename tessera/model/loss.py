"""The next-token loss, summed so that micro-batches and masks of any size add up exactly."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that does not count (padding, and in fine-tuning everything but the assistant)."""


def summed_cross_entropy(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) over the targets that are not ``IGNORE``, in nats, float32 scalar.

    states (B, T, C) in the compute dtype, head (V, C) float32, targets (B, T) int64, or (M, C) and
    (M,). The product is taken in the compute dtype, the soft-max in float32.
    """
    logits = F.linear(states, head.to(states.dtype))
    return F.cross_entropy(
        logits.view(-1, logits.size(-1)).float(),
        targets.reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
    )
