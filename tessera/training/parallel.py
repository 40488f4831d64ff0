"""Several processes, one training: who is there, and what the hosts tell each other.

``World`` is the set of workers, one process a GPU, that torchrun (or ``launch.py``) started; how
they share a model is ``replica.py``.

What the hosts tell each other (a stop request, an error) goes through gloo, so that it never waits
for a GPU. A background thread has a gloo group of its own: collectives of two threads in one group
would pair up with each other.

A world of one has no process group, and every operation hands back what it was given.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.errors import InputError, RetryElsewhereError, TesseraError
from tessera.model.device import best_device
from tessera.training.launch import PEER_LOST, leave_with_the_launcher

T = TypeVar("T")

TIMEOUT_VARIABLE = "TESSERA_WORKERS_TIMEOUT_S"
_TIMEOUT_S = 1800.0
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerLostError(RetryElsewhereError):
    """Another worker went away in the middle of a collective; its own end says why."""

    exit_code = PEER_LOST


@dataclass(frozen=True)
class World:
    """The workers of one training. ``rank`` counts over all machines, ``local_rank`` over this one.

    ``background`` is the gloo group for one thread beside the loop; None in a world of one.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    background: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that writes what only one may write."""
        return self.rank == 0

    def broadcast(self, value: T | None) -> T:
        """Rank 0's ``value``, which must be picklable, on every rank; others pass None."""
        if self.size == 1:
            return cast("T", value)
        box = [value]
        with reporting_lost_peers():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return cast("T", box[0])

    def gather(self, value: T, *, background: bool = False) -> list[T]:
        """Every rank's picklable ``value``, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with reporting_lost_peers():
            dist.all_gather_object(values, value, group=self.background if background else None)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; the hosts agree without a look at the device."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag))
        with reporting_lost_peers():
            dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the ranks' tensors up, in place, on their device; the host does not wait."""
        if self.size > 1:
            with reporting_lost_peers():
                dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every host is here."""
        self.any(False)

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0; its picklable result, or its error, reaches every rank.

        A ``TesseraError`` arrives with its type and its sentence. Anything else is raised as it is
        on rank 0 and as a ``RuntimeError`` that quotes it on the others.
        """
        if self.size == 1:
            return function()
        if not self.is_main:
            outcome = pickle.loads(self.broadcast(None))
            if isinstance(outcome, _Failure):
                raise _of_another(outcome.error)
            return cast("T", outcome)
        try:
            result = function()
            packed = pickle.dumps(result)  # here, so that a result that cannot travel is an error
        except BaseException as error:
            self.broadcast(pickle.dumps(_Failure(_portable(error))))
            raise
        self.broadcast(packed)
        return result

    def together(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every rank; if one raises a ``TesseraError``, all raise it."""
        if self.size == 1:
            return function()
        result, failure = None, None
        try:
            result = function()
        except TesseraError as error:
            failure = error
        said = self.gather(_portable(failure) if failure else None)
        first = next((rank for rank, error in enumerate(said) if error is not None), None)
        if first is None:
            return cast("T", result)
        if failure is not None and first == self.rank:
            raise failure
        raise _of_another(cast("Exception", said[first]))


def _of_another(error: Exception) -> Exception:
    """An error that the rank it came from tells."""
    if isinstance(error, TesseraError):
        error.told_elsewhere = True
    return error


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _portable(error: BaseException) -> Exception:
    if isinstance(error, TesseraError):
        try:
            return cast("TesseraError", pickle.loads(pickle.dumps(error)))
        except Exception:  # an error with arguments of its own; the others need the sentence
            pass
    return RuntimeError(f"rank 0 failed with {type(error).__name__}: {error}")


@contextmanager
def reporting_lost_peers() -> Iterator[None]:
    """Turn what torch raises when a worker has gone into ``PeerLostError``.

    Around a training step as well: its collectives raise wherever the device is waited for.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, (dist.DistNetworkError, dist.DistBackendError)) or (
            (
                "gloo" in text
                and any(word in text for word in ("onnect", "imed out", "peer", "pipe"))
            )
            or "Connection closed by peer" in text
            or "NCCL" in text
        )
        if not lost:
            raise
        raise PeerLostError(
            "Another worker of this training went away or did not answer in time; its own last "
            f"lines say why (here: {text.splitlines()[0][:200]}); the same command continues."
        ) from error


def join(device_type: str | None = None, timeout_s: float | None = None) -> World:
    """The world that torchrun's variables describe; a world of one without them.

    ``device_type`` is ``cuda`` or ``cpu``, by default ``best_device``. ``timeout_s`` (else
    TESSERA_WORKERS_TIMEOUT_S, else half an hour) is how long a worker waits for the others: one of
    them may be downloading a checkpoint. From here on a worker leaves once its launcher is gone.
    Raises ``InputError`` for variables that cannot be used, ``RetryElsewhereError`` if the others
    do not come.
    """
    kind = device_type or best_device().type
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, 0, 1, torch.device(kind))
    leave_with_the_launcher()
    missing = [name for name in _TORCHRUN if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE is set but {', '.join(missing)} is not; start several workers with "
            "torchrun, which sets all of them, or unset WORLD_SIZE."
        )
    rank, size, local_rank, local_size = (_count(name) for name in _TORCHRUN[:4])
    if not (rank < size and local_rank < local_size <= size):
        raise InputError(
            f"RANK {rank} of WORLD_SIZE {size} and LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE "
            f"{local_size} do not fit together; let torchrun set them."
        )
    device = torch.device(kind)
    if kind == "cuda":
        gpus = torch.cuda.device_count()
        if local_size > gpus:  # all refuse: those that have a GPU would only wait for the others
            few = InputError(
                f"There are {local_size} workers on this machine and {gpus} GPUs; start one "
                "worker a GPU (--gpus, or torchrun's --nproc-per-node)."
            )
            few.told_elsewhere = local_rank > 0
            raise few
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=_timeout_s() if timeout_s is None else timeout_s)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
        background = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=timeout))
    except (dist.DistError, RuntimeError) as error:
        raise RetryElsewhereError(
            f"Worker {rank} of {size} did not reach the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0][:200]}); start all of them "
            "again."
        ) from error
    return World(rank, size, local_rank, local_size, device, background)


def leave(world: World) -> None:
    """Wait for the others, then leave the world.

    A launcher stops all workers once one has ended with an error, so the first may not end while
    another is still saving. Not for an exit by an error of one's own: the others may be stuck.
    """
    if world.size > 1:
        world.barrier()
        dist.destroy_process_group()


def _count(name: str) -> int:
    text = os.environ[name]
    if not text.isdigit():
        raise InputError(f"{name} is {text!r}, expected a whole number; let torchrun set it.")
    return int(text)


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else _TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise InputError(f"{TIMEOUT_VARIABLE} is {text!r}, expected seconds, for example 1800.")
    return seconds
