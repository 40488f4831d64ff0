"""How fast a run's points reach MLflow, against a bare loop of ``log_batch`` in the same process.

    python benchmarks/replay_speed.py                      # 2 million points, both databases
    python benchmarks/replay_speed.py --points 100000 --database sqlite

The run is made of real journal segments in a folder: ten metrics a log point, two spans, one
rollback, checkpoints. The bare loop sends the same points, made on the fly, to a run of another
new database. Each round does both, and the order changes from round to round; the ratio is that of
the medians. CPU time is the measured process's own, which others on the machine disturb less. Peak
memory is that of a process which does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

from tessera.cli.common import run_script
from tessera.experiment import parse_experiment
from tessera.runs import Attempt, Ending, Run, create_or_open, list_runs
from tessera.storage import Root
from tessera.tracking.records import segment_path
from tessera.tracking.replay import sync
from tessera.tracking.server import connect, quiet
from tests.services.postgres import Postgres, postgres
from tests.tracking.fabricate import pretraining

KEYS = (*(f"train/metric_{number}" for number in range(9)), "train/loss")
SEGMENT = 4 << 20
BEGAN = 1_700_000_000.0


def value_of(key: int, step: int) -> float:
    """Some figure with as many digits as a loss has."""
    return 1.0 + key + 1.0 / step


def fabricate(root: Root, points: int) -> None:
    """A finished run of so many points by two attempts, the first of which lost a tenth."""
    steps = points // len(KEYS)
    half, lost = steps // 2, steps // 20
    run, _ = create_or_open(
        root, parse_experiment(pretraining("long", steps)), fingerprint="f" * 64, data={},
        base=None, commit="abc123",
    )  # fmt: skip
    attempt = Attempt(
        number=0, token="", started_at=BEGAN, provider="vast", instance="i-1", host="box",
        device="H200", devices=1, usd_per_hour=3.6, price_source="provider", billed_from=BEGAN,
        billed_from_source="provider",
    )  # fmt: skip
    first = run.start_attempt(attempt, None)
    write_journal(run, first.id, 1, half + lost)
    root.publish(run.path("checkpoints", f"step-{half}-{first.id}", "COMPLETE"), b"")
    second = run.start_attempt(attempt, run.furthest())
    records = write_journal(run, second.id, half + 1, steps)
    ended = BEGAN + steps
    run.end_attempt(second, Ending("FINISHED", 0, ended, steps, records=records))


def write_journal(run: Run, attempt: str, begin: int, end: int) -> int:
    """Steps ``begin`` to ``end`` as the journal writes them; returns how many records."""
    number, seq, lines, size = 0, 0, [], 0
    for step in range(begin, end + 1):
        metrics = [("metric", key, value_of(place, step)) for place, key in enumerate(KEYS)]
        for kind, key, value in (*metrics, ("span", "train", 0.9), ("span", "data_wait", 0.1)):
            seq += 1
            line = {"kind": kind, "key": key, "value": value, "step": step, "time": BEGAN + step}
            line |= {"attempt": attempt, "seq": seq}
            lines.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            size += len(lines[-1])
        if size >= SEGMENT or step == end:
            run.root.publish(segment_path(run, attempt, number), b"".join(lines))
            number, lines, size = number + 1, [], 0
    return seq


def bare(root: Root, uri: str, points: int) -> tuple[float, int]:
    """Seconds and points of a loop that sends the lineage's points and nothing else."""
    from mlflow.entities import Metric

    server = connect(root, uri)
    run_id = server.client.create_run(server.experiment_id).info.run_id
    began, batch, sent = time.perf_counter(), [], 0
    with quiet():
        for step in range(1, points // len(KEYS) + 1):
            for place, key in enumerate(KEYS):
                at = round((BEGAN + step) * 1000)
                batch.append(Metric(key, value_of(place, step), at, step))
                if len(batch) == 1000:
                    server.client.log_batch(run_id, metrics=batch)
                    sent += len(batch)
                    batch = []
        if batch:
            server.client.log_batch(run_id, metrics=batch)
            sent += len(batch)
    return time.perf_counter() - began, sent


def replay(root: Root, uri: str, points: int) -> tuple[float, int]:
    """Seconds and points of a whole ``sync``: reading, summaries, params, tags and points."""
    began = time.perf_counter()
    report = sync(root, uri)
    if report.points != points:
        raise SystemExit(f"the sync sent {report.points} points, expected {points}")
    return time.perf_counter() - began, report.points


@contextmanager
def databases(kind: str, folder: Path) -> Iterator[Postgres | None]:
    """The server of that kind; SQLite has none."""
    with postgres(folder) if kind == "postgresql" else nullcontext() as server:
        yield server


def alone(what: str, root: Root, uri: str, points: int) -> dict[str, float]:
    """``what`` in a process of its own: seconds, points a second, and its peak memory in MiB."""
    command = [sys.executable, __file__, "--one", what, "--root", root.url, "--uri", uri]
    command += ["--points", str(points)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(what: str, root: Root, uri: str, points: int) -> None:
    """The measured process."""
    connect(root, uri)  # MLflow's import and the schema are not what is measured
    began = time.process_time()
    seconds, sent = {"bare": bare, "replay": replay}[what](root, uri, points)
    cpu = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {"seconds": seconds, "points_per_s": sent / seconds, "cpu_s": cpu, "peak_mib": peak}
        )
    )


