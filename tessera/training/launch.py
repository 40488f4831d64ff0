"""Start the workers of one machine, and leave with the code that they earned.

``tessera train`` finds torchrun's variables by itself. Where SkyPilot rented several GPUs or
machines and nobody called torchrun, it starts the workers itself, with torch's own launcher, and
becomes their parent: each worker is the same command once more, with torchrun's variables set.

torchrun turns every failure into 1, and a managed job is started again only on 75, so the parent
takes the workers' own codes (``verdict``):

    1. 2 (bad input), then 3 (diverged): a verdict on the run, whoever gives it
    2. 75 (another machine or moment may help), from a worker that failed in the same second as the
       first one; a later 75 is only an answer to being told to stop
    3. any other code, of the first worker that failed: a bug or a missing program
    4. a signal that nobody sent on purpose: 128 + its number, final. A crash or a kill for want of
       memory would come again on the next machine, at the same price
    5. otherwise 75: what is left are workers whose peer went away, or that were told to stop

Below 4 are SIGTERM, SIGINT, and a SIGKILL long after the first failure: that is how workers are
stopped once one has failed. With several machines SIGABRT is below 4 too: it is how NCCL ends a
worker when the machine of a peer is gone.

Told to stop (SIGTERM, SIGINT), the parent passes the signal on once, waits for the grace period and
leaves with 75. Workers are sessions of their own, so a Ctrl-C reaches them only through the parent.

A parent that was killed can pass nothing on, and workers that lived on would train beside the next
attempt: each watches for its parent and leaves when it is gone (``leave_with_the_launcher``).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import select
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from tessera.errors import DivergedError, InputError, RetryElsewhereError

if TYPE_CHECKING:  # torch takes seconds, and most starts need no launcher
    from torch.distributed.launcher.api import LaunchConfig

PEER_LOST = 76
"""Exit code of a worker whose peer went away, from one of ours to ``launch`` and to nobody else."""

DEFAULT_PORT = 29571
PORT_VARIABLE = "TESSERA_MASTER_PORT"
LAUNCHER_VARIABLE = "TESSERA_LAUNCHER_PID"
"""Process id of ``launch``, from it to its workers and to nobody else."""
_RETRY = RetryElsewhereError.exit_code
_FINAL = (InputError.exit_code, DivergedError.exit_code)
_TOLD = (-signal.SIGTERM, -signal.SIGINT)
_STOPPING_S = 10.0  # a worker that was stopped for another's failure is killed after 30 s
_RENDEZVOUS_S = 900  # SkyPilot starts all machines within seconds, but setup may differ
_LEAVING_S = 5  # between a worker's last save and its end
_WATCH_S = 0.5  # between two looks for the launcher


@dataclass(frozen=True)
class Plan:
    """Workers to start on this machine, and where they meet those of the others."""

    nodes: int
    node_rank: int
    workers: int
    address: str
    port: int

    @classmethod
    def on_this_machine(cls, workers: int) -> Plan:
        """``workers`` on one machine; a free port is chosen. ``InputError`` below one."""
        if workers < 1:
            raise InputError(f"{workers} GPUs cannot train; ask for at least one.")
        return cls(1, 0, workers, "127.0.0.1", 0)


@dataclass(frozen=True)
class Failure:
    """A worker's exit code, negative for a signal, and when it was noticed (seconds)."""

    code: int
    at: float


