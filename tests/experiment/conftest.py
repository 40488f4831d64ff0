"""Two small experiments, and what the tests do to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.errors import InputError
from tessera.experiment import load_experiment

PRETRAIN: dict[str, Any] = {
    "name": "base", "kind": "pretrain", "seed": 1,
    "model": {"layers": 2, "d_model": 64, "heads": 4, "context": 32, "vocab_size": 512},
    "data": {"corpus": "sample"},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 2, "final_lr": 1e-5},
    "batch": {"tokens_per_step": 128, "micro_batch": 2}, "tokens": 1280,
    "evaluation": {"every_steps": 5}, "checkpoint": {"every_steps": 5},
}  # fmt: skip
SFT: dict[str, Any] = {
    "name": "voice", "kind": "sft", "seed": 1, "base": "base",
    "data": {"conversations": ["a.jsonl", "b.jsonl"]},
    "optimizer": {"lr": 1e-3}, "schedule": {"name": "linear_decay", "warmup_steps": 2},
    "batch": {"conversations_per_step": 8, "micro_batch": 4}, "epochs": 2,
    "checkpoint": {"every_steps": 5},
}  # fmt: skip


def changed(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of ``data`` with another value under a dotted key; ``...`` removes it."""
    fresh = copy.deepcopy(data)
    section = fresh
    *parents, last = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return fresh


def leaves(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all settings that are no section."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data) if not isinstance(data, str) else data)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(InputError) as error:
        load_experiment(path, overrides)
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert error.value.exit_code == 2
    return text
