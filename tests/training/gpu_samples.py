"""What NVML tells of a real GPU; run by hand where there is one:

python -m pytest tests/training/gpu_samples.py
"""

from __future__ import annotations

import pytest
import torch

from tessera.training import samples

pytestmark = pytest.mark.gpu


def test_a_gpu_tells_load_memory_power_and_temperature() -> None:
    found = samples.Machine(torch.device("cuda", 0)).read()
    assert {"gpu_percent", "gpu_memory_gib", "gpu_watts", "gpu_celsius"} < found.keys()
    assert 0 <= found["gpu_percent"] <= 100
    assert 10 < found["gpu_celsius"] < 110
    assert 20 < found["gpu_watts"] < 1500
