"""TESSERA_DEVICE, which a dry run of a launch sets."""

import pytest
import torch

from tessera.errors import InputError
from tessera.model.device import best_device


def test_the_cpu_is_taken_although_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device({}).type == "cuda"
    assert best_device({"TESSERA_DEVICE": ""}).type == "cuda"
    assert best_device({"TESSERA_DEVICE": "auto"}).type == "cuda"
    assert best_device({"TESSERA_DEVICE": "cpu"}).type == "cpu"


def test_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match=r"TESSERA_DEVICE is 'CPU!'; expected auto .* or cpu"):
        best_device({"TESSERA_DEVICE": "CPU!"})
