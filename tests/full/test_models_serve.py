"""Stock MLflow reads and serves what was promoted: `search_runs`, `mlflow models serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlflow

from tessera.promotion.registry import promote
from tessera.storage import Root
from tessera.tracking.replay import sync
from tests.tracking.fabricate import Bench, bench

__all__ = ["bench"]
READY_S = 240.0


def test_a_promoted_voice_is_served_and_its_run_is_found(
    bench: Bench,
) -> None:
    run = bench.with_adapter()
    root = Root(bench.root.url)
    sync(root, bench.uri)
    promotion = promote(root, run, "ep1", "champion", "only a rehearsal", bench.uri)
    expected = mlflow_predict(bench.uri, promotion.uri, "walk")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", promotion.uri, "--env-manager",
        "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    log = bench.folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={
                **os.environ, "MLFLOW_TRACKING_URI": bench.uri,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it runs uvicorn
            },
        )  # fmt: skip
    try:
        wait_until_ready(process, port, log)
        answer = ask(port, {"inputs": ["walk"]})
        assert answer["predictions"] == expected
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    frame = mlflow.search_runs(experiment_names=["tessera"])
    (row,) = frame[frame["tags.tessera.run_id"] == run.id].to_dict("records")
    assert row["metrics.final/loss"] == 3.5
    assert row["params.lora.rank"] == "2"
    assert row["status"] == "FINISHED"


def mlflow_predict(uri: str, model: str, prompt: str) -> Any:
    mlflow.set_tracking_uri(uri)
    return mlflow.pyfunc.load_model(model).predict([prompt])


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"not ready after {READY_S:.0f} s: {log.read_text()[-3000:]}")


def ask(port: int, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
        return found
