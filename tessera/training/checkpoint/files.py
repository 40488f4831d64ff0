"""The local tier: checkpoints as folders on this machine's disk, whole or not there.

    <cache>/checkpoints/<root>/<run_id>/step-<n>-<attempt>/          renamed into place last
                                        step-<n>-<attempt>.partial/  being written

Each holds what ``torch.distributed.checkpoint`` wrote and ``COMPLETE``: the record with every
file's digest that also makes the checkpoint whole in the root.
"""

from __future__ import annotations

import errno
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from tessera.errors import DamagedError, InputError, StoreError
from tessera.runs import CheckpointRef, Run, furthest_first
from tessera.storage import (
    cache_folder,
    canonical_json,
    publish_local,
    sha256_bytes,
    sha256_file,
)

COMPLETE = "COMPLETE"
FORMAT = "tessera-checkpoint-2"
WRITERS = 8
"""Files, and threads writing them: one thread does not fill a fast disk."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRITER = "_write_files_from_queue"  # in the names of torch's writer threads

Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on this machine's disk; ``own`` are the files that this rank wrote."""

    ref: CheckpointRef
    folder: Path
    record: dict[str, Any]
    own: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(int(entry["bytes"]) for entry in self.record["files"].values())


def local_folder(run: Run) -> Path:
    """Where the local checkpoints of ``run`` lie; two roots may hold runs of the same id."""
    place = sha256_bytes(run.root.url.encode())[:16]
    return cache_folder() / "checkpoints" / place / run.id


def partial_folder(run: Run, ref: CheckpointRef) -> Path:
    """Where ``ref`` is being written."""
    return local_folder(run) / f"{ref.name}.partial"


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], rank: int, group: ProcessGroup | None
) -> Entries:
    """Write this rank's part of the state into ``folder``; returns its files with digests.

    ``tensors`` are in host memory. Raises ``StoreError`` for a full or broken disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), _errors_of_writers() as errors:
            warnings.simplefilter("ignore")  # of torch's, about its own deprecations
            writer = FileSystemWriter(folder, thread_count=WRITERS)
            dcp_save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not group)
        if errors:
            raise first_cause(errors[0])
        if rank == 0:
            require_all_tensors(folder)
        own = sorted(folder.glob(f"__{rank}_*"))
        own += [folder / ".metadata"] if rank == 0 else []
        return {
            file.name: {"sha256": sha256_file(file), "bytes": file.stat().st_size} for file in own
        }
    except (OSError, CheckpointException) as error:
        raise StoreError(_unwritten(folder.parent, error)) from error


@contextmanager
def _errors_of_writers() -> Iterator[list[BaseException]]:
    """What torch's writer threads die of: it does not ask how they ended.

    Nor does it wait for them when its own part has failed, so that is done here.
    """
    errors: list[BaseException] = []
    plain = threading.excepthook

    def collect(about: threading.ExceptHookArgs) -> None:
        if about.thread and _WRITER in about.thread.name and about.exc_value is not None:
            errors.append(about.exc_value)
        else:
            plain(about)

    threading.excepthook = collect
    try:
        yield errors
    finally:
        for thread in threading.enumerate():
            if _WRITER in thread.name:
                thread.join()
        threading.excepthook = plain


def require_all_tensors(folder: Path) -> None:
    """Raise ``OSError`` if the index of a checkpoint just written lacks a piece of a tensor."""
    metadata = FileSystemReader(folder).read_metadata()
    stored = {(index.fqn, index.offset) for index in metadata.storage_data}
    for name, about in metadata.state_dict_metadata.items():
        for chunk in getattr(about, "chunks", ()):
            if (name, chunk.offsets) not in stored:
                raise OSError(f"{name} is missing in {folder.name}")


def finish_local(run: Run, ref: CheckpointRef, record: Mapping[str, Any]) -> Path:
    """Seal the partial folder of ``ref`` with its record and make it count."""
    partial = partial_folder(run, ref)
    folder = partial.with_name(ref.name)
    try:
        publish_local(partial / COMPLETE, canonical_json(dict(record)))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise StoreError(_unwritten(folder.parent, error)) from error
    return folder


def _unwritten(folder: Path, error: BaseException) -> str:
    """What the disk said and what helps; the sentence of whoever reports it goes around."""
    cause = first_cause(error)
    full = getattr(cause, "errno", None) in _FULL
    advice = "free some space or point TESSERA_CACHE at a larger disk"
    other = "point TESSERA_CACHE at a folder that can be written"
    return f"it cannot be written to {folder}: {cause}; {advice if full else other}"


def seal(
    ref: CheckpointRef, files: Entries, state: Mapping[str, Any], nodes: int
) -> dict[str, Any]:
    """The record that makes a checkpoint whole, with its own digest."""
    record = {"format": FORMAT, "step": ref.step, "attempt": ref.attempt, "nodes": nodes}
    record |= {"files": dict(sorted(files.items())), "state": dict(state)}
    return record | {"sha256": sha256_bytes(canonical_json(record))}


def check_record(record: Any, where: str) -> dict[str, Any]:
    """``record`` if it is what ``seal`` made; a ``DamagedError`` that names ``where`` if not.

    A whole one of another version is no damage but an ``InputError``: to pass it over would throw
    away what that version has done.
    """
    fields = dict(record) if isinstance(record, dict) else {}
    said = fields.pop("sha256", None)
    if said is None or said != sha256_bytes(canonical_json(fields)):
        raise DamagedError(f"{where} differs from its own digest; it is damaged.")
    if fields.get("format") != FORMAT:
        raise InputError(
            f"{where} is of format {fields.get('format')!r}, this version of tessera reads "
            f"{FORMAT!r}; use the version that wrote it, or start another run with --new."
        )
    return fields


def local_checkpoints(run: Run) -> list[CheckpointRef]:
    """Whole checkpoints on this machine's disk, furthest first."""
    folder = local_folder(run)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [CheckpointRef.parse(name) for name in names]
    return sorted((ref for ref in found if ref is not None), key=furthest_first)


def remove_partials(run: Run) -> None:
    """What killed attempts left half written; no attempt of this run may be alive here."""
    for path in local_folder(run).glob("*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def prune_local(run: Run, keep: int, held: set[str], newest: CheckpointRef) -> int:
    """Drop all but the ``keep`` newest local checkpoints up to ``newest``; returns how many.

    Those beyond ``newest`` of earlier attempts go too: they were given up, or ``newest`` would have
    continued from them. What is ``held`` stays, and what later attempts wrote.
    """
    ours = [ref for ref in local_checkpoints(run) if ref.number <= newest.number]
    kept = [ref for ref in ours if ref.step <= newest.step][:keep]
    doomed = [ref for ref in ours if ref not in kept and ref.name not in held]
    for ref in doomed:
        drop_local(run, ref)
    return len(doomed)


def local_bytes(run: Run) -> int:
    """What the local checkpoints of ``run`` take."""
    files = local_folder(run).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def drop_local(run: Run, ref: CheckpointRef) -> None:
    """Remove one; it stops counting before its files go."""
    folder = local_folder(run) / ref.name
    doomed = folder.with_name(f"{ref.name}.partial")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
    except OSError:
        doomed = folder
    shutil.rmtree(doomed, ignore_errors=True)


def first_cause(error: BaseException) -> BaseException:
    """What the disk said: torch wraps it (in no ``Exception``), and its archive writer, which then
    finds the file too short, covers it with an error of its own.
    """
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
