"""``tessera-exp list`` of 1,000 runs with 30 metrics each, beside MLflow's own ways to list them.

    python -m benchmarks.list_speed                 # about five minutes, most of it preparation
    python -m benchmarks.list_speed --runs 200

The runs are made up by the project's own writers. Each command is a process of its own, started
anew every time; of ``--repeats`` times the median counts. In the same run:

* our list, 50 rows shown, on the folder and on the same root in an S3 server (HTTP), each the first
  time on a machine and again;
* ``MlflowClient.search_runs`` of the same 50 rows on SQLite and over HTTP, with the import;
* ``mlflow runs list``, which prints names and ids only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tessera.runs import Attempt, Ending, RunRecord
from tessera.storage import Root, canonical_json
from tests.services.stores import serve

ROWS = 50
_METRICS = [f"eval/extra_{number:02d}" for number in range(24)]
_OURS = [sys.executable, "-c", "from tessera.cli.exp import main; main()", "list"]
_SHOWN = ["--limit", str(ROWS), "--sort", "cost"]
_SEARCH = """
import sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
page = client.search_runs([sys.argv[2]], max_results=50, order_by=["metrics.`final/cost_usd` ASC"])
assert len(page) == 50, len(page)
for run in page:
    print(run.info.run_name, run.data.metrics["final/loss"], run.data.metrics["final/cost_usd"])
"""


def main() -> None:
    """Prepare, measure, print a table with ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        said(f"making {chosen.runs} runs")
        root = Root(str(folder / "root"))
        for number in range(chosen.runs):
            make_run(root, number)
        with serve("moto", folder / "moto") as store:
            environment = {**os.environ, **store.environment()}
            os.environ.update(store.environment())
            said("copying them into an S3 server")
            remote = Root(store.url("root"))
            copy(root, remote)
            said("replaying them into MLflow")
            uri = f"sqlite:///{folder / 'mlflow.db'}"
            sync = [*_OURS[:-1], "sync", "--root", root.url, "--tracking-uri", uri]
            subprocess.run(sync, check=True, env=environment)
            with mlflow_server(uri) as http:
                show(measure(folder, environment, root, remote, uri, http, chosen.repeats))


def make_run(root: Root, number: int) -> None:
    """One finished run: 20 log points, 2 evaluations, 30 metrics, one attempt."""
    run_id, token, began = f"sweep-{number:08x}", f"{number:08x}", 1_700_000_000.0 + 1000 * number
    record = RunRecord(
        run_id, "sweep", "pretrain", began, {"name": "sweep", "kind": "pretrain", "seed": number},
        {"seed": number}, "f" * 64, {}, "abc123",
    )  # fmt: skip
    attempt = Attempt(
        1, token, began, "vast", f"i-{number}", "box", "H100", 1, 2.0 + number % 7 / 10, "provider",
        began, "provider",
    )  # fmt: skip
    lines, seq = [], 0

    def add(kind: str, key: str, value: float, step: int) -> None:
        nonlocal seq
        seq += 1
        lines.append({
            "kind": kind, "key": key, "value": value, "step": step, "time": began + step,
            "attempt": attempt.id, "seq": seq,
        })  # fmt: skip

    for step in range(10, 201, 10):
        for key in ("train/loss", "train/grad_norm", "train/lr", "progress/tokens"):
            add("metric", key, float(step), step)
        add("span", "train", 9.0, step)
    for step in (100, 200):
        add("metric", "eval/loss", 4.0 - step / 200 - number / 1e4, step)
        add("metric", "eval/unigram_entropy", 6.2, step)
        for key in _METRICS:
            add("metric", key, number + step, step)
    journal = b"".join(canonical_json(line) + b"\n" for line in lines)
    ending = Ending("FINISHED", 0, began + 210, 200, records=len(lines))
    for path, data in (
        ("run.json", canonical_json(asdict(record))),
        (f"attempts/{attempt.id}.json", canonical_json(asdict(attempt))),
        (f"attempts/{attempt.id}.end.json", canonical_json(asdict(ending))),
        (f"journal/{attempt.id}/000000.jsonl", journal),
        (f"checkpoints/step-200-{attempt.id}/COMPLETE", b""),
    ):
        root.publish(f"runs/{run_id}/{path}", data)


def copy(source: Root, target: Root) -> None:
    """Every object, a few at a time."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda p: target.publish(p, source.read_bytes(p)), source.files("runs")))


@contextmanager
def mlflow_server(uri: str) -> Iterator[str]:
    """A lean server on a free port."""
    import socket
    import urllib.request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers",
               "1", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def measure(
    folder: Path, environment: Mapping[str, str], root: Root, remote: Root, uri: str, http: str,
    repeats: int,
) -> dict[str, float]:  # fmt: skip
    """Seconds of each way to list, the median of ``repeats`` processes."""
    from mlflow import MlflowClient

    experiment = MlflowClient(uri).get_experiment_by_name("tessera")
    assert experiment is not None
    cache = folder / "cache"
    found: dict[str, float] = {}

    def ask(name: str, command: list[str], *, forget: bool = False, times: int = repeats) -> None:
        taken = []
        for _ in range(times):
            if forget:
                shutil.rmtree(cache, ignore_errors=True)
            began = time.perf_counter()
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL,
                env={**environment, "TESSERA_CACHE": str(cache), "COLUMNS": "160"},
            )  # fmt: skip
            taken.append(time.perf_counter() - began)
        found[name] = statistics.median(taken)
        said(f"{name}: {found[name]:.2f} s")

    for name, place in (("folder", root.url), ("S3 over HTTP", remote.url)):
        command = [*_OURS, *_SHOWN, "--root", place]
        ask(f"tessera-exp list, {name}, first time", command, forget=True, times=1)
        ask(f"tessera-exp list, {name}", command)
    for name, place in (("SQLite", uri), ("HTTP", http)):
        command = [sys.executable, "-c", _SEARCH, place, experiment.experiment_id]
        ask(f"MlflowClient.search_runs, {name}", command)
    listing = [sys.executable, "-m", "mlflow", "runs", "list", "--experiment-id"]
    os.environ["MLFLOW_TRACKING_URI"] = uri
    environment = {**environment, "MLFLOW_TRACKING_URI": uri}
    ask("mlflow runs list, SQLite", [*listing, experiment.experiment_id], times=1)
    return found


def show(found: Mapping[str, float]) -> None:
    """Each beside MLflow's client on SQLite."""
    bare = found["MlflowClient.search_runs, SQLite"]
    table = Table(title="50 rows", title_justify="left")
    for name in ("way", "s", "of MlflowClient on SQLite"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / bare:.2f}x")
    Console(width=100, highlight=False).print(table)


def said(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
