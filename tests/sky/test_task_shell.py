"""The shell of the tasks, really run: on the wrong GPU, on the right one, with pretend tools.

A machine here is an empty HOME, the repository's sky/ in a workdir, and a PATH of one folder. The
tools that cost money or minutes are scripts that write their command line to a file; the trainer is
one that ends with a chosen code.
"""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent.parent
TASKS = REPOSITORY / "sky"
H100_TASKS = [
    "interview_h100.yaml", "pretrain_h100.yaml", "pretrain_h100_managed.yaml", "sft_h100.yaml",
]  # fmt: skip
CPU_TASKS = ["corpus_cpu.yaml", "smoke_cpu.yaml"]
SERVER = "tracking_server.yaml"  # has tests of its own
ALL_TASKS = sorted(path.name for path in TASKS.glob("*.yaml") if path.name != SERVER)
TRAINING = ["pretrain_h100.yaml", "pretrain_h100_managed.yaml", "sft_h100.yaml", "smoke_cpu.yaml"]
H100 = "NVIDIA H100 80GB HBM3"
WRONG = [["NVIDIA GeForce RTX 5090"], ["NVIDIA A100-SXM4-80GB"], [H100, H100], []]
SECRET = "never-to-be-shown"
ENV = f"""# Written by `tessera configure`
TESSERA_ROOT='s3://bucket/pre fix'
AWS_ACCESS_KEY_ID='id'
AWS_SECRET_ACCESS_KEY='{SECRET}'\\''$(touch pwned)'
MLFLOW_TRACKING_URI=''
TESSERA_USD_PER_HOUR='1.5'
"""

RECORD = 'PATH=/usr/bin:/bin\necho "$(basename "$0") $*" >> "$HOME/calls"\n'
# What `uv venv` and `python3 -m venv` both leave: a python in a folder, here one that only records.
MAKE_VENV = RECORD + (
    'if [[ "$1 $2" == *venv* ]]; then for d in "$@"; do :; done; mkdir -p "$d/bin"\n'
    'cp "$(dirname "$0")/python" "$d/bin"; fi\n'
)
UV = ("uv", "cc")


def load(task: str) -> dict[str, Any]:
    """The task YAML as plain data."""
    config: dict[str, Any] = yaml.safe_load((TASKS / task).read_text())
    return config