def needs_launch(environ: Mapping[str, str]) -> Plan | None:
    """What to start on this machine; None if workers are running already or one is enough.

    Reads SkyPilot's SKYPILOT_NUM_NODES, _NODE_RANK, _NODE_IPS and _NUM_GPUS_PER_NODE (a machine
    without GPUs gets one worker), and TESSERA_MASTER_PORT. Raises ``InputError`` if they contradict
    each other.
    """
    if any(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return None
    if "SKYPILOT_NUM_NODES" not in environ:
        return None
    nodes = _number(environ, "SKYPILOT_NUM_NODES", 1)
    workers = max(1, _number(environ, "SKYPILOT_NUM_GPUS_PER_NODE", 0, default="0"))
    if nodes * workers == 1:
        return None
    if nodes == 1:
        return Plan.on_this_machine(workers)
    rank = _number(environ, "SKYPILOT_NODE_RANK", 0)
    addresses = environ.get("SKYPILOT_NODE_IPS", "").split()
    if len(addresses) != nodes or rank >= nodes:
        raise InputError(
            f"SKYPILOT_NUM_NODES is {nodes}, but SKYPILOT_NODE_IPS lists {len(addresses)} machines "
            f"and SKYPILOT_NODE_RANK is {rank}; start with torchrun if SkyPilot did not set them."
        )
    port = _number(environ, PORT_VARIABLE, 1, default=str(DEFAULT_PORT))
    return Plan(nodes, rank, workers, addresses[0], port)


def _number(environ: Mapping[str, str], name: str, least: int, default: str | None = None) -> int:
    text = environ.get(name) or default or ""
    if not text.isdecimal() or int(text) < least:
        raise InputError(
            f"{name} is {text!r}, expected a whole number of at least {least}; start with torchrun "
            "if SkyPilot did not set it."
        )
    return int(text)


def verdict(failures: Sequence[Failure], nodes: int) -> int:
    """The exit code for the workers' failures, first noticed first; the rule is above."""
    codes = [failure.code for failure in failures]
    for code in _FINAL:
        if code in codes:
            return code
    began = min(failure.at for failure in failures)
    if Failure(_RETRY, began) in failures:
        return _RETRY
    for code in codes:
        if code > 0 and code not in (_RETRY, PEER_LOST):
            return code
    for failure in failures:
        stopped = failure.code in _TOLD or (
            failure.code == -signal.SIGKILL and failure.at - began >= _STOPPING_S
        )
        peer_gone = failure.code == -signal.SIGABRT and nodes > 1
        if failure.code < 0 and not stopped and not peer_gone:
            return 128 - failure.code
    return _RETRY


def launch(plan: Plan, argv: Sequence[str], *, grace_s: float = 25.0) -> int:
    """Start ``argv`` (program first) once a worker; returns the exit code for the whole machine.

    ``grace_s`` is the time between the signal that stops the workers and their end by SIGKILL
    (before torch 2.12 torch's own 30 seconds hold instead). Call it from the main thread, before
    anything has touched a GPU.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    # What a worker has to say it says itself; torch's loggers would add their own report of signals
    # and exits. Some of them set their own level, so the way out is what is closed, for all.
    chatter = logging.getLogger("torch.distributed.elastic")
    chatter.propagate = False
    if not chatter.handlers:  # with none at all, Python would print the records to stderr
        chatter.addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory(prefix="tessera-launch-") as logs, _prepared(plan):
        try:
            elastic_launch(_config(plan, logs, grace_s), argv[0])(*argv[1:])
        except ChildFailedError as error:
            failures = [Failure(f.exitcode, f.timestamp) for f in error.failures.values()]
            for rank, failure in error.failures.items():
                if failure.exitcode < 0:  # it could not say anything any more
                    name = signal.Signals(-failure.exitcode).name
                    print(f"worker {rank} was ended by {name}", file=sys.stderr)
            return verdict(failures, plan.nodes)
        except (SignalException, _ToldError):
            return _RETRY
        except (DistError, RendezvousError, TimeoutError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise RetryElsewhereError(
                f"The workers did not meet at {plan.address}:{plan.port} ({reason}); start them "
                "again, on all machines."
            ) from error
    return 0


def _config(plan: Plan, logs: str, grace_s: float) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    settings: dict[str, object] = {
        "min_nodes": plan.nodes,
        "max_nodes": plan.nodes,
        "nproc_per_node": plan.workers,
        "logs_specs": DefaultLogsSpecs(log_dir=logs),
        "max_restarts": 0,
        "role": "trainer",
    }
    if plan.nodes == 1:  # a meeting place of one's own on a free port, as `torchrun --standalone`
        settings |= {"run_id": uuid.uuid4().hex, "rdzv_backend": "c10d"}
        settings |= {"rdzv_endpoint": f"{plan.address}:{plan.port}", "local_addr": plan.address}
    else:
        settings |= {"run_id": "tessera", "rdzv_backend": "static"}
        settings |= {"rdzv_endpoint": f"{plan.address}:{plan.port}"}
        settings |= {"rdzv_configs": {"rank": plan.node_rank, "timeout": _RENDEZVOUS_S}}
    if "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}:
        settings["shutdown_timeout"] = math.ceil(grace_s) + _LEAVING_S
    return LaunchConfig(**settings)  # type: ignore[arg-type]


class _ToldError(Exception):
    """A signal arrived before torch's launcher watched for one."""


@contextmanager
def _prepared(plan: Plan) -> Iterator[None]:
    """Signals that end in 75, what workers inherit, and no worker left when this is over."""
    import psutil

    def handle(number: int, frame: FrameType | None) -> None:
        raise _ToldError

    me = psutil.Process()
    before = {child.pid for child in me.children()}
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {name: signal.signal(name, handle) for name in names}
    inherited = {LAUNCHER_VARIABLE: str(os.getpid())}
    if "OMP_NUM_THREADS" not in os.environ:  # every worker would take all cores
        inherited["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // plan.workers))
    os.environ.update(inherited)
    try:
        yield
    finally:
        # A second signal ends torch's wait for the workers; they would go on alone.
        left = [child for child in me.children() if child.pid not in before]
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(left, timeout=_LEAVING_S)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        for variable in inherited:
            del os.environ[variable]


def leave_with_the_launcher() -> None:
    """End this process with 75 once the ``launch`` that started it is gone, whatever hangs then.

    For a worker, as early as it can. Without a launcher of ours nothing happens.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None:
        return

    def watch() -> None:
        # Compared with the number told, not with the parent met here: it may be gone already.
        while str(os.getppid()) == launcher:
            time.sleep(_WATCH_S)
        try:  # only where there is room: a reader that stands still must not keep this one alive
            if os.environ.get("LOCAL_RANK", "0") == "0" and select.select([], [2], [], 0)[1]:
                os.write(2, b"\nthe command that started the workers is gone: leaving now\n")
        finally:
            os._exit(_RETRY)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
