"""What the data sheets say that a GPU can do; no torch here, so that a plan answers at once."""

from __future__ import annotations

_BF16 = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
)


def bf16_flops(device: str) -> tuple[str, float] | None:
    """Dense bf16 matrix FLOP/s and the model that it is for; None for a device without a figure.

    ``device`` is the name that the driver reports; the first model that is part of it counts.
    """
    for model, flops in _BF16:
        if model.lower() in device.lower():
            return model, flops
    return None