class Machine:
    """A pretend rented machine; ``gpus`` is what its nvidia-smi lists, none for no nvidia-smi."""

    def __init__(self, home: Path, gpus: list[str], tools: tuple[str, ...] = UV) -> None:
        self.home, self.work, self.bin = home, home / "sky_workdir", home / "bin"
        self.bin.mkdir(parents=True)
        self.work.mkdir()
        shutil.copytree(TASKS, self.work / "sky")
        (home / ".tessera").mkdir()
        (home / ".tessera" / "env").write_text(ENV)
        for real in ("bash", "date", "rm", "xargs", "printf", "timeout", "grep"):
            found = shutil.which(real)
            assert found is not None
            (self.bin / real).symlink_to(found)
        self.script(self.bin / "sleep", "exit 0\n")
        for tool in ("apt-get", "python", "python3", *tools):
            self.script(self.bin / tool, MAKE_VENV if tool in ("uv", "python3") else RECORD)
        if gpus:
            self.script(self.bin / "nvidia-smi", "".join(f'echo "{gpu}"\n' for gpu in gpus))

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
        environment |= {"OMP_NUM_THREADS": "1", **envs}
        done = subprocess.run(
            ["bash", str(script)],
            cwd=self.work,
            env={**environment, "HOME": str(self.home), "PATH": str(self.bin)},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert SECRET not in done.stdout + done.stderr
        assert not (self.work / "pwned").exists()
        return done

    @property
    def calls(self) -> list[str]:
        """The command lines of every pretend tool so far."""
        record = self.home / "calls"
        return record.read_text().splitlines() if record.exists() else []


def test_the_scripts_are_clean() -> None:
    for script in TASKS.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    if shellcheck := shutil.which("shellcheck"):
        scripts = sorted(str(script) for script in TASKS.glob("*.sh"))
        subprocess.run([shellcheck, "-x", *scripts], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("gpus", WRONG)
@pytest.mark.parametrize("task", H100_TASKS)
def test_a_wrong_machine_installs_nothing_in_setup(
    tmp_path: Path, task: str, gpus: list[str]
) -> None:
    machine = Machine(tmp_path, gpus, tools=("uv",))  # no cc either: an installer would start here
    setup = machine.do(task, "setup")
    assert setup.returncode == 0, "a failed setup is final, even for a managed job"
    assert machine.calls == []
    found = f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"
    wanted = load(task)["envs"]["TESSERA_GPU"]
    assert setup.stderr == f"setup: wanted 1 x {wanted}, found {found}; nothing is installed.\n"


@pytest.mark.parametrize("code", [75, 2])
@pytest.mark.parametrize("task", H100_TASKS)
def test_a_wrong_machine_is_refused_with_what_can_be_installed_in_seconds(
    tmp_path: Path, task: str, code: int
) -> None:
    machine = Machine(tmp_path, WRONG[0])
    # The interpreter that the light environment gets: it says with which code the refusal ends.
    machine.script(machine.bin / "python", RECORD + f"exit {code}\n")
    run = machine.do(task, "run")
    assert run.returncode == code
    venv, install, refuse = machine.calls
    assert venv.startswith("uv venv ")
    assert install.startswith("uv pip install ")
    assert install.endswith("-c constraints.txt fsspec s3fs tenacity pydantic psutil httpx")
    assert refuse == (
        "python -m tessera.cloud.refuse --found 1 x NVIDIA GeForce RTX 5090 "
        "--reason another GPU than asked for"
    )


def test_a_refusal_that_cannot_be_counted_is_final(tmp_path: Path) -> None:
    machine = Machine(tmp_path, WRONG[0])
    for tool in ("uv", "python3"):
        machine.script(machine.bin / tool, "exit 1\n")  # no network, say
    run = machine.do("pretrain_h100_managed.yaml", "run")
    assert run.returncode == 2
    assert run.stdout == ""
    assert "found 1 x NVIDIA GeForce RTX 5090" in run.stderr
    assert "cannot be counted in the root" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("task", H100_TASKS)
def test_the_wanted_gpu_and_its_number_are_variables(tmp_path: Path, task: str) -> None:
    machine = Machine(tmp_path, ["NVIDIA H100 NVL"] * 2)
    machine.install_trainer("exit 0\n")
    assert machine.do(task, "run", TESSERA_GPU="H100", TESSERA_GPUS="2").returncode == 0


@pytest.mark.parametrize("code", [0, 2, 3, 75])
@pytest.mark.parametrize("task", ALL_TASKS)
def test_the_exit_code_of_the_command_is_the_job_s(tmp_path: Path, task: str, code: int) -> None:
    machine = Machine(tmp_path, [H100] * int(load(task)["envs"].get("TESSERA_GPUS", 1)))
    machine.install_trainer(f'echo "$*"\n[[ "$1" == preflight ]] || exit {code}\n')
    run = machine.do(task, "run")
    assert run.returncode == code, run.stderr


@pytest.mark.parametrize("task", TRAINING)
def test_nothing_trains_before_the_preflight_says_go(tmp_path: Path, task: str) -> None:
    machine = Machine(tmp_path, [H100])
    machine.install_trainer('echo "$*"\n')
    experiment = load(task)["envs"]["TESSERA_EXPERIMENT"]
    sets = shlex.join(["--set", "tokens=1000", "--set", "description=it's a $HOME"])
    run = machine.do(
        task, "run", TESSERA_SET="tokens=1000 " + shlex.quote("description=it's a $HOME")
    )
    told = [line for line in run.stdout.splitlines() if not line.startswith("corpus")]
    options = " ".join(shlex.split(sets))
    assert told == [f"preflight {experiment} {options}", f"train {experiment} {options}"]
    for code in (75, 2):
        machine.install_trainer(f'[[ "$1" != preflight ]] || exit {code}\necho "$*"\n')
        refused = machine.do(task, "run")
        assert refused.returncode == code
        assert "train" not in refused.stdout


def test_overrides_that_are_not_quoted_right_are_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [H100])
    machine.install_trainer('echo "$*"\n')
    run = machine.do("pretrain_h100.yaml", "run", TESSERA_SET="name='open")
    assert run.returncode == 2
    assert "TESSERA_SET is not a list of shell-quoted KEY=VALUE" in run.stderr
    assert run.stdout == ""


def test_the_smoke_run_builds_its_corpus_first_and_stops_if_it_cannot(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [])
    machine.install_trainer('echo "$*, threads: ${OMP_NUM_THREADS:-all}"\n')
    lines = machine.do("smoke_cpu.yaml", "run").stdout.splitlines()
    assert lines == [
        "corpus build data_manifests/sample.yaml --unless-built, threads: all",
        "preflight experiments/smoke.yaml, threads: all",
        "train experiments/smoke.yaml, threads: all",
    ]
    machine.install_trainer('[[ "$1" != corpus ]] || exit 2\n')
    assert machine.do("smoke_cpu.yaml", "run").returncode == 2


def test_the_interview_asks_the_adapter_that_was_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [H100])
    machine.install_trainer('echo "$*"\n')
    run = machine.do("interview_h100.yaml", "run")
    assert run.stdout == "interview run tessera-1b-sft\n"
    run = machine.do("interview_h100.yaml", "run", TESSERA_RUN="mine", TESSERA_ADAPTER="ep2")
    assert run.stdout == "interview run mine --adapter ep2\n"


