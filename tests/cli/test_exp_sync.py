"""``tessera-exp sync``: what it says, and ``--follow`` as a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tessera.cli.common import run_command
from tessera.cli.exp import exp

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench

EXP = "from tessera.cli.exp import main; main()"
CHECKOUT = Path(__file__).parents[2]


def test_what_is_not_rebuilt_is_printed(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    run = bench.finished()
    arguments = ["sync", "--root", bench.root.url, "--tracking-uri", bench.uri]
    assert run_command(exp, arguments) == 0
    client = MlflowClient(bench.uri)
    (found,) = client.search_runs(["1"]) or client.search_runs(["2"])
    client.set_tag(found.info.run_id, "mlflow.note.content", "from the UI")
    client.set_tag(found.info.run_id, "odd:key", "x")
    capfd.readouterr()
    assert run_command(exp, arguments) == 0
    out, err = capfd.readouterr()
    assert "1 edit taken over from MLflow" in out
    assert f"Not rebuilt: Run {run.id}: tag 'odd:key' of MLflow is in no record" in out
    assert err == ""


def test_one_run_can_be_named(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.finished("one")
    bench.finished("two")
    arguments = ["sync", "--root", bench.root.url, "--tracking-uri", bench.uri, "--run", "one"]
    assert run_command(exp, arguments) == 0
    assert "Synced 1 run " in capfd.readouterr().out


def test_until_finished_needs_a_run(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(exp, ["sync", "--root", bench.root.url, "--until-finished"]) == 2
    assert "give --follow and --run RUN" in capfd.readouterr().err


class Follower:
    """``tessera-exp sync --follow`` in a process, its stderr collected."""

    def __init__(self, bench: Bench, uri: str, *extra: str) -> None:
        command = [sys.executable, "-c", EXP, "sync", "--follow", "--every", "0.1", *extra]
        command += ["--root", bench.root.url, "--tracking-uri", uri]
        self.process = subprocess.Popen(
            command, cwd=CHECKOUT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def until(self, text: str) -> None:
        wait_until(lambda: any(text in line for line in self.lines), lambda: str(self.lines))

    def end(self) -> int:
        code = self.process.wait(60)
        self._reader.join(10)
        return code


def wait_until(reached: Callable[[], bool], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


@pytest.fixture
def now(bench: Bench) -> None:
    """The followers live in processes with the real clock."""
    bench.clock.now = time.time()


@pytest.mark.usefixtures("now")
def test_it_follows_until_the_run_has_ended(bench: Bench) -> None:
    run = bench.create(steps=20)
    follower = Follower(bench, bench.uri, "--run", "base", "--until-finished")
    writer = bench.launch(run)
    writer.steps(1, 10)
    writer.checkpoint(10)
    follower.until("20 points added")
    writer.steps(11, 20)
    bench.clock.now = time.time()
    writer.end("FINISHED", 20)
    assert follower.end() == 0
    assert len(bench.seen(bench.uri).values(run.id, "train/loss")) == 20
    assert bench.seen(bench.uri).runs[run.id][0] == "FINISHED"


@pytest.mark.usefixtures("now")
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_it_waits_for_a_run_and_leaves_when_told(bench: Bench, kind: signal.Signals) -> None:
    bench.create("another")
    follower = Follower(bench, bench.uri, "--run", "base")
    follower.until("No run is called 'base'")
    bench.finished()
    follower.until("1 new")
    follower.process.send_signal(kind)
    assert follower.end() == 0
    assert follower.lines[-1].endswith("Stopped; the next sync goes on from here.")
    assert not any("Traceback" in line for line in follower.lines)


class Refusing(BaseHTTPRequestHandler):
    """A server that answers everything with one status."""

    status = 500

    def answer(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass

    do_GET = do_POST = answer  # noqa: N815


@pytest.mark.usefixtures("now")
@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_server_that_refuses_pauses_it(bench: Bench, status: int) -> None:
    bench.finished()
    handler = type("Handler", (Refusing,), {"status": status})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        follower = Follower(bench, f"http://127.0.0.1:{server.server_address[1]}")
        follower.until("Paused: The tracking server")
        time.sleep(1.0)
        follower.process.terminate()
        assert follower.end() == 0
        server.shutdown()
    assert len([line for line in follower.lines if "Paused" in line]) == 1, follower.lines


def test_several_that_open_a_new_database_at_once(bench: Bench) -> None:
    command = [sys.executable, "-c", EXP, "sync", "--root", bench.root.url]
    command += ["--tracking-uri", f"sqlite:///{bench.folder}/fresh/mlflow.db"]
    bench.finished()
    processes = [
        subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
