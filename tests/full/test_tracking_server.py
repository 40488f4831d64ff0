"""The team server as it is used: PostgreSQL, accounts, models in a bucket, backup and restore."""

from __future__ import annotations

import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tessera.cli.common import run_command
from tessera.cli.exp import exp
from tessera.storage import Root
from tessera.tracking.cluster import Cluster
from tests.services.stores import Store, s3_client, serve
from tests.services.team import Team, open_folder, team_up
from tests.tracking.fabricate import Bench, bench

__all__ = ["bench"]

_SIGNS = ("syncing ", "starting ")
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with serve("moto", tmp_path_factory.mktemp("moto")) as store:
        yield store


@pytest.fixture
def there(bench: Bench, bucket: Store, prefix: str) -> Bench:
    """A root in the bucket."""
    for name, value in bucket.environment().items():
        bench.monkeypatch.setenv(name, value)
    bench.root = Root(bucket.url(prefix))
    return bench


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as place:
        yield place / "tracking-server"


@pytest.fixture
def shell(there: Bench, capfd: pytest.CaptureFixture[str]) -> Shell:
    """``tessera-exp`` on that root: code, stdout, and stderr without signs of progress."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command(exp, [*arguments, "--root", there.root.url])
        out, err = capfd.readouterr()
        lines = err.splitlines(keepends=True)
        return code, out, "".join(line for line in lines if not line.startswith(_SIGNS))

    return run


def up(there: Bench, folder: Path, *arguments: str) -> Any:
    return team_up(folder, there.root.url, {}, *arguments)


def log_in(there: Bench, team: Team, **changes: str) -> None:
    for name, value in (team.login() | changes).items():
        there.monkeypatch.setenv(name, value)


def holds(team: Team) -> dict[str, Any]:
    """Everything of every run that does not depend on ids that MLflow draws."""
    from mlflow import MlflowClient

    client = MlflowClient(team.url)
    found = client.get_experiment_by_name("tessera")
    assert found is not None
    runs = {}
    for run in client.search_runs([found.experiment_id]):
        tags = {k: v for k, v in run.data.tags.items() if k != "mlflow.parentRunId"}
        points = {
            key: [(p.step, p.value, p.timestamp) for p in client.get_metric_history(id_, key)]
            for id_ in [run.info.run_id]
            for key in run.data.metrics
        }
        runs[tags["tessera.run_id"]] = (run.data.params, tags, points, run.info.status)
    return {"runs": runs, "tags": found.tags}


def run_names(folder: Path) -> list[str]:
    """The runs in the database of a server that does not run."""
    cluster = Cluster.below(folder)
    cluster.start()
    try:
        return (
            cluster.tool("psql", "-d", "mlflow", "-tAc", "select name from runs").decode().split()
        )
    finally:
        cluster.stop()


def of_the_cluster(folder: Path) -> str:
    """Command lines of processes that still work in ``folder``."""
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return "\n".join(line for line in done.stdout.splitlines() if str(folder) in line)


def test_a_team_works_with_it_and_a_second_start_finds_everything(
    there: Bench, shell: Shell, folder: Path, bucket: Store
) -> None:
    voice = there.with_adapter()
    there.interview(voice)
    with up(there, folder) as team:
        mode = stat.S_IMODE((folder / "admin-password").stat().st_mode)
        assert (mode, stat.S_IMODE((folder / "secret-key").stat().st_mode)) == (0o600, 0o600)
        assert f"export MLFLOW_TRACKING_URI={team.url} MLFLOW_TRACKING_USERNAME=admin" in team.said
        assert team.login()["MLFLOW_TRACKING_PASSWORD"] not in team.said

        code, _, err = shell("sync", "--tracking-uri", team.url)
        assert (code, err.count("\n")) == (75, 1)
        assert "it refused access: check the user and password" in err
        log_in(there, team, MLFLOW_TRACKING_PASSWORD="guessed")
        code, _, err = shell("sync")
        assert code == 75
        assert err == (
            f"Error: The tracking server {team.url} did not answer as it should (it refused "
            "access: check the user and password); start it or correct MLFLOW_TRACKING_URI: "
            "nothing is lost, the next sync continues.\n"
        )
        log_in(there, team)

        code, out, err = shell("sync")
        assert (code, err) == (0, "")
        assert f"Synced 2 runs into {team.url} in" in out
        assert "0 new, 0 points added" in shell("sync")[1]
        code, out, err = shell("promote", "voice", "--adapter", "ep1")
        assert (code, err) == (0, "")
        assert f"{voice.id}/ep1 is champion" in out
        code, out, err = shell("ui", "--no-sync", "--no-open")
        assert (code, err) == (0, "")
        assert out.startswith(f"MLflow: {team.url}/#/experiments/")
        assert "viewStateShareKey=tesseraLossVsDollars" in out
        code, out, _ = shell("list", "--json")
        assert code == 0
        assert voice.id in out
        once = holds(team)
        assert once["runs"][voice.id][1]["tessera.interview"] == "1.00, 0 fatal (ep1, honest)"
        assert once["tags"]["mlflow.note.content"].startswith("**Pretraining on sample: `base-")

        prefix = there.root.url.removeprefix(f"s3://{bucket.bucket}/")
        listed = s3_client(bucket).list_objects_v2(Bucket=bucket.bucket, Prefix=f"{prefix}/mlflow/")
        assert any(row["Key"].endswith("/MLmodel") for row in listed["Contents"])

        code, _, err = shell("server", "up", "--folder", str(folder))
        assert (code, err.count("\n")) == (2, 1)
        assert "A tracking server runs in" in err
        code, _, err = shell("server", "restore", "--folder", str(folder))
        assert "has no backup of a tracking server" in err
        assert team.stop(signal.SIGTERM) == 0
    assert of_the_cluster(folder) == ""
    password = (folder / "admin-password").read_text()
    with up(there, folder) as team:
        assert (folder / "admin-password").read_text() == password
        log_in(there, team)
        assert holds(team) == once


def test_a_backup_is_restored_with_its_accounts_and_a_root_alone_gives_the_runs(
    there: Bench, shell: Shell, folder: Path
) -> None:
    there.finished()
    with up(there, folder) as team:
        log_in(there, team)
        assert shell("sync")[0] == 0
        answer = requests.post(
            f"{team.url}/api/2.0/mlflow/users/create",
            json={"username": "reader", "password": "of runs, only"},
            auth=("admin", team.login()["MLFLOW_TRACKING_PASSWORD"]),
            timeout=20,
        )
        assert answer.ok, answer.text
        code, out, err = shell("server", "backup", "--folder", str(folder))
        assert (code, err) == (0, "")
        assert f"Backed up into {there.root.url}/tracking-server/backups/20" in out
        once = holds(team)
        code, _, err = shell("server", "restore", "--folder", str(folder))
        assert (code, err.count("\n")) == (2, 1)
        assert "stop it first" in err
    there.finished("later")
    shutil.rmtree(folder)

    with up(there, folder, "--restore", "--backup-hours", "1") as team:  # another machine, say
        assert "Restored tracking-server/backups/20" in team.said
        log_in(there, team)
        assert holds(team) == once
        log_in(
            there, team, MLFLOW_TRACKING_USERNAME="reader", MLFLOW_TRACKING_PASSWORD="of runs, only"
        )
        assert holds(team) == once
        code, _, err = shell("sync")
        assert code == 75
        assert "it refused access" in err
        answer = requests.post(
            f"{team.url}/api/3.0/mlflow/users/permissions/grant",
            json={
                "username": "reader", "resource_type": "experiment", "resource_id": "1",
                "permission": "MANAGE",
            },
            auth=("admin", team.login()["MLFLOW_TRACKING_PASSWORD"]), timeout=20,
        )  # fmt: skip
        assert answer.ok, answer.text
        assert shell("sync")[0] == 0  # as the reader, who may write now
        log_in(there, team)
        everything = holds(team)
        assert len(everything["runs"]) == 2
    code, out, err = shell("server", "restore", "--folder", str(folder))
    assert (code, err) == (0, "")
    assert out.startswith("Restored tracking-server/backups/20")

    assert run_names(folder) == list(once["runs"])  # the run of after the backup is gone
    shutil.rmtree(folder)

    with up(there, folder) as team:  # no backup: an empty database and the root
        log_in(there, team)
        assert "2 new" in shell("sync")[1]
        assert holds(team) == everything


def test_a_name_that_is_not_allowed_is_named_with_the_option(
    there: Bench, shell: Shell, folder: Path
) -> None:
    there.finished()
    with up(there, folder, "--allowed-hosts", "mlflow.example.com") as team:
        log_in(there, team)
        assert shell("sync")[0] == 0  # this machine's own names stay allowed
        other = f"http://127.1:{team.port}"  # the same place by a name that nobody allowed
        code, _, err = shell("sync", "--tracking-uri", other)
        assert code == 2
        assert err == (
            f"Error: The tracking server {other} does not answer by the name 127.1; add it to "
            "--allowed-hosts where the server is started.\n"
        )
        for name, code in (("mlflow.example.com", 200), ("mlflow.example.org", 403)):
            for host in (name, f"{name}:{team.port}"):
                answer = requests.get(
                    team.url, headers={"Host": host}, timeout=20,
                    auth=("admin", team.login()["MLFLOW_TRACKING_PASSWORD"]),
                )  # fmt: skip
                assert answer.status_code == code, host
    code, _, err = shell("server", "up", "--folder", str(folder), "--allowed-hosts", "http://x/")
    assert (code, err.count("\n")) == (2, 1)
    assert "--allowed-hosts has 'http://x/'; expected host names" in err
