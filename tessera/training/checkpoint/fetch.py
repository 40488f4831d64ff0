"""Where an attempt continues: the furthest whole checkpoint of this machine or of the root.

Verified before it counts; one that is damaged is passed over with a sentence, and the next older
one is taken.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tessera.errors import ConflictError, DamagedError, NotFoundError
from tessera.runs import CheckpointRef, Run, furthest_first
from tessera.storage import cache_folder, require_writable, sha256_file
from tessera.storage.local import copy_local
from tessera.tracking.journal import alive_here
from tessera.tracking.records import read_journal
from tessera.training.checkpoint.files import (
    COMPLETE,
    check_record,
    drop_local,
    local_checkpoints,
    local_folder,
    remove_partials,
)

_DOWNLOADS = 8


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint on the local disk, under names that no other attempt removes."""

    ref: CheckpointRef
    folder: Path
    state: dict[str, Any]
    local: bool

    def discard(self) -> None:
        """Remove the download, or the second names of a local checkpoint, which stays."""
        shutil.rmtree(self.folder, ignore_errors=True)


def fetch_checkpoint(
    run: Run, *, local: bool = True, only: CheckpointRef | None = None
) -> tuple[Loaded | None, list[str]]:
    """The furthest whole checkpoint, verified locally, and a sentence for each passed over.

    None if the run has none; if all are damaged that is a ``DamagedError``, because starting again
    from zero would silently throw the run away. Call it after what dead attempts left was adopted.
    Without ``local`` only the root counts; ``only`` names the one to take.
    """
    clean_up(run)
    notes: list[str] = []
    in_root = run.checkpoints()
    here = _usable_here(run) if local else []
    refs = [only] if only else sorted({*in_root, *here}, key=furthest_first)
    for ref in refs:
        if ref in here:
            try:
                return _continued(_open_local(run, ref), notes)
            except (DamagedError, FileNotFoundError) as error:
                if (local_folder(run) / ref.name).exists():  # else an attempt that lives dropped it
                    what = f"The local checkpoint of step {ref.step}"
                    notes.append(f"{what} is passed over: {_fault(error)}")
                    drop_local(run, ref)
        if ref in in_root:
            try:
                return _continued(_download(run, ref, _own_folder(run, ref, local)), notes)
            except (DamagedError, NotFoundError) as error:  # an outage is not damage: it ends here
                if isinstance(error, NotFoundError) and ref not in run.checkpoints():
                    # a living attempt dropped it for a newer one
                    return fetch_checkpoint(run, local=local)
                notes.append(f"The checkpoint of step {ref.step} is passed over: {_fault(error)}")
    if in_root:
        raise DamagedError(
            f"None of the {len(in_root)} checkpoints of run {run.id} is whole ({notes[-1]}); "
            "restore one from a backup, or start another run with --new."
        )
    return _continued(None, notes)


def _fault(error: Exception) -> str:
    """What is wrong, without what to do: an error's advice is for who has nothing else."""
    said = str(error)
    return said.rpartition("; ")[0] or said.rstrip(".")


def _continued(loaded: Loaded | None, notes: list[str]) -> tuple[Loaded | None, list[str]]:
    """``loaded`` and the notes as sentences that say where the run goes on instead."""
    if loaded is None:
        end = "there is no other, so the run starts again"
    else:
        where = "on this machine's disk" if loaded.local else "in the root"
        end = f"the run continues from that of step {loaded.ref.step} {where}"
    return loaded, [f"{note}; {end}, and nothing needs doing." for note in notes]


def clean_up(run: Run) -> None:
    """Remove what killed attempts left half done on this disk, and see that it can be written."""
    alone = not alive_here(run)
    if alone:
        remove_partials(run)
    for folder in _resume_folder(run).glob("*"):
        owner = folder.suffix[1:]
        if not psutil.pid_exists(int(owner)) if owner else alone:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (local_folder(run), _resume_folder(run)):
        require_writable(folder)


def remove_finished(run: Run) -> None:
    """Remove the checkpoints of a run that is finished, perhaps elsewhere, from this disk.

    Not while an attempt of it is alive here: that one notices by itself that it is not needed.
    """
    if not alive_here(run):
        shutil.rmtree(local_folder(run), ignore_errors=True)


def _resume_folder(run: Run) -> Path:
    return cache_folder() / "resume" / run.id


def _own_folder(run: Run, ref: CheckpointRef, alone: bool) -> Path:
    """Where ``ref`` is loaded from: this process's own, as others of this machine may be starting.

    Several machines (not ``alone``) have to name it alike.
    """
    return _resume_folder(run) / (f"{ref.name}.{os.getpid()}" if alone else ref.name)


def _usable_here(run: Run) -> list[CheckpointRef]:
    """Local checkpoints that a lineage can be built on: given up by nobody, attempt dead and known.

    The records up to the step must be in the root, as they are for a published one.
    """
    found = local_checkpoints(run)
    if not found:
        return []
    rollbacks = run.rollbacks()
    known = {attempt.id for attempt in run.attempts()}
    living = alive_here(run)
    return [
        ref
        for ref in found
        if ref.attempt in known
        and ref.attempt not in living
        and not any(rollback.gives_up(ref) for rollback in rollbacks)
    ]


def _open_local(run: Run, ref: CheckpointRef) -> Loaded:
    """Verify a local checkpoint and give it second names, since others may prune the first."""
    record, folder = _check_local(run, ref), _own_folder(run, ref, alone=True)
    for name in record["files"]:
        copy_local(local_folder(run) / ref.name / name, folder / name, link=True)
    return Loaded(ref, folder, record["state"], local=True)


def _check_local(run: Run, ref: CheckpointRef) -> dict[str, Any]:
    folder = local_folder(run) / ref.name
    try:
        record = check_record(json.loads((folder / COMPLETE).read_bytes()), str(folder / COMPLETE))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder / COMPLETE} cannot be read ({error}).") from error
    _require_same_run(run, ref, record["state"])
    if record["nodes"] != 1:
        raise DamagedError(f"{folder} holds only one machine's part.")
    for name, entry in record["files"].items():
        file = folder / name
        if not file.exists() or sha256_file(file) != entry["sha256"]:
            raise DamagedError(f"{file} is missing or differs from its digest.")
    due = int(record["state"]["ledger"]["records"])
    if (have := sum(1 for _ in read_journal(run, ref.attempt))) < due:
        raise DamagedError(f"{run.root.url} has {have} of the {due} records that it covers.")
    return record


def _require_same_run(run: Run, ref: CheckpointRef, state: dict[str, Any]) -> None:
    """Two first starts under one ``--run-id`` may both have created the run, where stores let them.

    What the loser published before it noticed must not be continued by the winner.
    """
    if state.get("identity", run.identity) != run.identity:
        raise ConflictError(
            f"The checkpoint {ref.folder} of run {run.id} was made with other settings than "
            "run.json says: two starts took this run id at once; start another run with --new or "
            "another --run-id."
        )


def _download(run: Run, ref: CheckpointRef, folder: Path) -> Loaded:
    path = run.path(ref.folder, COMPLETE)
    try:
        record = check_record(run.root.read_json(path), f"{path} in {run.root.url}")
        _require_same_run(run, ref, record["state"])
        names: Sequence[str] = sorted(record["files"])

        def get(name: str) -> None:
            digest = record["files"][name]["sha256"]
            run.root.get_file(run.path(ref.folder, name), folder / name, sha256=digest)

        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            list(pool.map(get, names))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Loaded(ref, folder, record["state"], local=False)
