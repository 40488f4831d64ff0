"""What a device could do at most, for model FLOPs utilisation (MFU).

MFU = FLOPs a token x tokens/s / peak (Chowdhery et al. 2022). The peak is the vendor's figure for
dense bf16 where the device is known, else a matrix product measured on the spot; the source is
always printed beside the figure.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tessera.model.datasheet import bf16_flops


@dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices together, and who says so."""

    flops: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype, devices: int = 1) -> Peak:
    """The denominator of MFU for ``devices`` devices like this one."""
    known = device.type == "cuda" and dtype == torch.bfloat16
    if known and (found := bf16_flops(torch.cuda.get_device_name(device))):
        model, flops = found
        return Peak(devices * flops, f"{model} data sheet, dense bf16")
    spelled = str(dtype).removeprefix("torch.")
    return Peak(devices * _measure(device, dtype), f"measured {spelled} matrix product")


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several square matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
