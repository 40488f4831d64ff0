"""The training state as flat, named tensors, and back.

Names depend neither on the number of GPUs nor on how tensors are spread over them, so
``torch.distributed.checkpoint`` loads a checkpoint on another number of GPUs: ``model.<name>``,
``buffer.<name>`` (a scale history of a low-precision recipe is one), ``optimizer.<name>.<key>``,
``stability.<name>``, ``random.cpu`` and ``random.cuda.<rank>``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from tessera.errors import DamagedError


def training_state(
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    more: Mapping[str, Tensor],
    *,
    rank: int = 0,
) -> dict[str, Tensor]:
    """Parameters, buffers, optimiser moments, ``more`` and random state (no copies)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors |= {f"buffer.{name}": buffer for name, buffer in buffers.items()}
    tensors |= more
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return tensors


def allocate_moments(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """AdamW's state as it is before the first step.

    The optimiser would allocate it lazily; a loaded checkpoint, a copy to host memory and a search
    for the largest micro-batch want it there from the start.
    """
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


LATER = frozenset({"stability.steep"})
"""What checkpoints did not have from the first version on, and what begins at zero then."""


def restore_state(folder: Path, wanted: dict[str, Tensor], *, alone: bool) -> None:
    """Load the checkpoint in ``folder`` into the tensors of ``wanted``, in place.

    Raises ``DamagedError`` if a tensor is missing, unless it is a random state or one of
    ``LATER``, which stays as it is. With several ranks (``alone`` false) all of them call this.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "assuming the intent is to load in a single process"
        present = FileSystemReader(folder).read_metadata().state_dict_metadata
        needed = [n for n in wanted if n not in LATER and not n.startswith("random.cuda")]
        missing = [name for name in needed if name not in present]
        if missing:
            raise DamagedError(
                f"The checkpoint in {folder.name} lacks {len(missing)} tensors, first {missing[0]};"
                " it is of another model or version: start another run with --new."
            )
        wanted = {name: tensor for name, tensor in wanted.items() if name in present}
        dcp_load(wanted, checkpoint_id=folder, no_dist=alone)
    torch.set_rng_state(wanted["random.cpu"])
    for name, tensor in wanted.items():
        if name.startswith("random.cuda"):
            torch.cuda.set_rng_state(tensor)
