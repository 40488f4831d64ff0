"""What a device could do at most, for model FLOPs utilisation (MFU).

MFU = FLOPs a token x tokens/s / peak (Chowdhery et al. 2022). The peak is the vendor's figure for
dense bf16 where the device is known, else a matrix product measured on the spot; the source is
always printed beside the figure.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# Dense bf16 matrix FLOP/s of the data sheets, first match of the device's name counts.
_DATASHEET = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
)


@dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices together, and who says so."""

    flops: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype, devices: int = 1) -> Peak:
    """The denominator of MFU for ``devices`` devices like this one."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in _DATASHEET:
            if part.lower() in name.lower():
                return Peak(devices * flops, f"{part} data sheet, dense bf16")
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
