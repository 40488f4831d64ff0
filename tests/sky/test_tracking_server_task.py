"""The shell of sky/tracking_server.yaml, really run on a pretend machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.sky.test_task_shell import RECORD, SECRET, UV, Machine

TASK = "tracking_server.yaml"
UP = "server up --folder {folder} --host 0.0.0.0 --port 5000 --allowed-hosts {hosts} --restore "
AS_ROOT = os.geteuid() == 0
SAYS = 'echo "$*|${TESSERA_ROOT}|${AWS_SECRET_ACCESS_KEY:0:5}"\n'


class Server(Machine):
    """A machine without a GPU, on which tests run as root, as RunPod's do."""

    def __init__(self, home: Path, address: str | None = "203.0.113.7") -> None:
        super().__init__(home, [], tools=UV)
        self.script(self.bin / "ln", RECORD)
        body = f"echo {address}\n" if address else "exit 6\n"
        self.script(self.bin / "curl", RECORD + body)

    def install(self, body: str) -> None:
        """Put a pretend `tessera-exp` where setup would have installed the real one."""
        self.script(self.home / "tessera-venv" / "bin" / "tessera-exp", body)


def test_setup_installs_mlflow_and_postgresql(tmp_path: Path) -> None:
    machine = Server(tmp_path)
    assert machine.do(TASK, "setup").returncode == 0
    venv, core, *rest = machine.calls
    assert venv.startswith("uv venv ")
    assert core.endswith("-c constraints.txt --reinstall-package tessera .[tracking]")
    assert rest == ["apt-get update -qq", "apt-get install -qq -y postgresql"]


def test_setup_without_postgresql_fails_with_a_sentence(tmp_path: Path) -> None:
    machine = Server(tmp_path)
    machine.script(machine.bin / "apt-get", RECORD + "exit 100\n")
    setup = machine.do(TASK, "setup")
    assert setup.returncode == 1
    assert setup.stderr == (
        "setup: PostgreSQL cannot be installed here; launch again for another machine.\n"
    )


@pytest.mark.parametrize(
    ("envs", "hosts"),
    [
        ({}, "203.0.113.7"),
        ({"RUNPOD_PUBLIC_IP": "198.51.100.2"}, "198.51.100.2"),
        ({"TESSERA_ALLOWED_HOSTS": "a.example.com,b"}, "a.example.com,b"),
    ],
)
def test_it_answers_by_the_names_that_were_given_or_its_public_address(
    tmp_path: Path, envs: dict[str, str], hosts: str
) -> None:
    machine = Server(tmp_path)
    machine.install(SAYS)
    run = machine.do(TASK, "run", **envs)
    assert (run.returncode, run.stderr) == (0, "")
    folder = "/var/lib/tessera-tracking" if AS_ROOT else f"{tmp_path}/tracking-server"
    assert run.stdout == (
        f"{UP.format(folder=folder, hosts=hosts)}--backup-hours 6|s3://bucket/pre fix|"
        f"{SECRET[:5]}\n"
    )


@pytest.mark.parametrize("code", [0, 2, 75])
def test_without_an_address_it_is_reached_by_a_tunnel_and_its_exit_code_is_the_job_s(
    tmp_path: Path, code: int
) -> None:
    machine = Server(tmp_path, address=None)
    machine.install(f'echo "$*"\nexit {code}\n')
    run = machine.do(TASK, "run")
    assert run.returncode == code
    assert "--allowed-hosts  --restore" in run.stdout
