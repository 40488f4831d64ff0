"""What must neither hang nor lie: dead threads, readers that went away, disks that fill up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tessera.errors import InputError, RetryElsewhereError, StoreError
from tessera.runs import CheckpointRef
from tessera.tracking.journal import Journal
from tessera.training.checkpoint import saver
from tessera.training.checkpoint.files import local_checkpoints, local_folder, prune_local
from tessera.training.program import Prefetcher
from tessera.training.resume import lost_work
from tessera.training.session import require_the_rented_gpu
from tests.training.conftest import Bench

if TYPE_CHECKING:
    from tests.training.conftest import Whole


def test_an_unexpected_error_of_a_checkpoint_thread_ends_the_run_and_does_not_hang_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(saver, "write_tensors", broken)
    with pytest.raises(ValueError, match="a bug"):
        bench.train()
    assert bench.last_ending(bench.only_run()).outcome == "FAILED"


def test_a_disk_with_room_for_one_checkpoint_goes_on_saving(
    bench: Bench, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = saver.write_tensors  # type: ignore[attr-defined]

    def cramped(folder: Path, *arguments: Any) -> Any:
        if any(path != folder for path in folder.parent.glob("step-*")):
            raise StoreError("no space is left")
        return plain(folder, *arguments)

    monkeypatch.setattr(saver, "write_tensors", cramped)
    run = bench.train().run
    assert bench.events(run, "checkpoint/failed") == []
    assert [event.step for event in bench.events(run, "checkpoint/published")] == [
        5,
        10,
        15,
        20,
        25,
    ]
    assert bench.digest(run) == whole.digest


def test_a_full_disk_does_not_cost_the_only_checkpoint(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local saves at 3 and 6, nothing in the root yet, and the second finds no room at all."""
    plain = saver.write_tensors  # type: ignore[attr-defined]

    def full(folder: Path, *arguments: Any) -> Any:
        if "step-6-" in folder.name:
            raise StoreError("no space is left")
        return plain(folder, *arguments)

    monkeypatch.setattr(saver, "write_tensors", full)
    bench.crash(8, "checkpoint.every_steps=20", "checkpoint.local_every_steps=3")
    run = bench.only_run()
    assert [ref.step for ref in local_checkpoints(run)] == [3]
    assert [event.step for event in bench.events(run, "checkpoint/failed")] == [6]


def test_data_that_come_late_are_taken() -> None:
    """A wait that ends just as the data come must not be taken for an error."""

    class Late:
        steps = 3

        def batch(self, first: int) -> int:
            time.sleep(0.1)  # as long as one wait
            return first

    data = Prefetcher(Late(), 0, lambda step: step)  # type: ignore[arg-type]
    assert [str(data.take(step)) for step in range(3)] == ["0", "1", "2"]


def test_local_checkpoints_that_were_given_up_do_not_push_out_the_new_one(bench: Bench) -> None:
    bench.crash(7)
    run = bench.only_run()
    for name in ("step-9-1-aa", "step-8-1-aa", "step-6-2-bb", "step-5-2-bb", "step-9-3-cc"):
        (local_folder(run) / name).mkdir(parents=True, exist_ok=True)
    prune_local(run, 1, set(), CheckpointRef(6, "2-bb"))
    left = [ref.name for ref in local_checkpoints(run)]
    assert left == ["step-9-3-cc", "step-6-2-bb"], "a later attempt's is not ours to drop"


def test_a_finished_run_leaves_no_checkpoint_on_the_local_disk(bench: Bench) -> None:
    run = bench.train().run
    assert not local_folder(run).exists()
    assert bench.checkpoints(run) == [25, 20]


def test_a_run_that_another_machine_finished_leaves_none_here_either(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.crash(12)
    run = bench.only_run()
    assert [ref.step for ref in local_checkpoints(run)] == [10]
    with monkeypatch.context() as patch:
        patch.setenv("TESSERA_CACHE", str(bench.folder / "another-machine"))
        assert bench.train().exit_code == 0
    assert [ref.step for ref in local_checkpoints(run)] == [10]

    alive = Journal(run, "9-aa")
    assert "already finished" in bench.train().text
    assert local_folder(run).exists(), "what an attempt that lives writes is not taken from it"
    alive.close()
    assert "already finished" in bench.train().text
    assert not local_folder(run).exists()
    assert bench.checkpoints(run) == [25, 20]


def test_too_little_room_is_said_in_units_that_fit(
    bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shutil.disk_usage(bench.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plain._replace(free=123_456))
    done = bench.command(capfd)
    assert done.code == 0
    assert re.search(
        r"cache has room for 123 kB, checkpoints may take \d\.\d MB; free some space or point "
        "TESSERA_CACHE at a larger disk, or saves will fail",
        done.err,
    )


def test_a_damaged_journal_of_the_dead_attempt_does_not_forbid_to_continue(
    bench: Bench, whole: Whole
) -> None:
    bench.crash(12)
    run = bench.only_run()
    (segment,) = run.root.files(run.path("journal"))
    data = bytearray(run.root.read_bytes(segment))
    data[len(data) // 2] = 0
    run.root.publish(segment, bytes(data))
    assert lost_work(run, 10) is None
    bench.forget_local()
    assert bench.train().exit_code == 0
    assert bench.digest(run) == whole.digest


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_changes_neither_the_run_nor_its_exit_code(
    bench: Bench, whole: Whole, stream: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    done = subprocess.run(
        [sys.executable, "-m", "tessera", *bench.arguments()],
        **(streams | {stream: writer}),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    os.close(writer)
    assert done.returncode == 0
    run = bench.only_run()
    assert run.finished() is not None
    assert bench.digest(run) == whole.digest


def test_a_store_that_stalls_does_not_keep_a_stop_waiting() -> None:
    held = threading.Event()

    class Slow:
        steps = 9

        def batch(self, first: int) -> None:
            held.wait(20)

    data = Prefetcher(Slow(), 0, lambda step: step)  # type: ignore[arg-type]
    assert data.take(0, lambda: True) is None
    held.set()


def test_a_rented_gpu_that_does_not_work_is_no_reason_to_train_on_the_cpu() -> None:
    require_the_rented_gpu({"SKYPILOT_NUM_GPUS_PER_NODE": "0"})
    require_the_rented_gpu({})
    with pytest.raises(RetryElsewhereError, match="torch finds none that works"):
        require_the_rented_gpu({"SKYPILOT_NUM_GPUS_PER_NODE": "1"})
    # A dry run of a launch says that it wants the CPU.
    require_the_rented_gpu({"SKYPILOT_NUM_GPUS_PER_NODE": "1", "TESSERA_DEVICE": "cpu"})
    with pytest.raises(InputError, match="TESSERA_DEVICE is 'gpu'; expected auto"):
        require_the_rented_gpu({"TESSERA_DEVICE": "gpu"})
