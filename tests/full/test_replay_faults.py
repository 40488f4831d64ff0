"""Replay under real faults: after each of them MLflow has exactly the points that are due.

On SQLite and on PostgreSQL. Random moments come from seeds that a failure prints. Full databases
are real file systems of a fixed size, so these tests need root (`mount -t tmpfs`).
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tessera.errors import StoreError
from tessera.runs import Run, list_runs
from tessera.tracking.follow import follow
from tessera.tracking.records import segment_path
from tessera.tracking.replay import sync
from tests.full.replaying import (
    FAILED_CODE,
    Death,
    barrier,
    counter,
    require_exact,
    require_nothing_extra,
    start,
    there,
)
from tests.services.mlflow_server import FAULTS, MlflowServer, Unreliable, mlflow_server
from tests.services.postgres import Postgres, postgres
from tests.tracking.fabricate import empty_database

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench

KILLS = 50
"""On each kind of database."""
KILLS_A_ROUND = 5

NewDatabase = Callable[[], str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL with a database ``ready`` that has MLflow's schema."""
    from tessera.tracking.server import quiet

    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        server.run("createdb", "ready")
        with quiet():
            subprocess.run(
                [sys.executable, "-m", "mlflow", "db", "upgrade", server.uri("ready")],
                check=True, capture_output=True,
            )  # fmt: skip
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> NewDatabase:
    """Gives a database of its own with every call, its schema ready."""
    count = 0
    server: Postgres | None = None
    if request.param == "postgresql":
        server = request.getfixturevalue("cluster")

    def make() -> str:
        nonlocal count
        count += 1
        if server is not None:
            name = f"copy_{time.monotonic_ns()}"
            server.run("createdb", "-T", "ready", name)
            return server.uri(name)
        path = tmp_path / f"database-{count}" / "mlflow.db"
        path.parent.mkdir()
        shutil.copy(empty_database(), path)
        return f"sqlite:///{path}"

    return make


@pytest.fixture
def filled(bench: Bench) -> Bench:
    """Three runs: one rolled back and finished, one killed, one finished with odd numbers."""
    bench.clock.now = time.time() - 10_000
    run = bench.create("rolled", steps=40)
    first = bench.launch(run)
    first.evaluate(0, 6.0)
    first.steps(1, 20)
    first.checkpoint(20)
    first.steps(21, 27)
    first.kill()
    bench.clock.now += 500
    second = bench.launch(run, instance="i-2")
    second.steps(21, 40)
    second.evaluate(40, 2.0)
    second.checkpoint(40)
    second.end("FINISHED", 40)
    killed = bench.launch(bench.create("killed", steps=40), instance="i-3")
    killed.steps(1, 20)
    killed.checkpoint(20)
    killed.steps(21, 25)
    killed.kill()
    odd = bench.launch(bench.create("odd", steps=6), instance="i-4")
    for step, value in enumerate(("nan", "inf", "-inf", "5e-324", "-0.0", "1.5"), 1):
        odd.journal.metric("train/grad_norm", float(value), step)
    odd.steps(1, 6)
    odd.end("FINISHED", 6)
    bench.clock.now = time.time()
    return bench


def until_synced(bench: Bench, uri: str, *, tries: int = 300) -> int:
    """Sync until it works; returns how often it did not."""
    for failed in range(tries):
        try:
            sync(bench.root, uri)
        except StoreError:
            continue
        return failed
    raise AssertionError(f"no sync got through in {tries} tries")


# -- kills -------------------------------------------------------------------------------------