@pytest.mark.parametrize("task", ALL_TASKS)
def test_setup_installs_the_pinned_core_into_its_own_environment(tmp_path: Path, task: str) -> None:
    machine = Machine(tmp_path, [H100] * int(load(task)["envs"].get("TESSERA_GPUS", 1)))
    assert machine.do(task, "setup").returncode == 0
    venv, core, *fast = machine.calls
    assert venv.startswith("uv venv ")
    assert venv.endswith(f" {tmp_path}/tessera-venv")
    install = f"uv pip install -q --python {tmp_path}/tessera-venv/bin/python -c constraints.txt"
    assert core == f"{install} --reinstall-package tessera ."
    assert fast == ([] if task in CPU_TASKS else [f"{install} .[fast]"])
    machine.do(task, "setup")  # the same cluster again: the environment stays, the code is renewed
    assert machine.calls == [venv, core, *fast, core, *fast]


def test_setup_goes_on_without_the_fast_kernels(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [H100])
    machine.script(machine.bin / "uv", MAKE_VENV + '[[ "$*" != *fast* ]]\n')
    setup = machine.do("pretrain_h100.yaml", "setup")
    assert setup.returncode == 0
    assert setup.stderr.endswith("going on with cuDNN's.\n")
    machine.script(machine.bin / "uv", MAKE_VENV + '[[ "$*" != *constraints* ]]\n')
    machine.install_trainer("exit 0\n")  # of an earlier launch on this machine
    setup = machine.do("pretrain_h100.yaml", "setup")
    assert setup.returncode == 0, "a failed setup is final, even for a managed job"
    assert setup.stderr == (
        "setup: tessera cannot be installed here, so run.sh will refuse this machine.\n"
    )
    assert not (tmp_path / "tessera-venv" / "bin" / "tessera").exists()


def test_setup_tries_three_times_what_the_network_may_refuse(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [H100])
    fails = '(( $(grep -c constraints "$HOME/calls") >= 3 )) || [[ "$*" != *--rein* ]]\n'
    machine.script(machine.bin / "uv", MAKE_VENV + fails)
    setup = machine.do("pretrain_h100.yaml", "setup")
    assert (setup.returncode, setup.stderr) == (0, "")
    assert sum("--reinstall-package" in call for call in machine.calls) == 3
    machine = Machine(tmp_path / "b", [H100], tools=())
    machine.script(machine.bin / "apt-get", RECORD + "exit 100\n")
    setup = machine.do("pretrain_h100.yaml", "setup")
    assert (setup.returncode, machine.calls) == (0, ["apt-get update -qq"] * 3)
    assert "a C compiler cannot be installed here" in setup.stderr


@pytest.mark.parametrize("code", [75, 2])
@pytest.mark.parametrize("task", ["pretrain_h100_managed.yaml", "smoke_cpu.yaml"])
def test_a_machine_without_tessera_is_refused_and_counted(
    tmp_path: Path, task: str, code: int
) -> None:
    machine = Machine(tmp_path, [H100])
    machine.script(machine.bin / "python", RECORD + f"exit {code}\n")
    machine.script(tmp_path / "tessera-venv" / "bin" / "python", "exit 9\n")  # half installed
    run = machine.do(task, "run")
    assert run.returncode == code
    assert machine.calls[-1].endswith("--reason tessera could not be installed here")


