"""LoRA (Hu et al. 2021) on ProtoGPT's linears, named and shaped as PEFT names and shapes it.

y = W x + (alpha / r) B A x, with W frozen, A (r, in) drawn from a seed and B (out, r) zero, so
that a fresh adapter leaves the base unchanged. The state dict and the configuration are PEFT's
own (``adapter_model.safetensors``, ``adapter_config.json``): stock ``peft`` loads them onto
ProtoGPT. Written here rather than taken from PEFT because a training node would otherwise install
transformers and accelerate for forty lines of arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import LINEARS

_PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """A frozen linear and its low-rank update; both adapter matrices are float32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        out: Tensor = self.base(x) + self.scale * update
        return out


def add_lora(
    model: ProtoGPT, rank: int, alpha: float, seed: int, targets: Sequence[str] = LINEARS
) -> list[nn.Parameter]:
    """Freeze ``model``, put LoRA on ``targets`` of every block; returns the trainable parameters.

    A is Kaiming-uniform with a = sqrt(5), as in PEFT, drawn on the CPU from ``seed`` alone.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    trainable: list[nn.Parameter] = []
    for block in model.blocks:
        for target in targets:
            parent_name, _, name = target.partition(".")
            parent = block.get_submodule(parent_name)
            linear = getattr(parent, name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{target} already has an adapter; start from the plain base.")
            lora = LoRALinear(linear, rank, alpha)
            bound = 1.0 / math.sqrt(linear.in_features)  # Kaiming with a = sqrt(5)
            draw = torch.empty(rank, linear.in_features).uniform_(
                -bound, bound, generator=generator
            )
            with torch.no_grad():
                lora.lora_A.copy_(draw)
            setattr(parent, name, lora)
            trainable += [lora.lora_A, lora.lora_B]
    return trainable


def lora_state(model: ProtoGPT) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, float32 on the CPU."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{_PREFIX}{name}.lora_A.weight"] = module.lora_A.detach().float().cpu()
            state[f"{_PREFIX}{name}.lora_B.weight"] = module.lora_B.detach().float().cpu()
    return {name: tensor.clone().contiguous() for name, tensor in sorted(state.items())}


def load_lora_state(model: ProtoGPT, state: dict[str, Tensor]) -> None:
    """Copy tensors under PEFT's names into a model prepared by ``add_lora``; all must match.

    A missing, foreign or wrongly shaped tensor is a ValueError that names it.
    """
    own = lora_state(model)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ValueError(f"the adapter and the model differ in {len(odd)} tensors, first {odd[0]}")
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, LoRALinear):
                continue
            for part in ("lora_A", "lora_B"):
                tensor, parameter = state[f"{_PREFIX}{name}.{part}.weight"], getattr(module, part)
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{name}.{part} has shape {tuple(tensor.shape)}, the model expects "
                        f"{tuple(parameter.shape)}"
                    )
                parameter.copy_(tensor)


def peft_config(rank: int, alpha: float, targets: Sequence[str], base: str) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT writes it; ``base`` is the name or path of the base model."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
