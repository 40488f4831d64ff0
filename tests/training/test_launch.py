"""Starting workers: whose plan, whose exit code, and what a signal to the parent does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tessera.errors import InputError
from tessera.training.launch import (
    LAUNCHER_VARIABLE,
    PEER_LOST,
    Failure,
    Plan,
    launch,
    needs_launch,
    verdict,
)
from tessera.training.parallel import join

SKY = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8\n",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
}

PARENT = """
import sys
from tessera.training.launch import Plan, launch
if __name__ == "__main__":
    argv = [sys.executable, sys.argv[1]]
    sys.exit(launch(Plan.on_this_machine(2), argv, grace_s=float(sys.argv[2])))
"""


def test_two_machines_of_skypilot_meet_at_the_first() -> None:
    assert needs_launch(SKY) == Plan(2, 1, 4, "10.0.0.7", 29571)
    assert needs_launch(SKY | {"TESSERA_MASTER_PORT": "5000"}) == Plan(2, 1, 4, "10.0.0.7", 5000)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_workers_of_torchrun_start_no_others(name: str) -> None:
    assert needs_launch(SKY | {name: "0"}) is None


@pytest.mark.parametrize(("nodes", "gpus"), [("1", "1"), ("1", "0")])
def test_one_worker_needs_no_launcher(nodes: str, gpus: str) -> None:
    one = {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NUM_GPUS_PER_NODE": gpus}
    assert needs_launch(SKY | one) is None
    assert needs_launch({}) is None


def test_one_machine_with_several_gpus_and_two_without() -> None:
    one = SKY | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_IPS": "10.0.0.7"}
    assert needs_launch(one) == Plan.on_this_machine(4)
    bare = {k: v for k, v in SKY.items() if not k.endswith("NUM_GPUS_PER_NODE")}
    plan = needs_launch(bare)
    assert plan is not None
    assert (plan.nodes, plan.workers) == (2, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SKYPILOT_NUM_NODES": "two"}, "SKYPILOT_NUM_NODES is 'two', expected a whole number"),
        ({"SKYPILOT_NUM_GPUS_PER_NODE": "-1"}, "SKYPILOT_NUM_GPUS_PER_NODE is '-1'"),
        ({"SKYPILOT_NODE_RANK": ""}, "SKYPILOT_NODE_RANK is ''"),
        ({"SKYPILOT_NODE_RANK": "2"}, "SKYPILOT_NODE_RANK is 2; start with torchrun"),
        ({"SKYPILOT_NODE_IPS": "10.0.0.7"}, "SKYPILOT_NODE_IPS lists 1 machines"),
        ({"TESSERA_MASTER_PORT": "x"}, "TESSERA_MASTER_PORT is 'x'"),
    ],
)
def test_variables_that_contradict_each_other_are_one_sentence(
    change: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        needs_launch(SKY | change)


def test_no_gpu_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        Plan.on_this_machine(0)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_more_workers_than_gpus_are_refused_by_all_and_told_once(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    sizes = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    for name, value in {**where, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="3 workers on this machine and 2 GPUs") as caught:
        join("cuda")
    assert caught.value.told_elsewhere == (rank > 0)


@pytest.mark.parametrize(
    ("failures", "nodes", "code"),
    [
        ([(75, 0), (2, 0)], 1, 2),
        ([(3, 0), (75, 0)], 1, 3),
        ([(1, 0), (75, 0)], 1, 75),  # a bug beside a store that is down: the store is known
        ([(1, 0), (75, 1)], 1, 1),  # told to stop, the other saved and said so
        ([(-9, 0), (75, 1)], 1, 137),
        ([(PEER_LOST, 0), (75, 1)], 2, 75),
        ([(PEER_LOST, 0), (1, 0)], 1, 1),  # a bug here ended the peer
        ([(-9, 0), (PEER_LOST, 0)], 1, 137),  # killed for want of memory: again elsewhere too
        ([(-11, 0), (-15, 1)], 1, 139),
        ([(-6, 0)], 1, 134),
        ([(-6, 0), (-15, 1)], 2, 75),  # NCCL's end when a machine is gone
        ([(PEER_LOST, 0), (-9, 30)], 2, 75),  # the second hung, and was killed by the launcher
        ([(-15, 0)], 1, 75),  # the machine is being taken away
    ],
)
def test_whose_code_counts(failures: list[tuple[int, float]], nodes: int, code: int) -> None:
    assert verdict([Failure(*failure) for failure in failures], nodes) == code


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    """A worker that ends as the file ``code.<rank>`` beside it says, and waits without one."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "rank = os.environ['RANK']\n"
        "def told(number, frame):\n"
        "    time.sleep(1.5)\n"  # a save takes longer than the other's
        "    (here / f'saved.{rank}').write_text(str(number))\n"
        "    os._exit(75)\n"
        "plan = here / f'code.{rank}'\n"
        "if plan.exists():\n"
        "    code = int(plan.read_text())\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # its own code, whoever ends first
        "    (here / f'ready.{rank}').touch()\n"
        "    while len(list(here.glob('ready.*'))) < len(list(here.glob('code.*'))):\n"
        "        time.sleep(0.01)\n"
        "    code >= 0 or os.kill(os.getpid(), -code)\n"
        "    sys.exit(code)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN if (here / 'deaf').exists() else told)\n"
        "(here / f'pid.{rank}').write_text(f'{os.getpid()} ' + os.environ['WORLD_SIZE'])\n"
        "time.sleep(60)\n"
    )
    return script


