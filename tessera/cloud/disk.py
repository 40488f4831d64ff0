"""Bytes that a run will take on the local disk, and those of it that lie there already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tessera.experiment import Experiment, Pretrain
from tessera.model.shape import ModelShape, parameters

GIB = 2**30
_LEAST_DISK = 2 * GIB
_CHECKPOINT_BYTES = 12  # a parameter: weight and two moments, float32


def checkpoint_bytes(experiment: Pretrain) -> int:
    """Bytes of one checkpoint."""
    return _CHECKPOINT_BYTES * _parameters(experiment)


def disk_needed(experiment: Experiment | None) -> int:
    """Bytes that a run takes on the local disk: shards, checkpoints, published weights."""
    if not isinstance(experiment, Pretrain):
        return _LEAST_DISK
    needed = _shards(experiment) + _checkpoints(experiment) + 4 * _parameters(experiment)
    return max(_LEAST_DISK, needed)


def already_here(
    experiment: Experiment | None, cache: Path, environ: Mapping[str, str] = os.environ
) -> int:
    """Bytes in ``cache`` that are part of ``disk_needed``, as a run that resumes left them.

    Shards make room for each other, whoever fetched them. Checkpoints count if they are those of
    ``TESSERA_RUN_ID``, else of a run that is named after the experiment.
    """
    if not isinstance(experiment, Pretrain):
        return 0
    run = environ.get("TESSERA_RUN_ID") or f"{experiment.name}-*"
    checkpoints = sum(_size(folder) for folder in cache.glob(f"checkpoints/*/{run}"))
    shards = min(_size(cache / "shards"), _shards(experiment))
    return shards + min(checkpoints, _checkpoints(experiment))


def _shards(experiment: Pretrain) -> int:
    cache = int(experiment.data.cache_gib * GIB)
    return min(cache, 2 * experiment.tokens) if experiment.tokens else cache  # uint16


def _checkpoints(experiment: Pretrain) -> int:
    # Kept, being uploaded, being written: as training itself counts them.
    return (experiment.checkpoint.local_keep + 2) * checkpoint_bytes(experiment)


def _parameters(experiment: Pretrain) -> int:
    return parameters(ModelShape(**experiment.model.model_dump(exclude={"init_std"})))


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; what cannot be read is none."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:
                continue
    return total
