"""What a replay owes: the points due, those that MLflow has, and replayers as processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tessera.errors import TesseraError
from tessera.runs import list_runs
from tessera.storage import Root
from tessera.tracking import sending
from tessera.tracking.history import read_history
from tessera.tracking.replay import sync

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess
    from multiprocessing.sharedctypes import Synchronized
    from multiprocessing.synchronize import Barrier

LARGEST = 1.7976931348623157e308
"""How MLflow stores an infinity."""
FAILED_CODE = 75
Point = tuple[str, int, int, str]


def due(root: Root) -> dict[str, Counter[Point]]:
    """The points of every run: metric, step, milliseconds, value; read the slow and strict way."""
    found = {}
    for run in list_runs(root):
        points = read_history(run).points
        found[run.id] = Counter(
            (p.key, p.step, round(p.time * 1000), _spelt(p.number)) for p in points
        )
    return found


def _spelt(number: float) -> str:
    # SQLite keeps no sign of a zero.
    return repr(math.copysign(LARGEST, number) if math.isinf(number) else number + 0.0)


def there(uri: str) -> dict[str, Counter[Point]]:
    """The points that MLflow has of every run, by its stock client; a run twice is an error."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found: dict[str, Counter[Point]] = {}
    experiment = client.get_experiment_by_name("tessera")
    for run in client.search_runs([experiment.experiment_id]) if experiment else []:
        name = run.data.tags["tessera.run_id"]
        assert name not in found, f"{name} is there twice"
        found[name] = Counter(
            (m.key, m.step, m.timestamp, _spelt(m.value))
            for key in run.data.metrics
            if not key.startswith(("final/", "best/"))
            for m in client.get_metric_history(run.info.run_id, key)
        )
    return found


def require_exact(root: Root, uri: str) -> None:
    """MLflow has every point that is due, once, and no other; each run is there once."""
    wanted, found = due(root), there(uri)
    assert found.keys() == wanted.keys()
    for name in wanted:
        missing, extra = wanted[name] - found[name], found[name] - wanted[name]
        assert not missing, (name, "missing", missing.most_common(3))
        assert not extra, (name, "extra", extra.most_common(3))


def require_nothing_extra(root: Root, uri: str) -> int:
    """What is there is due; returns how many points that are."""
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    wanted = due(root)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tessera")
    if experiment is None:
        return 0
    count = 0
    for run in client.search_runs([experiment.experiment_id], run_view_type=ViewType.ACTIVE_ONLY):
        name = run.data.tags.get("tessera.run_id", "")
        for key in run.data.metrics:
            if not key.startswith(("final/", "best/")):
                for m in client.get_metric_history(run.info.run_id, key):
                    count += 1
                    point = m.key, m.step, m.timestamp, _spelt(m.value)
                    assert wanted[name][point] == 1, (name, point)
    return count


# -- replayers as processes --------------------------------------------------------------------

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.full.replaying_preload"])


@dataclass(frozen=True)
class Death:
    """When a replayer is killed with 9: ``seconds`` after its batch number ``batch`` begins.

    Batch 0 begins with the sync. A moment of the work and not of the clock: how far a process gets
    in a second depends on what else the machine does.
    """

    batch: int
    seconds: float


def _count_batches(count: Synchronized[int] | None, death: Death | None) -> None:
    from mlflow import MlflowClient

    real, begun = MlflowClient.log_batch, 0

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def look() -> None:
        if death is not None and begun == death.batch:
            threading.Timer(death.seconds, kill).start()

    def log_batch(*arguments: Any, **named: Any) -> Any:
        nonlocal begun
        begun += 1
        if count is not None:
            count.value = begun
        look()
        return real(*arguments, **named)

    MlflowClient.log_batch = log_batch  # type: ignore[method-assign]
    look()


def replay(
    root: str,
    uri: str,
    batch: int,
    barrier: Barrier | None,
    only: Sequence[str] | None,
    count: Synchronized[int] | None,
    death: Death | None,
) -> None:
    """One sync; the process's code says how it went."""
    sending.BATCH = batch
    _count_batches(count, death)
    if barrier is not None:
        barrier.wait()
    try:
        sync(Root(root), uri, only=only)
    except TesseraError as error:
        os.write(2, f"{error}\n".encode())
        os._exit(FAILED_CODE)
    os._exit(0)


def start(
    root: Root,
    uri: str,
    *,
    batch: int = 20,
    barrier: Any = None,
    only: Sequence[str] | None = None,
    count: Synchronized[int] | None = None,
    death: Death | None = None,
) -> ForkServerProcess:
    """A replayer in a process of its own, MLflow already imported; small batches: more moments.

    ``count`` is told how many batches it began.
    """
    arguments = (root.url, uri, batch, barrier, only, count, death)
    process = _CONTEXT.Process(target=replay, args=arguments)
    process.start()
    return process


def counter() -> Synchronized[int]:
    """A number that a replayer can write."""
    return _CONTEXT.Value("i", 0)


def barrier(parties: int) -> Any:
    """Something that several replayers can meet at."""
    return _CONTEXT.Barrier(parties)
