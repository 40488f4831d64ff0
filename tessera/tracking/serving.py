"""``mlflow server`` as a child process: lean, awaited until it answers, stopped with its children.

As it comes, MLflow's server takes 15 processes, 1.8 GB and 20 s to start. Without its job queue
and with one worker it is 2 processes, 0.4 GB and 5 s, and serves a few people as well.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tessera.errors import InputError, StoreError

PATIENCE_S = 120.0
"""How long a start may take: a database's first schema and a busy machine."""
_STOP_S = 15.0
LEAN = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Running:
    """A server that answers; ``log`` is what it prints."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def ended_within(self, seconds: float) -> bool:
        """Whether it ends by itself in that time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self) -> None:
        """Until it ends by itself, which is an error: ``StoreError`` with its last words."""
        code = self.process.wait()
        raise StoreError(
            f"The MLflow server ended by itself with code {code} ({last_words(self.log)}); see "
            f"{self.log}."
        )


def require_mlflow() -> None:
    """Raise ``InputError`` where MLflow is not installed, without importing it."""
    if find_spec("mlflow") is None:
        raise InputError("MLflow is not installed; run pip install 'tessera[tracking]'.")


def choose_port(wanted: int | None, host: str = "127.0.0.1") -> int:
    """``wanted``, or any free port; ``InputError`` if something listens on ``wanted``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted or 0))
        except OSError as error:
            raise InputError(
                f"Port {wanted} of {host} cannot be used ({error.strerror}); choose another with "
                "--port, or stop what listens there."
            ) from error
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(
    arguments: Sequence[str],
    *,
    host: str,
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Run ``mlflow server`` with ``arguments``; yields once it answers, stops it on the way out.

    Raises ``StoreError`` with the last line of ``log`` if it ends or is silent for ``PATIENCE_S``.
    """
    require_mlflow()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)),
        *("--workers", "1", *arguments),
    ]
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**kept, **LEAN, **(environment or {})},
            cwd=log.parent,  # whatever it leaves behind
            start_new_session=True,  # Ctrl-C is ours to handle, and its children are one group
        )
    try:
        local = "127.0.0.1" if host == "0.0.0.0" else host
        running = Running(process, f"http://{local}:{port}", log)
        _await(running)
        yield running
    finally:
        stop_group(process)


def _await(running: Running) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not _healthy(running.url):
        ended = running.process.poll() is not None
        if ended or time.monotonic() > deadline:
            what = "ended before it answered" if ended else f"did not answer in {PATIENCE_S:.0f} s"
            raise StoreError(
                f"The MLflow server {what} ({last_words(running.log)}); see {running.log}."
            )
        time.sleep(0.1)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def last_words(log: Path) -> str:
    """The last line of a log that says something, at most 200 characters."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "it said nothing")


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and the whole group; a second Ctrl-C does not hinder it."""
    with _deaf():
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + _STOP_S
            while time.monotonic() < deadline and _alive(process):
                time.sleep(0.05)
        process.wait()


@contextmanager
def _deaf() -> Iterator[None]:
    """Nothing interrupts the body (signals reach the main thread alone)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps it, else it would stay in its group for ever
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the body like Ctrl-C, so that what it started is stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