def test_an_nvidia_smi_that_hangs_is_no_gpu(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [H100])
    machine.script(machine.bin / "nvidia-smi", "exec /bin/sleep 30\n")
    (machine.bin / "timeout").unlink()
    machine.script(
        machine.bin / "timeout",
        '[[ "$1 $2 $3" == "-k 5 60" ]] && exec /usr/bin/timeout -k 1 1 "${@:4}"\n',
    )
    setup = machine.do("pretrain_h100.yaml", "setup")
    assert setup.returncode == 0
    assert "found no GPU; nothing is installed" in setup.stderr


@pytest.mark.parametrize(
    "line",
    [
        f"AWS_SECRET_ACCESS_KEY='{SECRET}", f"AWS_SECRET_ACCESS_KEY={SECRET} $(touch pwned)",
        f'AWS_SECRET_ACCESS_KEY="{SECRET}"', f"AWS_SECRET_ACCESS_KEY='a'$(touch pwned)'{SECRET}'",
        f"AWS_SECRET_ACCESS_KEY='a'; touch pwned #{SECRET}'", SECRET, f"a[$(touch pwned)]={SECRET}",
    ],
)  # fmt: skip
def test_a_line_of_settings_that_is_none_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    machine = Machine(tmp_path, [H100])
    machine.install_trainer("exit 0\n")
    (tmp_path / ".tessera" / "env").write_text(f"# written\n\nTESSERA_ROOT=s3://b/p\n{line}\n")
    for section in ("setup", "run"):
        done = machine.do("pretrain_h100.yaml", section)
        assert done.returncode == 2
        assert done.stderr.startswith("settings: line 4 of ~/.tessera/env is not KEY='value';")


def test_overrides_of_blanks_are_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [H100])
    machine.install_trainer('echo "$*"\n')
    run = machine.do("pretrain_h100.yaml", "run", TESSERA_SET="  \n ")
    assert "--set" not in run.stdout


@pytest.mark.parametrize(
    ("task", "envs", "index"),
    [
        ("pretrain_h100.yaml", {}, "none"),
        ("pretrain_h100.yaml", {"TESSERA_DEVICE": "cpu"}, "https://download.pytorch.org/whl/cpu"),
        ("smoke_cpu.yaml", {}, "https://download.pytorch.org/whl/cpu"),
    ],
)
def test_torch_for_cuda_comes_only_where_a_gpu_will_train(
    tmp_path: Path, task: str, envs: dict[str, str], index: str
) -> None:
    machine = Machine(tmp_path, [H100])
    machine.script(machine.bin / "uv", MAKE_VENV + 'echo "${UV_INDEX:-none}"\n')
    assert set(machine.do(task, "setup", **envs).stdout.splitlines()) == {index}


@pytest.mark.parametrize("task", ALL_TASKS)
def test_setup_on_a_bare_image(tmp_path: Path, task: str) -> None:
    """No uv, no compiler, no sudo: Python's own venv and pip, and apt-get once."""
    count = int(load(task)["envs"].get("TESSERA_GPUS", 1))
    machine = Machine(tmp_path, [H100] * count, tools=())
    assert machine.do(task, "setup").returncode == 0
    assert machine.calls[:4] == [
        "apt-get update -qq",
        "apt-get install -qq -y build-essential",
        f"python3 -m venv {tmp_path}/tessera-venv",
        "python -m pip install -q -c constraints.txt .",
    ]


@pytest.mark.parametrize("task", TRAINING)
def test_the_trainer_gets_the_settings_of_configure_and_those_of_the_launch_win(
    tmp_path: Path, task: str
) -> None:
    machine = Machine(tmp_path, [H100])
    machine.do(task, "setup")
    machine.install_trainer(
        'echo "${TESSERA_SETUP_STARTED-unset}|${TESSERA_USD_PER_HOUR-unset}|$TESSERA_ROOT|'
        '${MLFLOW_TRACKING_URI-unset}"\n'
        f'[[ $AWS_SECRET_ACCESS_KEY == "{SECRET}\'"* ]] || exit 9\n'
    )
    began = int((tmp_path / ".tessera_setup_started").read_text())
    run = machine.do(task, "run", TESSERA_USD_PER_HOUR="", TESSERA_ROOT="s3://other")
    assert run.returncode == 0
    assert run.stdout.splitlines()[-1] == f"{began}|1.5|s3://other|unset"
    # A later `sky exec` has no setup, and the idle hours before it are not setup either.
    later = machine.do(task, "run", TESSERA_USD_PER_HOUR="1.91").stdout.splitlines()[-1]
    assert later == "unset|1.91|s3://bucket/pre fix|unset"