def test_killed_with_9_at_random_moments(filled: Bench, new_database: NewDatabase) -> None:
    uri, count = new_database(), counter()
    whole = start(filled.root, uri, count=count)
    whole.join(120)
    assert whole.exitcode == 0
    require_exact(filled.root, uri)
    batches = count.value
    assert batches > KILLS_A_ROUND
    in_the_middle = 0
    for number in range(KILLS // KILLS_A_ROUND):
        seed = 20261201 + number
        chance, uri = random.Random(seed), new_database()
        print(f"seed {seed}, {batches} batches undisturbed")
        for _ in range(KILLS_A_ROUND):
            death = Death(chance.randint(0, batches // 2), chance.uniform(0.0, 0.05))
            process = start(filled.root, uri, death=death)
            process.join(120)
            assert process.exitcode in (0, -signal.SIGKILL)
            in_the_middle += process.exitcode != 0
            require_nothing_extra(filled.root, uri)
        last = start(filled.root, uri)
        last.join(120)
        assert last.exitcode == 0
        require_exact(filled.root, uri)
    print(f"{in_the_middle} of {KILLS} kills found it at work")
    assert in_the_middle > KILLS // 4


def test_several_replayers_at_once(filled: Bench, new_database: NewDatabase) -> None:
    for number in range(4):
        uri = new_database()
        gate = barrier(3)
        processes = [start(filled.root, uri, barrier=gate) for _ in range(3)]
        for process in processes:
            process.join(120)
        codes = [process.exitcode for process in processes]
        assert set(codes) <= {0, FAILED_CODE}, (number, codes)
        assert 0 in codes, (number, codes)
        sync(filled.root, uri)
        require_exact(filled.root, uri)


# -- servers that fail ---------------------------------------------------------------------------


@pytest.fixture
def server(new_database: NewDatabase, tmp_path: Path) -> Iterator[MlflowServer]:
    """A real ``mlflow server`` on that database."""
    with mlflow_server(new_database(), tmp_path / "server") as found:
        yield found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute of real patience would be half a minute a fault."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.usefixtures("impatient")
def test_a_server_that_fails_in_every_way(
    filled: Bench, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.tracking.sending.BATCH", 20)
    seed = 7
    with Unreliable(server.url, seed) as front:
        front.rates = dict.fromkeys(FAULTS, 0.02) | {"hang": 0.01, "lost": 0.05}
        failed = until_synced(filled, front.url)
        print(f"seed {seed}: {failed} syncs failed, {dict(front.counts)}")
        assert failed
        front.rates = {}
        sync(filled.root, front.url)
        require_exact(filled.root, front.url)  # NaN and infinities too, over HTTP
        for fault in FAULTS:
            front.rates = {fault: 1.0}
            with pytest.raises(StoreError) as caught:
                sync(filled.root, front.url)
            assert "\n" not in str(caught.value)
        front.rates = {}
        assert sync(filled.root, front.url).points == 0
        require_exact(filled.root, front.url)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_killed_and_started_again_in_the_middle(
    filled: Bench, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.tracking.sending.BATCH", 5)
    over = threading.Event()
    said: list[str] = []
    follower = threading.Thread(
        target=follow,
        args=(lambda: sync(filled.root, server.url),),
        kwargs={"every_s": 0.2, "over": over, "say": said.append},
    )
    follower.start()
    deadline = time.monotonic() + 60
    while not any(there(server.url).values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.kill()
    while not said:
        time.sleep(0.05)
    server.start()
    over.set()
    follower.join(120)
    assert said[0].startswith("Paused: The tracking server")
    sync(filled.root, server.url)
    require_exact(filled.root, server.url)


# -- a database that is full -----------------------------------------------------------------------


@contextmanager
def small(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of a fixed size."""
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "none", str(folder)],
        check=True,
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> Path:
    """Leave ``left`` bytes free."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        free = shutil.disk_usage(folder).free - left
        file.write(b"\0" * max(0, free))
    return filler


def big(bench: Bench) -> Run:
    """A run whose points fill some megabytes."""
    bench.clock.now = time.time() - 10_000
    run = bench.create("big", steps=3000)
    writer = bench.launch(run)
    writer.steps(1, 3000)
    writer.end("FINISHED", 3000)
    return run


def require_full_then_whole(bench: Bench, uri: str, make_room: Callable[[], None]) -> None:
    with pytest.raises(StoreError, match=r"full|No space|disk") as caught:
        sync(bench.root, uri)
    assert "\n" not in str(caught.value)
    make_room()
    until_synced(bench, uri, tries=3)
    require_exact(bench.root, uri)


def test_sqlite_on_a_full_disk(bench: Bench, tmp_path: Path) -> None:
    big(bench)
    with small(tmp_path / "small", 20) as folder:
        shutil.copy(empty_database(), folder / "mlflow.db")
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        sync(bench.root, uri, only=[])  # the experiment
        filler = fill(folder, 300_000)
        require_full_then_whole(bench, uri, filler.unlink)


def test_postgresql_with_a_full_tablespace(
    bench: Bench, cluster: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> None:
    big(bench)
    place = Path(f"/tmp/tessera-tablespace-{time.monotonic_ns()}")
    try:
        with small(place, 60) as folder:
            inner = folder / "space"
            inner.mkdir()
            shutil.chown(inner, "postgres", "postgres")
            name = f"small{time.monotonic_ns()}"
            cluster.run("psql", "-d", "ready", "-c",
                        f"CREATE TABLESPACE {name} LOCATION '{inner}'")  # fmt: skip
            cluster.run("createdb", "-T", "ready", "-D", name, name)
            uri = cluster.uri(name)
            sync(bench.root, uri, only=[])
            filler = fill(folder, 500_000)
            require_full_then_whole(bench, uri, filler.unlink)
            cluster.run("dropdb", "--force", name)
            cluster.run("psql", "-d", "ready", "-c", f"DROP TABLESPACE {name}")
    finally:
        shutil.rmtree(place, ignore_errors=True)


# -- journals that are torn, late, or there twice --------------------------------------------------


def journal_of(run: Run) -> tuple[str, list[bytes]]:
    """The attempt of a run of one attempt, and its lines."""
    (attempt,) = run.attempts()
    data = run.root.read_bytes(segment_path(run, attempt.id, 0))
    return attempt.id, data.splitlines(keepends=True)


def test_journals_torn_late_and_uploaded_twice(filled: Bench, new_database: NewDatabase) -> None:
    root, uri = filled.root, new_database()
    runs = {run.record.name: run for run in list_runs(root)}
    odd = runs["odd"]
    attempt, lines = journal_of(odd)
    third = len(lines) // 3

    def put(number: int, part: list[bytes]) -> None:
        root.publish(segment_path(odd, attempt, number), b"".join(part))

    # Segments overlap: an upload that was repeated under the next number.
    put(0, lines[: 2 * third])
    put(1, lines[third:])
    assert sync(root, uri).damaged == ()
    require_exact(root, uri)
    # Late: the middle is not there yet, so the run is told and left as it is.
    uri = new_database()
    put(0, lines[:third])
    put(1, lines[2 * third :])
    (told,) = sync(root, uri).damaged
    assert "restore the attempt's segments" in told
    put(2, lines[2 * third :])
    put(1, lines[third : 2 * third])
    assert sync(root, uri).damaged == ()
    require_exact(root, uri)
    # Torn: the last line of a killed attempt's last segment is half there.
    killed = runs["killed"]
    attempt, lines = journal_of(killed)
    whole = b"".join(lines)
    root.publish(segment_path(killed, attempt, 0), whole[:-20])
    for database in (uri, new_database()):
        assert sync(root, database).damaged == ()
        require_exact(root, database)
    # Torn earlier, it is damaged: what MLflow has stays, and the rest comes when it is mended.
    root.publish(segment_path(killed, attempt, 0), whole.replace(b'"step":7,', b'"step:7,'))
    assert len(sync(root, uri).damaged) == 1
    root.publish(segment_path(killed, attempt, 0), whole)
    assert sync(root, uri).damaged == ()
    require_exact(root, uri)


def test_each_step_of_the_surviving_lineage_once(filled: Bench, new_database: NewDatabase) -> None:
    import mlflow

    uri = new_database()
    sync(filled.root, uri)
    mlflow.set_tracking_uri(uri)
    try:
        table = mlflow.search_runs(
            experiment_names=["tessera"], filter_string="tags.`tessera.name` = 'rolled'"
        )
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    assert len(table) == 1
    run_id = str(table.loc[0, "run_id"])
    history = mlflow.MlflowClient(uri).get_metric_history(run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, 41))
    by_step = {point.step: point.value for point in history}
    assert by_step[20] == 10.0 / 20 + 0.001
    assert by_step[21] == 10.0 / 21 + 0.002
