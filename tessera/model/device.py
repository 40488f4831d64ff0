"""Which device a process computes on."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from tessera.errors import InputError

DEVICE_VARIABLE = "TESSERA_DEVICE"
"""``cpu``: compute on the processor although there is, or was rented, a GPU (for a dry run).

``auto``, or nothing: the GPU if there is one.
"""


def cpu_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``TESSERA_DEVICE`` says ``cpu``; ``InputError`` for a word it does not know."""
    word = environ.get(DEVICE_VARIABLE) or "auto"
    if word not in ("auto", "cpu"):
        raise InputError(
            f"{DEVICE_VARIABLE} is {word!r}; expected auto (the GPU if there is one) or cpu."
        )
    return word == "cpu"


def best_device(environ: Mapping[str, str] = os.environ) -> torch.device:
    """The GPU if there is one, else the CPU; the CPU too where ``TESSERA_DEVICE`` says so."""
    gpu = not cpu_wanted(environ) and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")