def measure(kind: str, points: int, rounds: int, folder: Path) -> None:
    """Both ways into one kind of database, ``rounds`` times; prints a line each and the ratio."""
    root = Root(str(folder / "root"))
    found: dict[str, list[dict[str, float]]] = {"bare": [], "replay": []}
    with databases(kind, folder / "cluster") as server:
        for number in range(rounds):
            for what in ("bare", "replay") if number % 2 == 0 else ("replay", "bare"):
                name = folder / f"{kind}-{number}-{what}.db"
                uri = server.new_database() if server else f"sqlite:///{name}"
                figures = alone(what, root, uri, points)
                found[what].append(figures)
                rate, seconds = figures["points_per_s"], figures["seconds"]
                print(
                    f"{kind:10} {what:6} {rate:8,.0f} points/s {seconds:7.1f} s, "
                    f"CPU {figures['cpu_s']:.1f} s, peak {figures['peak_mib']:,.0f} MiB",
                    flush=True,
                )
                name.unlink(missing_ok=True)
    speed = {w: statistics.median(f["points_per_s"] for f in found[w]) for w in found}
    cpu = {w: statistics.median(f["cpu_s"] for f in found[w]) for w in found}
    print(
        f"{kind:10} ratio {speed['replay'] / speed['bare']:.3f}, "
        f"of CPU time {cpu['bare'] / cpu['replay']:.3f}",
        flush=True,
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Points a second into MLflow.")
    parser.add_argument("--points", type=int, default=2_000_000, help="of the run's lineage")
    parser.add_argument("--rounds", type=int, default=1, help="of each way and database")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], help="only this one")
    parser.add_argument("--one", choices=["bare", "replay"], help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one, Root(given.root), given.uri, given.points)
        return
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
    libraries = f"mlflow {version('mlflow')}, SQLAlchemy {version('sqlalchemy')}"
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"Python {platform.python_version()}, {libraries}, {load}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fabricate(Root(str(folder / "root")), given.points)
        (run,) = list_runs(Root(str(folder / "root")))
        size = sum(run.root.size(path) for path in run.root.files(run.path("journal")))
        print(f"{given.points:,} points, {size / 1e6:,.0f} MB of journal", flush=True)
        for kind in ("sqlite", "postgresql"):
            if given.database in (None, kind):
                measure(kind, given.points, given.rounds, folder)


if __name__ == "__main__":
    sys.exit(run_script(main))
