"""The replayer beside a trainer: a process of its own, for which training never waits.

    python -m tessera.cli.beside RUN      with TESSERA_ROOT and MLFLOW_TRACKING_URI

``tessera train`` starts it where MLFLOW_TRACKING_URI is set and MLflow is installed. It has a
session of its own (a signal to the trainer is not for it), a low priority and no GPU, and it reads
the root like anybody else. Its standard input is a pipe that the trainer holds: when that ends,
whatever became of the trainer, it syncs a last time and leaves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import strftime
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from tessera.runs import Run
    from tessera.storage import Root

URI_VARIABLE = "MLFLOW_TRACKING_URI"
GRACE_S = 5.0
"""Seconds that a trainer which is done leaves it for the last points."""
_NICE = 10
_KINDS = ("http://", "https://", "sqlite:", "postgresql", "mysql", "mssql")
_LATER = "`tessera-exp sync` brings the run there later"


class Beside:
    """Starts the replayer when it is told which run this is, and lets go of it at the end."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Beside:
        """Nothing runs yet."""
        return self

    def start(self, run: Run) -> None:
        """Start it for ``run`` if it is wanted and possible; raises nothing."""
        uri = os.environ.get(URI_VARIABLE, "")
        if not uri or self._process is not None:
            return
        from importlib.util import find_spec

        from tessera.storage import cache_folder

        if not uri.startswith(_KINDS):
            _say(f"{URI_VARIABLE} is no server and no database, so {_LATER}.")
            return
        if find_spec("mlflow") is None:
            _say(f"MLflow is not installed here (pip install 'tessera[tracking]'), so {_LATER}.")
            return
        log = cache_folder() / "beside" / f"{run.id}.log"
        try:
            self._process = _start(run, self._root, log)
        except OSError as error:
            _say(f"The replay into MLflow did not start ({error}), so {_LATER}.")
            return
        _say(f"MLflow follows this run; what goes wrong there is in {log}.")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let it sync a last time, for seconds at most; it goes on alone if that does not do."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError, subprocess.TimeoutExpired, _EnoughError), _told_to_go():
            if process.stdin is not None:
                process.stdin.close()
            process.wait(GRACE_S)
        if process.returncode is None:
            process.returncode = 0  # nobody waits for it any more: no warning that it still runs


class _EnoughError(BaseException):
    """Told to go while waiting."""


@contextmanager
def _told_to_go() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the wait: the training is over, and its exit code is settled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def enough(number: int, frame: FrameType | None) -> None:
        raise _EnoughError

    before = {kind: signal.signal(kind, enough) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _start(run: Run, root: Root, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "TESSERA_ROOT": root.url, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tessera.cli.beside", run.id],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
        )


def _say(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _until_the_end(pipe: IO[bytes], over: threading.Event) -> None:
    with suppress(OSError):
        while pipe.read(1):
            pass
    over.set()


def replay_beside(run_id: str) -> int:
    """Sync one run at the pace of the journal's uploads until standard input ends."""
    from tessera.storage import open_root
    from tessera.tracking.follow import follow
    from tessera.tracking.journal import heartbeat_s
    from tessera.tracking.merge import Annotations
    from tessera.tracking.readings import Reader
    from tessera.tracking.replay import SyncReport, sync

    with suppress(OSError):
        os.nice(_NICE)
    over = threading.Event()
    watch = (sys.stdin.buffer, over)
    threading.Thread(target=_until_the_end, args=watch, name="trainer", daemon=True).start()
    root = open_root(os.environ["TESSERA_ROOT"])
    annotations, reader = Annotations(root), Reader(root)

    def once() -> SyncReport:
        return sync(root, only=[run_id], annotations=annotations, reader=reader)

    def tell(report: SyncReport) -> str | None:
        lines = [*report.not_rebuilt, *report.damaged]
        if report.points:
            lines.insert(0, f"{report.points:,} points added in {report.seconds:.1f} s")
        return "\n".join(lines) or None

    def say(text: str) -> None:
        for line in text.splitlines():
            print(f"{strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)

    done = follow(once, every_s=heartbeat_s(), over=over, tell=tell, say=say)
    if not done:
        say(f"The last points are not in MLflow: {_LATER}.")
    return 0 if done else 75


def main() -> None:
    """Entry point of the process."""
    from tessera.errors import TesseraError

    try:
        code = replay_beside(sys.argv[1])
    except TesseraError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)  # a thread that reads from the trainer must not hold it


if __name__ == "__main__":
    main()
