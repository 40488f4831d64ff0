"""The demo as a newcomer runs it: killed, run again, run a third time, and once more from nothing.

Run by ``.ci/run`` after ``make test``: ``.venv/bin/python tests/lanes/demo_lane.py``. Not collected
by pytest: it takes minutes and uses the checkout's own ``.venv``. Ends with a line that counts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = CHECKOUT / ".venv" / "bin"
LIMIT_S = 240.0
"""The demo's promise on two idle cores; printed beside what it took, never asserted."""
PATIENCE_S = 1500.0
"""Until a demo on a machine that is busy with other things is given up."""


def run_demo(environment: dict[str, str]) -> float:
    """``make demo`` to its end; returns the seconds it took."""
    started = time.monotonic()
    subprocess.run(["make", "demo"], cwd=CHECKOUT, env=environment, check=True)
    return time.monotonic() - started


def kill_in_mid_training(environment: dict[str, str], root: Path) -> str:
    """Start the demo, kill -9 the trainer after its second checkpoint; returns the run's id."""
    demo = subprocess.Popen(["make", "demo"], cwd=CHECKOUT, env=environment)
    deadline = time.monotonic() + PATIENCE_S
    while len(list(root.glob("runs/smoke-*/checkpoints/*/COMPLETE"))) < 2:
        if demo.poll() is not None:
            raise AssertionError("the demo ended before its second checkpoint")
        if time.monotonic() > deadline:
            kill_trainer(demo.pid)
            raise AssertionError(f"no second checkpoint after {PATIENCE_S:.0f} s")
        time.sleep(0.1)
    kill_trainer(demo.pid)
    assert demo.wait(60) != 0, "a demo whose trainer was killed must not succeed"
    (run,) = root.glob("runs/smoke-*")
    return run.name


def kill_trainer(demo: int) -> None:
    """-9 to the trainer among the processes that the demo started."""
    for process in psutil.Process(demo).children(recursive=True):
        if "train" in process.cmdline():
            process.send_signal(signal.SIGKILL)


def records(root: Path, run_id: str) -> list[dict[str, Any]]:
    """Every journal record of a run, read without the package."""
    lines: list[dict[str, Any]] = []
    for segment in sorted((root / "runs" / run_id / "journal").glob("*/*.jsonl")):
        lines += [json.loads(line) for line in segment.read_text().splitlines()]
    return lines


def surviving(root: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric on the surviving lineage: attempt n up to where n + 1 resumed."""
    attempts: dict[str, dict[str, Any]] = {}
    for path in (root / "runs" / run_id / "attempts").glob("*.json"):
        if not path.name.endswith(".end.json"):
            attempts[path.stem] = json.loads(path.read_text())
    upto = dict.fromkeys(attempts, math.inf)
    for attempt in attempts.values():
        if resumed := attempt["resumed_from"]:
            upto[resumed["attempt"]] = resumed["step"]
    return [
        (r["step"], r["value"])
        for r in records(root, run_id)
        if r["key"] == key and r["step"] <= upto[r["attempt"]]
    ]


def tessera_exp(root: Path, *arguments: str) -> Any:
    """The JSON that ``tessera-exp`` prints."""
    command = [str(BIN / "tessera-exp"), *arguments, "--json", "--root", str(root)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def check_base(root: Path, rows: list[dict[str, Any]], killed: str) -> None:
    """One base run below the unigram entropy, continued after the kill under the same id."""
    (base,) = [row for row in rows if row["kind"] == "pretrain"]
    assert base["run_id"] == killed
    assert base["status"] == "finished"
    assert base["attempts"] == 2, f"expected the killed attempt and its successor: {base}"
    entropies = [r["value"] for r in records(root, killed) if r["key"] == "eval/unigram_entropy"]
    assert base["final_loss"] < entropies[-1], (base["final_loss"], entropies[-1])
    second = [
        json.loads(path.read_text())
        for path in (root / "runs" / killed / "attempts").glob("2-*.json")
        if not path.name.endswith(".end.json")
    ]
    assert second[0]["resumed_from"]["step"] > 0, "the second attempt started from zero"


def check_voices(root: Path, rows: list[dict[str, Any]]) -> None:
    """Two voices that beat the base on held-out conversations; figures equal the journal's."""
    voices = [row for row in rows if row["kind"] == "sft"]
    assert len(voices) == 2
    for row in voices:
        evals = [r for r in records(root, row["run_id"]) if r["key"] == "eval/loss"]
        assert row["final_loss"] == evals[-1]["value"]
        assert row["final_loss"] < evals[0]["value"], "the voice is no better than its base"
        assert evals[0]["step"] == 0
        assert row["base"].startswith("smoke-")
    for row in rows:
        assert row["tokens"] > 0
        assert row["tokens_per_s"] > 0
        assert math.isclose(row["cost_usd"], 0.05 * row["wall_s"] / 3600, rel_tol=0.02), row
    promoted = [row for row in rows if row["aliases"].get("champion")]
    assert len(promoted) == 1, "one adapter is the champion"
    assert promoted[0]["kind"] == "sft"


def check_mlflow(root: Path, rows: list[dict[str, Any]]) -> None:
    """MLflow, read by its own client, holds the same points; the champion loads and answers."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["TESSERA_ROOT"] = str(root)
    import mlflow

    uri = f"sqlite:///{root}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    for row in rows:
        (run,) = client.search_runs(
            [e.experiment_id for e in client.search_experiments()],
            f"tags.`tessera.run_id` = '{row['run_id']}'",
        )
        due = {
            (r["step"], r["value"])
            for r in records(root, row["run_id"])
            if r["key"] == "train/loss"
        }
        shown = {
            (m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")
        }
        assert shown == due, f"{row['run_id']}: MLflow and the journal differ"
        assert run.info.status == "FINISHED"
    model = mlflow.pyfunc.load_model("models:/tessera-adapter@champion")
    (answer,) = model.predict(["hello there"])
    assert isinstance(answer, str)
    assert answer.strip(), "the champion said nothing"
    print(f"the champion, asked 'hello there', says: {answer!r}")


def main() -> None:
    """The demos and the checks; a failure is an exception and exit code 1."""
    folder = Path(tempfile.mkdtemp(prefix="tessera-demo-"))
    root = folder / "root"
    environment = {**os.environ, "TESSERA_DEMO_ROOT": str(root), "TESSERA_CACHE": str(folder / "c")}
    passed = 0

    def check(name: str, action: Callable[[], None]) -> None:
        nonlocal passed
        action()
        passed += 1
        print(f"ok: {name}", flush=True)

    try:
        killed = kill_in_mid_training(environment, root)
        print(f"killed {killed}; running the demo again", flush=True)
        run_demo(environment)
        rows = tessera_exp(root, "list")
        again = run_demo(environment)
        assert tessera_exp(root, "list") == rows, "a second demo changed the figures"
        check("base run continued after kill -9", lambda: check_base(root, rows, killed))
        check("two voices, one promoted", lambda: check_voices(root, rows))
        check("MLflow equals the journal", lambda: check_mlflow(root, rows))
        fresh = run_demo({**environment, "TESSERA_DEMO_ROOT": str(folder / "fresh")})
        print(
            f"a fresh demo took {fresh:.0f} s, one that reuses {again:.0f} s ({LIMIT_S:.0f} s due)"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{passed} passed, 0 failed")


if __name__ == "__main__":
    main()