@pytest.mark.parametrize(
    ("codes", "expected"),
    [({0: 0, 1: 0}, 0), ({0: 0, 1: 3}, 3), ({0: 75, 1: 2}, 2), ({0: 1, 1: 1}, 1), ({1: -9}, 137)],
)
def test_the_workers_code_is_the_machines(
    worker: Path, codes: dict[int, int], expected: int
) -> None:
    for rank, code in codes.items():
        (worker.parent / f"code.{rank}").write_text(str(code))
    before = signal.getsignal(signal.SIGTERM)
    assert launch(Plan.on_this_machine(2), [sys.executable, str(worker)]) == expected
    assert LAUNCHER_VARIABLE not in os.environ
    assert signal.getsignal(signal.SIGTERM) is before
    if codes == {1: -9}:  # the healthy one was told to stop, and had time to
        assert (worker.parent / "saved.0").exists()


def _start(worker: Path, grace_s: float) -> tuple[subprocess.Popen[bytes], list[int]]:
    script = worker.parent / "parent.py"
    script.write_text(PARENT)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SKYPILOT_", "TESSERA_"))}
    parent = subprocess.Popen([sys.executable, str(script), str(worker), str(grace_s)], env=environ)
    pids = [_read(worker.parent / f"pid.{rank}") for rank in range(2)]
    return parent, pids


def _read(path: Path) -> int:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.exists() and len(words := path.read_text().split()) == 2:
            assert words[1] == "2"
            return int(words[0])
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_signal_to_the_parent_lets_every_worker_save(
    worker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parent, pids = _start(worker, 20)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 75
    assert sorted(p.name for p in worker.parent.glob("saved.*")) == ["saved.0", "saved.1"]
    assert not any(_alive(pid) for pid in pids)
    assert "death signal" not in capfd.readouterr().err  # torch's own report of it


def test_a_worker_that_does_not_listen_is_killed_after_the_grace_period(worker: Path) -> None:
    (worker.parent / "deaf").touch()
    parent, pids = _start(worker, 0)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(40) == 75
    assert not any(_alive(pid) for pid in pids)


def test_a_parent_told_again_and_again_leaves_no_worker_behind(worker: Path) -> None:
    """The second signal reaches the workers too; the third ends torch's wait for them."""
    (worker.parent / "deaf").touch()
    parent, pids = _start(worker, 60)
    for _ in range(3):
        parent.send_signal(signal.SIGTERM)
        time.sleep(1)
    assert parent.wait(10) == 75
    assert not any(_alive(pid) for pid in pids)


HANGING = """
import os, pathlib, torch
import torch.distributed as dist
from tessera.training.parallel import join
world = join("cpu")
pid = pathlib.Path(__file__).with_name(f"pid.{world.rank}")
pid.write_text(f"{os.getpid()} {world.size}")
dist.recv(torch.zeros(1), src=1 - world.rank)  # each waits for the other, who sends nothing
"""


def test_workers_in_a_hanging_collective_leave_when_the_parent_is_killed(worker: Path) -> None:
    worker.write_text(HANGING)
    parent, pids = _start(worker, 20)
    workers = [psutil.Process(pid) for pid in pids]
    try:
        assert [process.ppid() for process in workers] == [parent.pid, parent.pid]
        parent.kill()
        assert parent.wait(30) == -signal.SIGKILL
        until = time.monotonic() + 60
        while left := [process for process in workers if _runs(process)]:
            assert time.monotonic() < until, f"{len(left)} workers live on"
            time.sleep(0.05)
    finally:
        parent.kill()
        for process in workers:
            if process.is_running():
                process.kill()


def _runs(process: psutil.Process) -> bool:
    """Whether it is there and no zombie: nobody may be left who asks for its exit code."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("local_rank", "sentences"), [("0", 1), ("1", 0)])
def test_a_worker_whose_parent_was_gone_before_it_looked_leaves_with_75(
    local_rank: str, sentences: int
) -> None:
    orphan = (
        "import time\n"
        "from tessera.training.launch import leave_with_the_launcher\n"
        "leave_with_the_launcher()\n"
        "time.sleep(60)\n"
    )
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environ = os.environ | {LAUNCHER_VARIABLE: str(gone.pid), "LOCAL_RANK": local_rank}
    done = subprocess.run(
        [sys.executable, "-c", orphan], env=environ, check=False, capture_output=True, text=True
    )
    assert done.returncode == 75
    assert done.stderr.count("the command that started the workers is gone") == sentences


def test_two_machines_share_one_training(worker: Path) -> None:
    """Two parents on this machine stand for two machines; each gives its own worker's code."""
    script = worker.parent / "parent.py"
    script.write_text(
        "import os, sys\n"
        "from tessera.training.launch import launch, needs_launch\n"
        "plan = needs_launch(os.environ)\n"
        "assert plan is not None\n"
        "sys.exit(launch(plan, [sys.executable, sys.argv[1]]))\n"
    )
    (worker.parent / "code.0").write_text("75")
    (worker.parent / "code.1").write_text("3")
    parents = []
    for rank in range(2):
        sky = {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "TESSERA_MASTER_PORT": str(29600 + os.getpid() % 300),
        }
        command = [sys.executable, str(script), str(worker)]
        parents.append(subprocess.Popen(command, env=os.environ | sky))
    try:
        assert [parent.wait(60) for parent in parents] == [75, 3]
    finally:
        for parent in parents:
            parent.kill()
