"""``tessera train`` with MLFLOW_TRACKING_URI: a replayer beside it, for which nobody waits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tessera.cli import beside
from tessera.runs import list_runs

if TYPE_CHECKING:
    from tests.training.conftest import Bench


def processes(run_id: str) -> list[int]:
    """Replayers of that run that live."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"tessera.cli.beside" in words and run_id.encode() in words:
                found.append(int(folder.name))
    return found


@contextmanager
def silence() -> Iterator[str]:
    """The URI of a server that takes every connection and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_run_is_in_mlflow_when_the_command_is_done(
    bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{bench.folder}/mlflow.db"
    subprocess.run(  # the schema, which takes longer than the run
        [sys.executable, "-c", "import mlflow; mlflow.MlflowClient().search_experiments()"],
        env={**os.environ, "MLFLOW_TRACKING_URI": uri}, check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv(beside.URI_VARIABLE, uri)
    monkeypatch.setattr(beside, "GRACE_S", 60.0)
    done = bench.command(capfd)
    assert done.code == 0, done.err
    assert "MLflow follows this run" in done.err
    (run,) = list_runs(bench.root)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tessera")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.data.tags["tessera.run_id"], found.info.status) == (run.id, "FINISHED")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(3, 31, 3))
    assert processes(run.id) == []


def test_a_server_that_hangs_costs_the_trainer_no_more_than_the_grace(
    bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with silence() as uri:
        monkeypatch.setenv(beside.URI_VARIABLE, uri)
        monkeypatch.setattr(beside, "GRACE_S", 1.0)
        began = time.monotonic()
        done = bench.command(capfd)
        assert done.code == 0, done.err
        assert time.monotonic() - began < 30
        (run,) = list_runs(bench.root)
        for pid in processes(run.id):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_trainer_takes_its_replayer_along(bench: Bench) -> None:
    with silence() as uri:
        bench.environ = {beside.URI_VARIABLE: uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
        process = bench.start("--set", "tokens=2560000")
        bench.until(process, lambda: bool(bench.runs()) and bool(processes(bench.runs()[0].id)))
        run = bench.runs()[0]
        bench.kill(process)
        deadline = time.monotonic() + 60
        while processes(run.id):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("uri", "installed", "said"),
    [("databricks", True, "no server and no database"), ("http://x:1", False, "is not installed")],
)
def test_where_it_cannot_run_a_line_says_what_does_it_later(
    bench: Bench,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    installed: bool,
    said: str,
) -> None:
    monkeypatch.setenv(beside.URI_VARIABLE, uri)
    if not installed:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    done = bench.command(capfd)
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "tessera-exp sync" in line]
    assert said in line
    assert processes(bench.runs()[0].id) == []


def test_without_the_variable_nothing_is_started_or_said(
    bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(beside.URI_VARIABLE, raising=False)
    done = bench.command(capfd)
    assert "MLflow" not in done.err


def test_told_to_go_while_it_waits_ends_the_wait_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is settled by then: a finished run must not leave with 75."""
    import threading

    monkeypatch.setattr(beside, "GRACE_S", 60.0)
    follower = beside.Beside(bench.root)
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE) as process:
        follower._process = process
        before = signal.getsignal(signal.SIGTERM)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        follower.__exit__(None, None, None)
        assert time.monotonic() - began < 50
        assert signal.getsignal(signal.SIGTERM) is before
        timer.join()
        process.kill()
