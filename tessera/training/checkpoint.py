"""Checkpoints: the whole training state, published so that it counts only when it is whole.

Tensors are written by ``torch.distributed.checkpoint`` (readable later by another number of
GPUs), staged on the local disk, uploaded file by file, and listed with their digests in
``COMPLETE``, which is written last, and only after every journal record up to that step is in the
root. A reader believes no folder without ``COMPLETE`` and no file whose digest differs; a damaged
checkpoint is passed over with a warning and the next older one is taken.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from tessera.errors import DamagedError, NotFoundError, StoreError, SupersededError
from tessera.runs import OUTCOMES_DONE, Attempt, CheckpointRef, Run
from tessera.storage import (
    cache_folder,
    canonical_json,
    require_writable,
    sha256_bytes,
    sha256_file,
)
from tessera.tracking.journal import Journal

COMPLETE = "COMPLETE"
FORMAT = "tessera-checkpoint-1"


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint on the local disk."""

    ref: CheckpointRef
    folder: Path
    state: dict[str, Any]


def guard_publication(run: Run, attempt: Attempt) -> None:
    """Raise ``SupersededError`` if a later attempt took over, or another one finished the run."""
    other = run.superseded_by(attempt)
    if other is None:
        done = (n for n, ending in run.endings().items() if ending.outcome in OUTCOMES_DONE)
        other = next((name for name in done if name != attempt.id), None)
    if other is not None:
        raise SupersededError(
            f"Attempt {attempt.id} of run {run.id} stops: attempt {other} took over. "
            "Nothing is lost; this machine can be released."
        )


def training_state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Parameters, optimiser moments and random state as flat, named tensors (no copies)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def save_checkpoint(
    run: Run,
    attempt: Attempt,
    journal: Journal,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> CheckpointRef:
    """Publish the state after ``step`` optimiser steps, then drop all but the ``keep`` newest.

    Raises ``SupersededError`` if another attempt took over, ``StoreError`` if the root or the local
    disk failed; then nothing counts and the training may go on.
    """
    guard_publication(run, attempt)
    ref = CheckpointRef(step, attempt.id)
    staging = cache_folder() / "staging" / run.id / attempt.id
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "assuming the intent is to save in a single process"
            dcp_save(dict(tensors), checkpoint_id=staging)
        files = {}
        for file in sorted(path for path in staging.iterdir() if path.is_file()):
            files[file.name] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
            run.root.put_file(file, run.path(ref.folder, file.name))
    except (OSError, CheckpointException) as error:
        reason = f"The checkpoint of step {step} cannot be staged: {_first_cause(error)}."
        raise StoreError(reason) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    journal.event("checkpoint/published", step, folder=ref.folder)
    journal.flush()
    guard_publication(run, attempt)
    record = {"format": FORMAT, "step": step, "attempt": attempt.id, "files": files}
    record |= {"state": dict(state)}
    record |= {"sha256": sha256_bytes(canonical_json(record))}
    run.root.publish_json(run.path(ref.folder, COMPLETE), record)
    try:
        run.root.publish_json(run.path("latest.json"), {"step": step, "attempt": attempt.id})
        _retain(run, attempt, ref, keep)
    except StoreError as error:  # the checkpoint counts; what could not be tidied waits
        journal.event("checkpoint/untidy", step, reason=str(error))
    return ref


def _first_cause(error: OSError | CheckpointException) -> BaseException:
    """What went wrong inside of torch, which wraps even a full disk (in no ``Exception``)."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _retain(run: Run, attempt: Attempt, newest: CheckpointRef, keep: int) -> None:
    """Drop all but the ``keep`` newest up to ``newest``; a later one was passed over as damaged.

    With them goes what earlier attempts left half written: nobody can complete it any more.
    """
    whole = run.checkpoints()
    for old in [ref for ref in whole if ref.step <= newest.step][keep:]:
        run.root.delete(run.path(old.folder, COMPLETE))  # first it stops counting
        run.root.delete_tree(run.path(old.folder))
    names = {ref.folder.rsplit("/", 1)[-1] for ref in whole}
    for name in run.root.children(run.path("checkpoints")):
        match = re.fullmatch(r"step-\d+-(\d+)-[0-9a-f]+", name)
        if match and name not in names and int(match[1]) < attempt.number:
            run.root.delete_tree(run.path("checkpoints", name))


def fetch_checkpoint(run: Run) -> tuple[Loaded | None, list[str]]:
    """The furthest whole checkpoint, verified locally, and a sentence for each damaged one.

    None if the run has none; if all are damaged that is a ``DamagedError``, because starting again
    from zero would silently throw the run away.
    """
    for name in ("staging", "resume"):  # what a killed attempt left on this disk
        shutil.rmtree(cache_folder() / name / run.id, ignore_errors=True)
        require_writable(cache_folder() / name / run.id)
    warnings_: list[str] = []
    refs = run.checkpoints()
    for ref in refs:
        folder = cache_folder() / "resume" / run.id / f"step-{ref.step}-{ref.attempt}"
        try:
            record = _read_complete(run, ref)
            for name, entry in record["files"].items():
                run.root.get_file(run.path(ref.folder, name), folder / name, sha256=entry["sha256"])
            return Loaded(ref, folder, record["state"]), warnings_
        except (DamagedError, NotFoundError) as error:  # an outage is not damage: it ends the start
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, NotFoundError) and ref not in run.checkpoints():
                return fetch_checkpoint(run)  # a living attempt dropped it for a newer one
            warnings_.append(f"The checkpoint of step {ref.step} is passed over: {error}")
    if refs:
        raise DamagedError(
            f"None of the {len(refs)} checkpoints of run {run.id} is whole ({warnings_[0]}); "
            "restore one from a backup, or start another run with --new."
        )
    return None, warnings_


def _read_complete(run: Run, ref: CheckpointRef) -> dict[str, Any]:
    path = run.path(ref.folder, COMPLETE)
    record: dict[str, Any] = run.root.read_json(path)
    said = record.pop("sha256", None) if isinstance(record, dict) else None
    if said is None or said != sha256_bytes(canonical_json(record)):
        raise DamagedError(f"{path} in {run.root.url} differs from its own digest; it is damaged.")
    return record


def load_checkpoint(
    loaded: Loaded, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Copy a fetched checkpoint into the parameters, the optimiser and the random state."""
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=_step_device(parameter)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    wanted = training_state(parameters, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        present = FileSystemReader(loaded.folder).read_metadata().state_dict_metadata
        wanted = {name: tensor for name, tensor in wanted.items() if name in present}
        dcp_load(wanted, checkpoint_id=loaded.folder)
    torch.set_rng_state(wanted["random.cpu"])
    if "random.cuda" in wanted:
        torch.cuda.set_rng_state(wanted["random.cuda"])
    shutil.rmtree(loaded.folder, ignore_errors=True)


def _step_device(parameter: nn.Parameter) -> torch.device:
    """Fused AdamW keeps its step count beside the parameter, the plain one on the CPU."""
    return parameter.device if parameter.is_cuda else torch.device("cpu")
