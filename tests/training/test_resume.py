"""The first promise: killed anywhere, continued to the losses and weights of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tessera.errors import StoreError, SupersededError
from tessera.training.loop import Loop
from tests.training.conftest import assert_as_if_undisturbed
from tests.training.disturb import Disturbance

if TYPE_CHECKING:
    from tests.training.conftest import Bench, Whole

# One sequence at a time makes the steps slow enough to be interrupted.
SLOW = ("--set", "batch.micro_batch=1")


@pytest.fixture(scope="module")
def slow(undisturbed: Callable[..., Whole]) -> Whole:
    """The undisturbed run in micro-batches of one."""
    return undisturbed("batch.micro_batch=1")


# -- killed ----------------------------------------------------------------------------------------


def moments(bench: Bench) -> list[Callable[[], bool]]:
    """When to kill, attempt by attempt; each is true once what it waits for has happened."""
    chance = random.Random(20260614)
    runs = bench.folder / "root" / "runs"

    def first_loss() -> bool:
        return any(b"train/loss" in f.read_bytes() for f in bench.cache.glob("journal/**/*.jsonl"))

    def new(pattern: str, folder: Path, delay: float = 0.0) -> Callable[[], bool]:
        before: set[Path] | None = None
        seen: float | None = None

        def reached() -> bool:
            nonlocal before, seen
            found = set(folder.glob(pattern))
            before = found if before is None else before
            if seen is None and found - before:
                seen = time.monotonic()
            return seen is not None and time.monotonic() - seen >= delay

        return reached

    return [
        first_loss,
        new("checkpoints/*/*/*.partial/*", bench.cache),  # while a checkpoint is being written
        new("*/checkpoints/*/*", runs),  # while it is being published
        new("*/checkpoints/*/COMPLETE", runs, chance.uniform(0.0, 0.2)),
        new("*/checkpoints/*/COMPLETE", runs, chance.uniform(0.0, 0.2)),
        new("*/checkpoints/*/COMPLETE", runs, chance.uniform(0.0, 0.2)),
        new("*/model", runs),  # while the model is being published
    ]


def test_killed_at_many_moments_it_ends_as_if_undisturbed(bench: Bench, slow: Whole) -> None:
    for number, reached in enumerate(moments(bench), 1):
        reached()  # what is there already does not count
        process = bench.start(*SLOW, disturb=Disturbance(step_s=0.05))
        bench.until(process, reached)
        bench.kill(process)
        if number in (4, 5):  # the machine is gone too: nothing is left but what is in the root
            shutil.rmtree(bench.cache)
    done = bench.start(*SLOW).end()
    assert done.code == 0, done.err
    assert "Warning" not in done.err
    assert_as_if_undisturbed(bench, slow)

    run = bench.only_run()
    attempts = run.attempts()
    assert [attempt.number for attempt in attempts] == list(range(1, 9))
    assert list(run.endings()) == [attempts[-1].id], "a killed attempt leaves no ending"
    steps = bench.resumed(run)
    assert steps[0] is None
    assert steps[-1] == 25
    known = [step for step in steps if step is not None]
    assert known == sorted(known), "nobody goes back"
    # What a dead attempt had written on this machine only, the next one brought to the root.
    adopted = [
        name for event in bench.events(run, "attempt/resumed") for name in event.value["adopted"]
    ]
    assert adopted[-1] == attempts[-2].id
    assert not list(bench.cache.glob("journal/**/*.jsonl"))


@pytest.mark.parametrize("step", [1, 8, 15, 29])
def test_stopped_at_any_step_the_losses_are_the_same(bench: Bench, whole: Whole, step: int) -> None:
    """Between two log points the sum of the losses so far is part of the checkpoint."""

    def stop(loop: Loop) -> None:
        loop._s.stop.signal = "SIGTERM"

    with pytest.MonkeyPatch.context() as patch:
        bench.before_step(step, stop, patch)
        assert bench.train().exit_code == 75
    assert bench.checkpoints(bench.only_run())[0] == step
    assert bench.train().exit_code == 0
    assert_as_if_undisturbed(bench, whole)


def test_an_attempt_that_crashes_says_so(bench: Bench, whole: Whole) -> None:
    bench.crash(12)
    run = bench.only_run()
    ending = bench.last_ending(run)
    assert (ending.outcome, ending.exit_code, ending.step) == ("FAILED", 1, 11)
    bench.train()
    assert bench.resumed(run) == [None, 10]
    assert_as_if_undisturbed(bench, whole)


# -- damaged ---------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def alter_tokens(file: Path) -> None:
    text = file.read_text()
    assert '"tokens": 3840' in text
    file.write_text(text.replace('"tokens": 3840', '"tokens": 3841'))


def newest(bench: Bench, place: int = 0) -> Path:
    run = bench.only_run()
    return bench.folder / "root" / run.path(run.checkpoints()[place].folder)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("__0_0.distcp", flip),
        ("__0_0.distcp", cut),
        ("__0_0.distcp", Path.unlink),
        (".metadata", flip),
        ("COMPLETE", cut),
        ("COMPLETE", alter_tokens),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    bench: Bench,
    whole: Whole,
    capfd: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], Any],
) -> None:
    bench.crash(17)
    run = bench.only_run()
    assert bench.checkpoints(run) == [15, 10]
    bench.forget_local()
    damage(newest(bench) / name)
    done = bench.command(capfd)
    assert done.code == 0
    assert "The checkpoint of step 15 is passed over: " in done.err
    assert "continuing at step 10 of 30 from the root (attempt 2)" in done.err
    assert bench.resumed(run) == [None, 10]
    (event,) = bench.events(run, "checkpoint/damaged")
    assert event.value["reason"].startswith("The checkpoint of step 15 is passed over: ")
    assert_as_if_undisturbed(bench, whole)


def test_with_all_checkpoints_damaged_it_says_so_and_does_not_begin_again(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.crash(17)
    run = bench.only_run()
    bench.forget_local()
    for place in (0, 1):
        flip(newest(bench, place) / "__0_0.distcp")
    before = bench.root.files("")
    refused = bench.command(capfd)
    assert refused.code == 2
    assert refused.err.startswith(f"Error: None of the 2 checkpoints of run {run.id} is whole (The")
    assert refused.err.count("\n") == 1
    assert bench.root.files("") == before


def test_the_newest_whole_checkpoint_outlives_an_older_damaged_one_of_a_later_step(
    bench: Bench, whole: Whole
) -> None:
    bench.crash(17)
    bench.forget_local()
    flip(newest(bench) / "__0_0.distcp")
    bench.crash(14, "checkpoint.every_steps=2", "checkpoint.keep=1")
    assert bench.checkpoints(bench.only_run()) == [12], "what was passed over no longer counts"
    assert bench.train().exit_code == 0
    assert bench.resumed(bench.only_run()) == [None, 10, 12]
    assert_as_if_undisturbed(bench, whole)


# -- a full store ----------------------------------------------------------------------------------


def test_a_store_that_is_full_costs_a_checkpoint_and_not_the_run(
    bench: Bench, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = type(bench.root).put_file

    def put_file(root: Any, local: Path, path: str, **options: Any) -> None:
        if "/checkpoints/step-1" in path:
            raise StoreError(f"No space is left for {path}.")
        plain(root, local, path, **options)

    monkeypatch.setattr(type(bench.root), "put_file", put_file)
    run = bench.train().run
    assert [event.step for event in bench.events(run, "checkpoint/failed")] == [10, 15]
    assert_as_if_undisturbed(bench, whole)


def test_a_stop_without_a_checkpoint_says_where_it_will_continue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StoreError("no space is left")

    def stop(loop: Loop) -> None:
        monkeypatch.setattr("tessera.training.checkpoint.saver.write_tensors", refuse)
        loop._s.stop.signal = "SIGTERM"

    bench.before_step(8, stop, monkeypatch)
    result = bench.train()
    assert result.exit_code == 75
    assert result.text.endswith("at step 8 of 30; the same command continues at step 5.")


# -- superseded ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "kept"), [(7, [5]), (29, [25, 20])])
def test_an_attempt_that_is_superseded_stops_and_publishes_nothing_more(
    bench: Bench, capfd: pytest.CaptureFixture[str], step: int, kept: list[int]
) -> None:
    def take_over(loop: Loop) -> None:
        loop._s.run.start_attempt(bench.place(), None)

    with pytest.MonkeyPatch.context() as patch:
        bench.before_step(step, take_over, patch)
        stopped = bench.command(capfd, "--quiet")
    run = bench.only_run()
    mine, other = run.attempts()
    assert stopped.code == 2
    assert stopped.err == (
        f"Error: Attempt {mine.id} of run {run.id} stops: attempt {other.id} took over. It "
        "continues from the run's last checkpoint; this machine can be released.\n"
    )
    assert bench.checkpoints(run) == kept
    assert not bench.root.exists(run.path("model"))
    assert run.endings()[mine.id].outcome == "SUPERSEDED"
    assert run.finished() is None


def test_taken_over_during_an_upload_the_checkpoint_does_not_count(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = type(bench.root).put_file

    def put_file(root: Any, local: Path, path: str, **options: Any) -> None:
        if "/checkpoints/step-10-1-" in path and len(bench.only_run().attempts()) == 1:
            bench.only_run().start_attempt(bench.place(), None)
        plain(root, local, path, **options)

    monkeypatch.setattr(type(bench.root), "put_file", put_file)
    with pytest.raises(SupersededError):
        bench.train()
    assert bench.checkpoints(bench.only_run()) == [5]


# -- diverged --------------------------------------------------------------------------------------


def poison(loop: Loop) -> None:
    """After the step that is about to be taken a weight is not a number; its loss still is."""
    step = loop._optimizer.step

    def broken() -> None:
        step()
        with torch.no_grad():
            loop._program.model.norm.weight[0] = float("nan")

    loop._optimizer.step = broken  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (15, [10, 5]),  # a log point and a checkpoint: the loss there is still a number
        (11, [10, 5]),  # noticed at the next log point
        (30, [25, 20]),  # the last one: an evaluation and the model's publication
    ],
)
def test_weights_that_are_not_numbers_end_the_run_unpublished(
    bench: Bench,
    capfd: pytest.CaptureFixture[str],
    step: int,
    kept: list[int],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bench.before_step(step, poison, patch)
        stopped = bench.command(capfd, "--quiet")
    run = bench.only_run()
    ending = bench.last_ending(run)
    assert (stopped.code, ending.exit_code, ending.outcome) == (3, 3, "DIVERGED")
    assert stopped.err.startswith("Error: The ")
    assert f"of run {run.id}; lower optimizer.lr" in stopped.err
    assert stopped.err.count("\n") == 1
    assert bench.checkpoints(run) == kept
    assert not bench.root.exists(run.path("model"))
    assert len(bench.events(run, "run/diverged")) == 1
    assert run.finished() is None


def test_a_learning_rate_out_of_this_world_diverges(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped = bench.command(capfd, "--quiet", "--set", "optimizer.lr=1e30")
    run = bench.only_run()
    assert stopped.code == 3
    assert bench.last_ending(run).outcome == "DIVERGED"
    assert not bench.root.exists(run.path("model"))
    for ref in run.checkpoints():
        folder = bench.folder / "root" / run.path(ref.folder)
        whole = {"model.norm.weight": torch.zeros(32)}
        torch.distributed.checkpoint.state_dict_loader.load(whole, checkpoint_id=folder)
        assert bool(whole["model.norm.weight"].isfinite().all())


# -- another place ---------------------------------------------------------------------------------


def test_a_run_goes_on_where_its_root_was_moved_to(bench: Bench, whole: Whole) -> None:
    """Another machine: nothing of the first one's disk is there but the root."""
    bench.crash(12)
    shutil.rmtree(bench.cache)
    bench.move()
    bench.train()
    assert bench.resumed(bench.only_run()) == [None, 10]
    assert_as_if_undisturbed(bench, whole)
