"""Runs that go back: to where, without which samples, and the same after any kill."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tessera.errors import SupersededError
from tessera.training.loop import Loop
from tessera.training.pretrain import PretrainProgram
from tests.training.conftest import as_options, assert_as_if_undisturbed
from tests.training.disturb import CALM, Disturbance, at

if TYPE_CHECKING:
    from tests.training.conftest import Bench, Whole

# The log point at step 12 has seen two of them, the one at 15 has seen three.
BREAKING = Disturbance(nan=at(11, 13), spike=at(12), keep_up=True)


@pytest.fixture(scope="module")
def rolled(undisturbed: Callable[..., Whole]) -> Whole:
    """The run that goes back once."""
    with BREAKING.here():
        return undisturbed(*CALM)


def test_it_goes_back_and_leaves_the_samples_out_for_good(bench: Bench, rolled: Whole) -> None:
    """Afterwards the run is the one that those samples were never part of."""
    asked: list[int] = []
    plain = PretrainProgram.batch

    def without(program: PretrainProgram, first: int) -> Any:
        first = first if first < 80 else first + 24
        asked.append(first)
        return plain(program, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainProgram, "batch", without)
        bench.train(*CALM)
    assert asked == [*range(0, 80, 8), *range(104, 264, 8)]
    assert_as_if_undisturbed(bench, rolled)


def test_what_a_run_that_went_back_records(bench: Bench) -> None:
    with BREAKING.here():
        run = bench.train(*CALM).run
    first, second = run.attempts()
    assert run.endings()[first.id].outcome == "ROLLED_BACK"
    assert run.endings()[second.id].outcome == "FINISHED"
    assert bench.resumed(run) == [None, 10]
    (rollback,) = run.rollbacks()
    assert rollback.attempt.startswith("2-")
    assert (rollback.to_step, rollback.excluded, rollback.count) == (10, ((80, 104),), 1)
    assert rollback.reason.startswith("3 of the steps 11 to 15 could not be applied (a loss or ")
    (event,) = bench.events(run, "run/rolled_back")
    assert event.value["to_step"] == 10
    assert event.value["excluded"] == [[80, 104]]
    (lost,) = bench.events(run, "attempt/resumed")
    assert (lost.value["lost_attempt"], lost.value["lost_steps"]) == (first.id, 5)
    assert [e.step for e in bench.events(run, "stability/skipped")] == [11, 12, 13]
    # In the surviving lineage nothing was skipped, and every log point is there once.
    assert list(bench.points(run)) == list(range(3, 31, 3))
    assert bench.points(run, "train/skipped_steps") == {}
    assert bench.checkpoints(run) == [25, 20]
    for ref in run.checkpoints():
        state = bench.root.read_json(run.path(ref.folder, "COMPLETE"))["state"]["samples"]
        assert (state["excluded"], state["skipped"], state["rollbacks"]) == ([[80, 104]], [], 1)


@pytest.mark.parametrize(
    ("disturbance", "resumed"),
    [
        (BREAKING.but(die_before=11), [None, 10, 10]),  # before the bad steps
        (BREAKING.but(die_before=14), [None, 10, 10]),  # before the log point that goes back
        (BREAKING.but(die_after_rollback=True), [None, 10]),  # decided, and no attempt yet
        (BREAKING.but(die_before=13, die_in=2), [None, 10, 10]),  # before its first checkpoint
        (BREAKING.but(die_before=17, die_in=2), [None, 10, 15]),  # after it
    ],
    ids=["before", "unjudged", "decided", "begun", "saved"],
)
def test_killed_around_a_rollback_the_losses_are_the_same(
    bench: Bench, rolled: Whole, disturbance: Disturbance, resumed: list[int | None]
) -> None:
    bench.die_then_finish(disturbance, *CALM)
    run = bench.only_run()
    assert len(run.rollbacks()) == 1
    assert bench.resumed(run) == resumed
    assert_as_if_undisturbed(bench, rolled)


@pytest.mark.parametrize(
    ("step", "elsewhere"), [(8, True), (10, False), (11, True), (13, False), (14, True)]
)
def test_a_preemption_changes_nothing_about_going_back(
    bench: Bench, rolled: Whole, step: int, elsewhere: bool
) -> None:
    """Its checkpoint is of an odd step, even of one amid the bad steps: no place to go back to."""
    with BREAKING.here():
        bench.stop_before(step, *CALM)
        if elsewhere:
            bench.forget_local()
        assert bench.train(*CALM).exit_code == 0
    run = bench.only_run()
    assert bench.resumed(run)[1] == step
    assert [rollback.to_step for rollback in run.rollbacks()] == [10]
    assert_as_if_undisturbed(bench, rolled)


def test_it_goes_back_to_a_regular_checkpoint_and_not_to_one_of_a_preemption(bench: Bench) -> None:
    """Else where a run goes back to would depend on when a machine was taken away."""
    with Disturbance(nan=at(13, 14, 15)).here():
        bench.stop_before(12, *CALM)
        run = bench.train(*CALM).run
    assert bench.resumed(run) == [None, 12, 10]
    assert [rollback.excluded for rollback in run.rollbacks()] == [((96, 120),)]


def test_the_second_time_it_has_diverged(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    # After going back, step 11 reads sample 104 and step 13 reads 120.
    with BREAKING.but(nan=(*BREAKING.nan, 120, 128, 136)).here():
        stopped = bench.command(capfd, "--quiet", *as_options(*CALM))
        run = bench.only_run()
        assert stopped.code == 3
        assert stopped.err == (
            f"Error: Run {run.id} diverged: 3 of the steps 13 to 15 could not be applied (a loss "
            "or gradient norm that is not finite, or a spike), and the run went back 1 times "
            "already; lower optimizer.lr or optimizer.clip_norm and start again with --new.\n"
        )
        assert [run.endings()[a.id].outcome for a in run.attempts()] == ["ROLLED_BACK", "DIVERGED"]
        assert len(run.rollbacks()) == 1
        assert len(bench.events(run, "run/diverged")) == 1
        assert run.finished() is None
        again = bench.command(capfd, "--quiet", *as_options(*CALM))
    assert (again.code, again.err) == (3, stopped.err), "and it stays so"


@pytest.mark.parametrize(
    ("settings_", "bad", "why"),
    [
        ((), at(1, 2, 3), "there is no checkpoint from before them to go back to"),
        (
            # The only checkpoint that is left at the log point is of step 14.
            ("checkpoint.every_steps=2", "checkpoint.keep=1", "log_every_steps=15"),
            at(11, 12, 13),
            "there is no checkpoint from before them to go back to",
        ),
        (("stability.rollbacks=0",), at(11, 12, 13), "the run went back 0 times already"),
    ],
)
def test_where_it_cannot_go_back_it_has_diverged(
    bench: Bench,
    capfd: pytest.CaptureFixture[str],
    settings_: tuple[str, ...],
    bad: tuple[int, ...],
    why: str,
) -> None:
    with Disturbance(nan=bad).here():
        stopped = bench.command(capfd, "--quiet", *as_options(*CALM, *settings_))
    run = bench.only_run()
    assert stopped.code == 3
    assert f", and {why}; lower optimizer.lr" in stopped.err
    assert stopped.err.count("\n") == 1
    ending = bench.last_ending(run)
    assert (ending.outcome, ending.exit_code) == ("DIVERGED", 3)
    assert run.rollbacks() == []


def test_with_all_earlier_checkpoints_gone_it_goes_back_to_the_oldest(bench: Bench) -> None:
    """The steps up to it stay; what was bad after it is left out."""
    with Disturbance(nan=at(11, 12, 13)).here():
        settings_ = (*CALM, "checkpoint.every_steps=4", "checkpoint.keep=1")
        run = bench.train(*settings_, "log_every_steps=15").run
    (rollback,) = run.rollbacks()
    assert (rollback.to_step, rollback.excluded) == (12, ((96, 104),))
    assert run.finished() is not None
    assert [e.step for e in bench.events(run, "stability/skipped")] == [11, 12, 13]


def test_an_attempt_that_was_superseded_decides_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rollback would give up checkpoints that the other one may be working on."""

    def take_over(loop: Loop) -> None:
        loop.session.run.start_attempt(bench.place(), None)

    bench.before_step(14, take_over, monkeypatch)
    with BREAKING.here(), pytest.raises(SupersededError):
        bench.train(*CALM)
    assert bench.only_run().rollbacks() == []


# -- fine-tuning -----------------------------------------------------------------------------------


def test_a_fine_tuning_goes_back_too(bench: Bench, whole: Whole) -> None:
    give_base(bench, whole)
    settings_ = ("stability.max_skips=2", "checkpoint.keep=4")
    with Disturbance(nan=tuple(4 * (step - 1) for step in (11, 12, 13))).here():
        bench.crash(14, *settings_, name="voice")
        result = bench.train(*settings_, name="voice")
    run = result.run
    (rollback,) = run.rollbacks()
    assert (rollback.to_step, rollback.excluded) == (10, ((40, 52),))
    assert bench.resumed(run) == [None, 12, 10]
    assert result.exit_code == 0
    losses = bench.points(run)
    assert all(math.isfinite(loss) for loss in losses.values())
    assert bench.root.children(run.path("adapters")) == ["ep1", "ep2", "ep3"]


def give_base(bench: Bench, whole: Whole) -> None:
    """The undisturbed base, in this root."""
    for file in (whole.root / "runs").rglob("*"):
        target = Path(bench.root.base) / file.relative_to(whole.root)
        if file.is_file() and "checkpoints" not in file.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(file)
