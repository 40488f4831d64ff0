"""The shell in the task YAMLs, really run: on the wrong GPU, on the right one, with pretend tools.

A machine here is an empty HOME and a PATH of one folder. The tools that cost money or minutes are
scripts that write their command line to a file; the trainer is one that ends with a chosen code.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

TASKS = Path(__file__).parent.parent.parent / "sky"
H100_TASKS = ["pretrain_h100.yaml", "sft_h100.yaml"]
H100 = "NVIDIA H100 80GB HBM3"
WRONG = ["NVIDIA GeForce RTX 5090", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", None]

RECORD = 'PATH=/usr/bin:/bin\necho "$(basename "$0") $*" >> "$HOME/calls"\n'
# What `uv venv` and `python3 -m venv` both leave: a pip in a folder, here one that only records.
MAKE_VENV = RECORD + 'mkdir -p ~/tessera-venv/bin && cp "$(dirname "$0")/pip" ~/tessera-venv/bin\n'


def load(task: str) -> dict[str, Any]:
    """The task YAML as plain data."""
    config: dict[str, Any] = yaml.safe_load((TASKS / task).read_text())
    return config


class Machine:
    """A pretend rented machine: `gpu` is what its nvidia-smi reports, None for no nvidia-smi."""

    def __init__(self, home: Path, gpu: str | None, tools: tuple[str, ...] = ("uv", "cc")) -> None:
        self.home = home
        self.bin = home / "bin"
        self.bin.mkdir()
        for real in ("bash", "date", "head", "rm"):
            found = shutil.which(real)
            assert found is not None
            (self.bin / real).symlink_to(found)
        for tool in ("pip", "apt-get", "curl", "python3", *tools):
            self.script(self.bin / tool, MAKE_VENV if tool in ("uv", "python3") else RECORD)
        if gpu is not None:
            self.script(self.bin / "nvidia-smi", f'echo "{gpu}"\n')

    def script(self, path: Path, body: str) -> None:
        """An executable bash script at `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)

    def install_trainer(self, body: str) -> None:
        """Put a pretend `tessera` where setup would have installed the real one."""
        self.script(self.home / "tessera-venv" / "bin" / "tessera", body)

    def do(self, task: str, section: str, **envs: str) -> subprocess.CompletedProcess[str]:
        """Run `setup` or `run` of a task as SkyPilot would: a bash script with the task's envs."""
        config = load(task)
        script = self.home / f"{section}.sh"
        script.write_text(config[section])
        environment = {k: v for k, v in config["envs"].items() if v is not None}
        environment |= {"TESSERA_ROOT": "s3://bucket/prefix", "OMP_NUM_THREADS": "1", **envs}
        return subprocess.run(
            ["bash", str(script)],
            cwd=self.home,
            env={**environment, "HOME": str(self.home), "PATH": str(self.bin)},
            capture_output=True,
            text=True,
            timeout=20,
        )

    @property
    def calls(self) -> list[str]:
        """The command lines of every pretend tool so far."""
        record = self.home / "calls"
        return record.read_text().splitlines() if record.exists() else []


def test_pretraining_and_fine_tuning_share_their_shell() -> None:
    """One guard and one installation in two files, each readable by itself: they may not drift."""
    pretrain, sft = (load(task) for task in H100_TASKS)
    assert pretrain["setup"] == sft["setup"]
    assert pretrain["run"] == sft["run"]
    assert pretrain["envs"].keys() == sft["envs"].keys()
    assert pretrain["secrets"] == sft["secrets"]


@pytest.mark.parametrize("gpu", WRONG)
@pytest.mark.parametrize("task", H100_TASKS)
def test_a_wrong_gpu_installs_nothing_and_leaves_with_75(
    tmp_path: Path, task: str, gpu: str | None
) -> None:
    machine = Machine(tmp_path, gpu, tools=("uv",))  # no cc either: an installer would start here
    machine.install_trainer("echo the trainer ran\n")
    setup = machine.do(task, "setup")
    assert setup.returncode == 0, "a failed setup is final, even for a managed job"
    assert machine.calls == []
    run = machine.do(task, "run")
    assert run.returncode == 75
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert (gpu or "no GPU") in run.stderr
    assert "H100 80GB HBM3" in run.stderr


@pytest.mark.parametrize("task", H100_TASKS)
def test_the_wanted_gpu_is_an_environment_variable(tmp_path: Path, task: str) -> None:
    machine = Machine(tmp_path, "NVIDIA H100 NVL")
    machine.install_trainer("exit 0\n")
    assert machine.do(task, "run", TESSERA_GPU="H100").returncode == 0


@pytest.mark.parametrize("code", [0, 2, 3, 75])
@pytest.mark.parametrize("task", [*H100_TASKS, "smoke_cpu.yaml"])
def test_the_exit_code_of_the_trainer_is_the_job_s(tmp_path: Path, task: str, code: int) -> None:
    machine = Machine(tmp_path, H100)
    machine.install_trainer(f'echo "$*"\n[[ "$1" != train ]] || exit {code}\n')
    run = machine.do(task, "run")
    assert run.returncode == code, run.stderr
    assert run.stdout.splitlines()[-1] == f"train {load(task)['envs']['TESSERA_EXPERIMENT']}"


def test_the_smoke_run_builds_its_corpus_first_and_stops_if_it_cannot(tmp_path: Path) -> None:
    machine = Machine(tmp_path, None)
    machine.install_trainer('echo "$*, threads: ${OMP_NUM_THREADS:-all}"\n')
    lines = machine.do("smoke_cpu.yaml", "run").stdout.splitlines()
    assert lines == [
        "corpus build data_manifests/sample.yaml, threads: all",
        "train experiments/smoke.yaml, threads: all",
    ]
    machine.install_trainer('[[ "$1" != corpus ]] || exit 2\n')
    assert machine.do("smoke_cpu.yaml", "run").returncode == 2


@pytest.mark.parametrize("task", [*H100_TASKS, "smoke_cpu.yaml"])
def test_setup_installs_the_pinned_core_into_its_own_environment(tmp_path: Path, task: str) -> None:
    machine = Machine(tmp_path, H100)
    assert machine.do(task, "setup").returncode == 0
    venv, pip = machine.calls
    assert venv.startswith("uv venv ")
    assert venv.endswith(f" {tmp_path}/tessera-venv")
    assert pip == "pip install -q -c constraints.txt ."
    machine.do(task, "setup")  # the same cluster again: the environment stays, the code is renewed
    assert machine.calls == [venv, pip, pip]


@pytest.mark.parametrize("task", [*H100_TASKS, "smoke_cpu.yaml"])
def test_setup_on_a_bare_image(tmp_path: Path, task: str) -> None:
    """No uv, no compiler, no sudo: Python's own venv, and apt-get once."""
    machine = Machine(tmp_path, H100, tools=())
    assert machine.do(task, "setup").returncode == 0
    assert machine.calls == [
        "apt-get update -qq",
        "apt-get install -qq -y build-essential",
        f"python3 -m venv --clear {tmp_path}/tessera-venv",
        "pip install -q -c constraints.txt .",
    ]


@pytest.mark.parametrize("task", [*H100_TASKS, "smoke_cpu.yaml"])
def test_the_trainer_learns_when_setup_began_and_no_empty_settings(
    tmp_path: Path, task: str
) -> None:
    machine = Machine(tmp_path, H100)
    machine.do(task, "setup")
    machine.install_trainer(
        'echo "${TESSERA_SETUP_STARTED-unset} ${TESSERA_USD_PER_HOUR-unset} '
        '${AWS_ENDPOINT_URL-unset}"\n'
    )
    began = int((tmp_path / ".tessera_setup_started").read_text())
    first = machine.do(task, "run").stdout.splitlines()[-1]
    assert first == f"{began} unset unset"
    # A later `sky exec` has no setup, and the idle hours before it are not setup either.
    later = machine.do(task, "run", TESSERA_USD_PER_HOUR="1.91").stdout.splitlines()[-1]
    assert later == "unset 1.91 unset"
