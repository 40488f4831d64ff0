"""Two tiers of checkpoints: this machine's disk and the root, each at its own speed."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tessera.errors import StoreError
from tessera.model.protogpt import ProtoGPT
from tessera.runs import Run
from tessera.storage import canonical_json, sha256_bytes
from tessera.training.checkpoint.files import (
    local_checkpoints,
    local_folder,
    require_all_tensors,
    write_tensors,
)
from tessera.training.loop import Loop
from tests.training.conftest import as_options, assert_as_if_undisturbed
from tests.training.disturb import Disturbance

if TYPE_CHECKING:
    from tests.training.conftest import Bench, Whole

OFTEN = ("checkpoint.local_every_steps=2",)


def here(run: Run) -> list[int]:
    """Steps of the checkpoints on this machine's disk, furthest first."""
    return [ref.step for ref in local_checkpoints(run)]


def resumptions(bench: Bench) -> list[tuple[int, bool]]:
    """Where each attempt but the first continued, and whether from this machine's disk."""
    events = bench.events(bench.only_run(), "attempt/resumed")
    return [(event.step, event.value["local"]) for event in events]


# -- where it continues ----------------------------------------------------------------------------


def test_it_continues_from_the_newer_local_one_here_and_from_the_root_elsewhere(
    bench: Bench, whole: Whole
) -> None:
    bench.crash(14, *OFTEN)
    run = bench.only_run()
    assert (here(run), bench.checkpoints(run)) == ([12], [10, 5])
    bench.crash(20, *OFTEN)
    assert here(run) == [18]
    bench.forget_local()
    bench.train(*OFTEN)
    assert resumptions(bench) == [(12, True), (15, False)]
    assert_as_if_undisturbed(bench, whole)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()  # the root may hold the same file under a second name
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("__0_0.distcp", flip), ("__0_0.distcp", Path.unlink), ("COMPLETE", flip)],
)
def test_a_damaged_local_one_is_passed_over(
    bench: Bench,
    whole: Whole,
    capfd: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    bench.crash(14, *OFTEN)
    run = bench.only_run()
    (newest,) = local_checkpoints(run)
    damage(local_folder(run) / newest.name / name)
    done = bench.command(capfd, *as_options(*OFTEN))
    assert done.code == 0
    (said,) = re.findall("The local checkpoint of step 12 is passed over: .*", done.err)
    assert said.endswith(
        "; the run continues from that of step 10 in the root, and nothing needs doing."
    )
    assert "continuing at step 10 of 30 from the root (attempt 2)" in done.err
    assert resumptions(bench) == [(10, False)]
    assert_as_if_undisturbed(bench, whole)


def test_a_damaged_one_in_the_root_asks_for_nothing_while_there_is_another(bench: Bench) -> None:
    bench.crash(12)
    bench.forget_local()
    run = bench.only_run()
    flip(Path(bench.root.base) / run.path(run.checkpoints()[0].folder) / "__0_0.distcp")
    bench.train()
    (event,) = bench.events(run, "checkpoint/damaged")
    assert re.fullmatch(
        r"The checkpoint of step 10 is passed over: \S+ in \S+ has sha256 \w+, expected \w+; the "
        r"run continues from that of step 5 in the root, and nothing needs doing\.",
        event.value["reason"],
    )


def test_a_damaged_one_without_another_means_to_start_again(
    bench: Bench, whole: Whole, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.crash(4, *OFTEN)
    run = bench.only_run()
    (only,) = local_checkpoints(run)
    flip(local_folder(run) / only.name / "__0_0.distcp")
    done = bench.command(capfd, *as_options(*OFTEN))
    assert done.code == 0
    (said,) = re.findall("The local checkpoint of step 2 is passed over: .*", done.err)
    assert said.endswith("; there is no other, so the run starts again, and nothing needs doing.")
    assert_as_if_undisturbed(bench, whole)


def test_damaged_here_the_same_checkpoint_is_taken_from_the_root(
    bench: Bench, whole: Whole
) -> None:
    bench.crash(12)
    run = bench.only_run()
    (newest,) = local_checkpoints(run)
    flip(local_folder(run) / newest.name / "__0_0.distcp")
    bench.train()
    assert resumptions(bench) == [(10, False)]
    assert_as_if_undisturbed(bench, whole)


def test_a_local_one_whose_records_are_not_in_the_root_does_not_count(
    bench: Bench, whole: Whole
) -> None:
    """Killed, and the journal's spool lost: what the local one covers would be missing for good."""
    died = bench.start(*as_options(*OFTEN), disturb=Disturbance(die_before=14, keep_up=True)).end()
    assert died.code == -signal.SIGKILL
    run = bench.only_run()
    assert here(run) == [12]
    shutil.rmtree(bench.cache / "journal")
    bench.train(*OFTEN)
    assert resumptions(bench) == [(10, False)]
    (event,) = bench.events(run, "checkpoint/damaged")
    assert "records that it covers" in event.value["reason"]
    assert_as_if_undisturbed(bench, whole)


def test_what_was_saved_here_while_the_root_was_away_counts_when_it_is_back(
    bench: Bench, whole: Whole
) -> None:
    base = Path(bench.root.base)
    away = base.with_name("away")

    def pull(_: Loop) -> None:
        base.rename(away)

    def die(_: Loop) -> None:
        raise RuntimeError("the plug")

    with pytest.MonkeyPatch.context() as patch:
        bench.before_step(13, pull, patch)
        bench.before_step(17, die, patch)
        with pytest.raises(RuntimeError, match="the plug"):
            bench.train(*OFTEN)
    assert not base.exists(), "a run does not begin another root"
    away.rename(base)
    run = bench.only_run()
    assert (here(run), bench.checkpoints(run)) == ([16], [10, 5])
    assert bench.events(run, "checkpoint/failed") == [], "the root has not heard of it yet"
    bench.train(*OFTEN)
    assert resumptions(bench) == [(16, True)]
    assert [event.step for event in bench.events(run, "checkpoint/failed")] == [15]
    assert_as_if_undisturbed(bench, whole)


def test_a_run_whose_root_is_away_at_its_end_is_finished_when_it_is_back(
    bench: Bench, whole: Whole
) -> None:
    base = Path(bench.root.base)
    away = base.with_name("away")

    def pull(_: Loop) -> None:
        base.rename(away)

    with pytest.MonkeyPatch.context() as patch:
        bench.before_step(27, pull, patch)
        with pytest.raises(StoreError) as raised:
            bench.train(*OFTEN)
    assert raised.value.exit_code == 75
    assert not base.exists()
    away.rename(base)
    assert bench.train(*OFTEN).exit_code == 0
    assert resumptions(bench) == [(28, True)]
    assert_as_if_undisturbed(bench, whole)


def test_each_tier_keeps_as_many_as_it_is_told(bench: Bench, whole: Whole) -> None:
    kept: list[list[int]] = []

    def look(loop: Loop) -> None:
        kept.append(here(loop.session.run))

    with pytest.MonkeyPatch.context() as patch:
        for step in (18, 30):
            bench.before_step(step, look, patch)
        settings = ("checkpoint.keep=3", "checkpoint.local_keep=2", *OFTEN)
        run = bench.train(*settings).run
    assert kept == [[16, 15], [28, 26]]
    assert bench.checkpoints(run) == [25, 20, 15]
    folders = bench.root.children(run.path("checkpoints"))
    assert len(folders) == 3, "what does not count is gone too"
    assert_as_if_undisturbed(bench, whole)


# -- a slow store ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("a_store_of_its_own_speed")
def test_the_steps_go_on_while_an_upload_is_held(
    bench: Bench, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, release = threading.Event(), threading.Event()
    plain = type(bench.root).put_file

    def put_file(root: Any, local: Path, path: str, **options: Any) -> None:
        if "/checkpoints/step-5-" in path:
            held.set()
            assert release.wait(60)
        plain(root, local, path, **options)

    def let_go(loop: Loop) -> None:
        assert held.wait(60)
        loop.saver.wait_written()
        assert (loop.saver.root_step, loop.saver.local_step) == (0, 10)
        assert here(loop.session.run) == [10, 5], "what is being uploaded is not pruned"
        release.set()
        loop.saver.finish()
        assert loop.saver.root_step == 5

    def wait(loop: Loop) -> None:
        loop.saver.finish()

    monkeypatch.setattr(type(bench.root), "put_file", put_file)
    bench.before_step(13, let_go, monkeypatch)
    for step in (16, 21, 26):
        bench.before_step(step, wait, monkeypatch)
    run = bench.train().run
    assert [event.step for event in bench.events(run, "checkpoint/postponed")] == [10]
    assert [event.step for event in bench.events(run, "checkpoint/published")] == [5, 15, 20, 25]
    assert_as_if_undisturbed(bench, whole)


@pytest.mark.usefixtures("a_store_of_its_own_speed")
def test_what_was_postponed_goes_up_with_the_next_save_of_any_kind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    plain = type(bench.root).put_file

    def put_file(root: Any, local: Path, path: str, **options: Any) -> None:
        assert "/checkpoints/step-5-" not in path or release.wait(60)
        plain(root, local, path, **options)

    def wait(loop: Loop) -> None:
        loop.saver.wait_written()
        if loop.done >= 10:
            release.set()
            loop.saver.finish()

    monkeypatch.setattr(type(bench.root), "put_file", put_file)
    for step in range(6, 31):
        bench.before_step(step, wait, monkeypatch)
    run = bench.train(*OFTEN).run
    assert [event.step for event in bench.events(run, "checkpoint/postponed")] == [10]
    published = [event.step for event in bench.events(run, "checkpoint/published")]
    assert published == [5, 12, 15, 20, 25]


# -- a full disk -----------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to write beyond ``size`` bytes of any file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("large", [20, 1], ids=["in every file", "in one"])
def test_a_full_disk_is_noticed_whichever_thread_meets_it(tmp_path: Path, large: int) -> None:
    """torch's own threads write, and it does not ask how they ended."""
    tensors = {f"model.{n}": torch.randn(100, 300 if n < large else 1) for n in range(20)}
    assert write_tensors(tmp_path / "before", tensors, 0, None)
    why = r"cannot be written to .*: \[Errno 27\] File too large"
    for number in range(3):
        with files_no_larger_than(100_000), pytest.raises(StoreError, match=why):
            write_tensors(tmp_path / f"full-{number}", tensors, 0, None)
    assert write_tensors(tmp_path / "after", tensors, 0, None)


def test_an_index_that_lacks_a_tensor_is_noticed(tmp_path: Path) -> None:
    write_tensors(tmp_path, {f"model.{n}": torch.randn(9) for n in range(9)}, 0, None)
    require_all_tensors(tmp_path)
    metadata = FileSystemReader(tmp_path).read_metadata()
    del metadata.storage_data[next(i for i in metadata.storage_data if i.fqn == "model.4")]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(OSError, match=r"model\.4 is missing in "):
        require_all_tensors(tmp_path)


def test_a_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(
    bench: Bench, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is smaller than the limit, the files of a checkpoint are larger."""
    with ExitStack() as full:
        limit = files_no_larger_than(40_000)
        bench.before_step(9, lambda _: full.enter_context(limit), monkeypatch)
        bench.before_step(13, lambda _: full.close(), monkeypatch)
        run = bench.train().run
    (failed,) = bench.events(run, "checkpoint/failed")
    assert failed.step == 10
    reason = failed.value["reason"]
    assert reason.startswith("No checkpoint at step 10: it cannot be written to ")
    assert reason.endswith(
        "[Errno 27] File too large; free some space or point TESSERA_CACHE at a larger disk."
    )
    assert not list(bench.cache.glob("checkpoints/*/*/*.partial"))
    assert [event.step for event in bench.events(run, "checkpoint/published")] == [5, 15, 20, 25]
    assert_as_if_undisturbed(bench, whole)


# -- killed while writing --------------------------------------------------------------------------


def test_killed_while_writing_it_leaves_a_partial_one_that_the_next_attempt_removes(
    bench: Bench, undisturbed: Callable[..., Whole]
) -> None:
    often = ("checkpoint.local_every_steps=1", "batch.micro_batch=1")
    process = bench.start(*as_options(*often))

    def partial() -> list[Path]:
        return list(bench.cache.glob("checkpoints/*/*/*.partial"))

    def writing() -> bool:
        """Frozen while a checkpoint is half written."""
        if not partial():
            return False
        os.kill(process.pid, signal.SIGSTOP)
        if partial():
            return True
        os.kill(process.pid, signal.SIGCONT)
        return False

    bench.until(process, writing)
    bench.kill(process)
    (left,) = partial()
    assert not (left.parent / left.stem).exists()
    assert left.stem not in [ref.name for ref in local_checkpoints(bench.only_run())]
    assert bench.train(*often).exit_code == 0
    assert partial() == []
    assert_as_if_undisturbed(bench, undisturbed("batch.micro_batch=1"))


# -- what is in it ---------------------------------------------------------------------------------


class Counting(ProtoGPT):
    """A model whose loss depends on a buffer that every forward pass of training changes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.register_buffer("passes", torch.zeros(()))
        self.passes: Tensor

    def hidden(self, *arguments: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.passes += 1
        return super().hidden(*arguments, **options) * (1 + 0.01 * torch.sin(self.passes))


def test_buffers_come_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Whole]
) -> None:
    monkeypatch.setattr("tessera.training.pretrain.ProtoGPT", Counting)
    plain = undisturbed()
    bench.crash(13)
    bench.train()
    assert bench.resumed(bench.only_run()) == [None, 10]
    assert_as_if_undisturbed(bench, plain)


def another_version(folder: Path) -> None:
    """Make a checkpoint one of a later version: whole, under its own digest."""
    record = json.loads((folder / "COMPLETE").read_bytes())
    del record["sha256"]
    record["format"] = "tessera-checkpoint-3"
    record["sha256"] = sha256_bytes(canonical_json(record))
    (folder / "COMPLETE").unlink()
    (folder / "COMPLETE").write_bytes(canonical_json(record))


@pytest.mark.parametrize("local", [True, False])
def test_a_checkpoint_of_another_version_is_refused_and_not_passed_over(
    bench: Bench, capfd: pytest.CaptureFixture[str], local: bool
) -> None:
    bench.crash(12)
    run = bench.only_run()
    newest = run.checkpoints()[0]
    if local:
        another_version(local_folder(run) / newest.name)
    else:
        bench.forget_local()
        another_version(Path(bench.root.base) / run.path(newest.folder))
    before = bench.root.files("")
    refused = bench.command(capfd)
    assert refused.code == 2
    assert (
        " is of format 'tessera-checkpoint-3', this version of tessera reads "
        "'tessera-checkpoint-2'; use the version that wrote it, or start another run with --new.\n"
    ) in refused.err
    assert refused.err.count("\n") == 1
    assert bench.root.files("") == before


def test_a_save_is_quick_to_hand_over_and_says_what_it_cost(bench: Bench) -> None:
    began = time.monotonic()
    run = bench.train().run
    took = time.monotonic() - began
    stalls = bench.points(run, "checkpoint/stall_s")
    uploads = bench.points(run, "checkpoint/upload_s")
    assert list(stalls) == [5, 10, 15, 20, 25]
    assert list(uploads) == [5, 10, 15, 20, 25]
    assert 0 < sum(stalls.values()) + sum(uploads.values()) < took
