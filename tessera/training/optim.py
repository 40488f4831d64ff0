"""The optimiser: AdamW in two groups, norm weights without weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tessera.experiment import Optimizer


def build_optimizer(
    settings: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters.

    Always the fused one: it alone heeds ``found_inf``, a scalar on the device that forbids a step
    without the host's looking at it.
    """
    return torch.optim.AdamW(
        grouped(settings, parameters),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def grouped(settings: Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices with weight decay, norm weights without; no group without parameters."""
    groups = [
        {
            "params": [p for p in parameters.values() if p.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
