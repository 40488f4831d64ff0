"""Steps that are not applied: judged by the rule, recorded, and the same after any kill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera.experiment import Stability
from tessera.training.loop import Loop
from tessera.training.stability import LEAST_SPREAD, PATIENCE, GoBackError, Skips, Verdict, Watch
from tests.training.conftest import assert_as_if_undisturbed
from tests.training.disturb import CALM, PER_STEP, Disturbance, at

if TYPE_CHECKING:
    from tests.training.conftest import Bench, Whole

CPU = torch.device("cpu")


# -- the rule, against plain numpy -----------------------------------------------------------------


class ByHand:
    """The rule in a few lines of float64; ``near`` is true where rounding could decide."""

    def __init__(self, window: int, sigma: float) -> None:
        self.window, self.sigma = window, sigma
        self.kept: list[tuple[float, float]] = []
        self.steep = 0

    def judge(self, loss: float, norm: float) -> tuple[bool, bool]:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True, False
        ceilings = [self.ceiling(i) for i in (0, 1)]
        pairs = list(zip((loss, norm), ceilings, strict=True))
        near = any(abs(value - ceiling) < 1e-4 * ceiling < math.inf for value, ceiling in pairs)
        if loss > ceilings[0]:
            return True, near
        steep = norm > ceilings[1]
        self.steep = self.steep + 1 if steep else max(0, self.steep - 1)
        return steep and self.steep <= PATIENCE, near

    def ceiling(self, which: int) -> float:
        past = [pair[which] for pair in self.kept]
        if len(past) < self.window // 2:
            return math.inf
        recent = np.array(past[-self.window :])
        spread = recent.std(ddof=1) if len(recent) > 1 else 0.0
        return float(recent.mean() + self.sigma * max(spread, LEAST_SPREAD * recent.mean()))


def figures_of(seed: int, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step: mostly ordinary, now and then far off or no number."""
    chance = np.random.default_rng(seed)
    figures = chance.normal(3.0, 0.2, (steps, 2))
    figures *= np.where(chance.random((steps, 2)) < 0.1, chance.uniform(1.1, 30, (steps, 2)), 1)
    none = chance.choice([math.nan, math.inf, -math.inf], (steps, 2))
    figures = np.where(chance.random((steps, 2)) < 0.05, none, figures)
    return [(float(a), float(b)) for a, b in figures.astype(np.float32)]


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(4, 12),
    sigma=st.sampled_from([1.0, 3.0, 6.0]),
    seed=st.integers(0, 2**32),
    split=st.integers(0, 60),
)
def test_the_watch_judges_by_the_rule(window: int, sigma: float, seed: int, split: int) -> None:
    """Over several rounds of the window, and continued in another watch from its tensors."""
    figures = figures_of(seed, 60)
    chosen = Stability(window=window, sigma=sigma)
    watch, by_hand = Watch(chosen, CPU), ByHand(window, sigma)
    read: list[Verdict] = []
    for step, (loss, norm) in enumerate(figures, 1):
        if step == split:
            read += watch.read()
            other = Watch(chosen, CPU)
            for name, tensor in other.tensors().items():
                tensor.copy_(watch.tensors()[name])
            watch = other
        bad, near = by_hand.judge(loss, norm)
        said = watch.judge(step, torch.tensor(loss), torch.tensor(norm))
        assert said.dtype == torch.float32
        assert float(said) == float(bad) or near
        if float(said) == 0.0:
            by_hand.kept.append((loss, norm))
    read += watch.read()
    assert watch.read() == []
    assert [verdict.step for verdict in read] == list(range(1, len(figures) + 1))
    assert sum(verdict.applied for verdict in read) == len(by_hand.kept)
    for verdict, (loss, norm) in zip(read, figures, strict=True):
        np.testing.assert_equal((verdict.loss, verdict.norm), (loss, norm))


def test_only_numbers_that_are_not_finite_count_until_half_a_window_was_applied() -> None:
    watch = Watch(Stability(window=8, sigma=6.0), CPU)

    def bad(loss: float) -> bool:
        return bool(watch.judge(1, torch.tensor(loss), torch.tensor(1.0)))

    assert [bad(loss) for loss in (3.0, 900.0, math.nan, 3.0)] == [False, False, True, False]
    watch = Watch(Stability(window=8, sigma=6.0), CPU)
    assert not any(bad(3.0) for _ in range(3))
    assert not bad(3.1), "the fourth applied step still has only three behind it"
    assert bad(900.0)
    assert bad(math.inf)


def test_the_window_forgets_what_is_older() -> None:
    """A loss of 9 is no spike while others of 9 are in the window, and one when they have left."""
    watch, one, nine = Watch(Stability(window=8, sigma=6.0), CPU), torch.tensor(1.0), 9.0
    for loss in (nine, 1.0, nine, 1.0, *[1.0] * 7):
        assert float(watch.judge(1, torch.tensor(loss), one)) == 0.0
    assert float(watch.judge(1, torch.tensor(nine), one)) == 1.0
    watch = Watch(Stability(window=8, sigma=6.0), CPU)
    for loss in (nine, 1.0, nine, 1.0, *[1.0] * 4):
        watch.judge(1, torch.tensor(loss), one)
    assert float(watch.judge(1, torch.tensor(nine), one)) == 0.0


def steps_of(watch: Watch, losses: object, norms: object) -> list[bool]:
    """Which of these were applied."""
    pairs = zip(torch.as_tensor(losses), torch.as_tensor(norms), strict=True)
    return [not bool(watch.judge(1, loss, norm)) for loss, norm in pairs]


def settled(chance: np.random.Generator, window: int = 128) -> Watch:
    """After a window of steps with losses of about 5.4 and norms of about 0.42."""
    watch = Watch(Stability(window=window), CPU)
    losses, norms = chance.normal(5.4, 0.05, window), chance.normal(0.42, 0.04, window)
    assert all(steps_of(watch, losses.clip(5.2, 5.6), norms.clip(0.3, 0.54)))
    return watch


STEEP = [0.832, 0.804, 0.784, 0.784, 0.910, 0.789, 0.918, 0.864, 0.883, 0.803]
"""Gradient norms of a run that was ended by them, after about 0.42; its losses were ordinary."""


@pytest.mark.parametrize("window", [128, 1024])
@pytest.mark.parametrize("times", [1.0, 10.0])
def test_a_gradient_norm_that_stays_high_at_an_ordinary_loss_stops_nobody(
    window: int, times: float
) -> None:
    chance = np.random.default_rng(1)
    watch = settled(chance, window)
    norms = [times * norm for norm in STEEP]
    applied = steps_of(watch, chance.normal(5.35, 0.08, 10), norms)
    assert applied == [False] * PATIENCE + [True] * 7
    assert Stability().max_skips > PATIENCE
    assert all(steps_of(watch, [5.4] * 10, [0.42] * 10))
    assert steps_of(watch, [5.4] * 3, [0.42, 90.0 * times, 0.42]) == [True, False, True]


def test_a_spoilt_step_in_between_neither_ends_nor_lengthens_a_steep_place() -> None:
    watch = settled(np.random.default_rng(1))
    losses = [5.4, 5.4, math.nan, 9.0, 5.4, 5.4]
    assert steps_of(watch, losses, [0.9] * 6) == [False] * 5 + [True]


def test_a_loss_that_stays_high_is_never_taken_for_ordinary() -> None:
    chance = np.random.default_rng(2)
    assert not any(steps_of(settled(chance), [7.0] * 200, chance.normal(0.42, 0.04, 200)))


def test_one_wild_gradient_norm_hides_no_later_one() -> None:
    chance = np.random.default_rng(3)
    assert steps_of(settled(chance), [5.4] * 4, [1e6, 0.42, 0.9, 0.42]) == [False, True] * 2


def test_a_flat_loss_does_not_spike_by_rounding() -> None:
    watch = Watch(Stability(window=8, sigma=6.0), CPU)
    for _ in range(8):
        assert float(watch.judge(1, torch.tensor(3.0), torch.tensor(1.0))) == 0.0
    assert float(watch.judge(1, torch.tensor(3.0 * 1.061), torch.tensor(1.0))) == 1.0
    assert float(watch.judge(1, torch.tensor(3.0 * 1.059), torch.tensor(1.0))) == 0.0


# -- which samples ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    per_step=st.integers(1, 16),
    blocks=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6),
)
def test_no_sample_is_read_twice_and_none_that_is_left_out(
    per_step: int, blocks: list[tuple[int, int]]
) -> None:
    ranges = [(a * per_step, (a + n) * per_step) for a, n in blocks]
    skips = Skips(Stability(), per_step)
    for one in ranges:  # one after the other, as rollbacks come
        skips.exclude([one])
    together = Skips(Stability(), per_step)
    together.exclude(ranges)
    assert skips.excluded == together.excluded
    left_out = {sample for first, end in ranges for sample in range(first, end)}
    firsts = [skips.first_sample(step) for step in range(80)]
    read = [first + place for first in firsts for place in range(per_step)]
    assert firsts == sorted(firsts)
    assert read == [n for n in range(read[-1] + 1) if n not in left_out], "all others, in order"
    restored = Skips(Stability(), per_step)
    restored.restore(json.loads(json.dumps(skips.state())))
    assert [restored.first_sample(step) for step in range(80)] == firsts


@given(bad=st.sets(st.integers(1, 60)), every=st.integers(1, 12), allowed=st.integers(0, 5))
def test_it_goes_back_when_more_than_so_many_of_a_window_failed(
    bad: set[int], every: int, allowed: int
) -> None:
    window = 10
    skips = Skips(Stability(window=window, max_skips=allowed), PER_STEP)
    for done in range(1, 61):
        if done in bad:
            assert skips.note(Verdict(done, False, math.nan, 1.0)) == (
                (done - 1) * PER_STEP, done * PER_STEP,
            )  # fmt: skip
        if done % every:
            continue
        failed = [step for step in bad if done - window < step <= done]
        if len(failed) <= allowed:
            skips.judge(done)
            continue
        with pytest.raises(GoBackError) as caught:
            skips.judge(done)
        assert caught.value.first_step == min(failed)
        assert caught.value.excluded == ((min(failed) - 1) * PER_STEP, max(failed) * PER_STEP)
        skips.exclude([caught.value.excluded])
        skips.judge(done)  # what is left out is not counted again
        return


# -- a step that is not applied --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_a_bad_step_changes_nothing_but_its_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    states: list[dict[str, Tensor]] = []

    def look(loop: Loop) -> None:
        states.append({name: tensor.clone() for name, tensor in loop._tensors().items()})

    for step in (11, 12, 13):
        bench.before_step(step, look, monkeypatch)
    bad = Disturbance(nan=at(12)) if kind == "nan" else Disturbance(spike=at(12))
    with bad.here():
        result = bench.train(*CALM)
    earlier, before, after = states
    changed = [name for name in before if not before[name].equal(after[name])]
    # Not weights, not moments, not AdamW's count of steps. This spike is one by its norm alone.
    assert changed == ([] if kind == "nan" else ["stability.steep"])
    assert not before["model.norm.weight"].equal(earlier["model.norm.weight"])
    assert float(after["optimizer.norm.weight.step"]) == 11.0

    run = result.run
    assert result.text == "Finished all 30 steps. 1 of them were not applied."
    (event,) = bench.events(run, "stability/skipped")
    found = (event.step, event.value["first_sample"], event.value["end_sample"])
    assert found == (12, 88, 96)
    assert (event.value["loss"] == "NaN") == (kind == "nan")
    assert bench.points(run, "train/skipped_steps") == dict.fromkeys(range(12, 31, 3), 1.0)
    for ref in run.checkpoints():
        record = bench.root.read_json(run.path(ref.folder, "COMPLETE"))
        assert record["state"]["samples"]["skipped"] == [[88, 96]]
    losses = bench.points(run)
    assert list(losses) == list(range(3, 31, 3))
    assert all(math.isfinite(loss) for loss in losses.values())


def test_the_mean_at_a_log_point_is_over_the_steps_that_were_applied(bench: Bench) -> None:
    each = bench.points(bench.train(*CALM, "log_every_steps=1").run)
    with Disturbance(nan=at(12)).here():
        found = bench.points(bench.train(*CALM, new=True).run)
    assert found[12] == pytest.approx((each[10] + each[11]) / 2, rel=1e-6)
    assert {step: found[step] for step in (3, 6, 9)} == {
        step: pytest.approx(sum(each[n] for n in range(step - 2, step + 1)) / 3, rel=1e-6)
        for step in (3, 6, 9)
    }


def test_a_log_point_with_no_applied_step_has_no_loss(bench: Bench) -> None:
    with Disturbance(nan=at(10, 11)).here():
        run = bench.train(*CALM, "log_every_steps=2", "checkpoint.every_steps=7").run
    assert 12 in bench.points(run)
    with Disturbance(nan=at(11, 12)).here():
        run = bench.train(*CALM, "log_every_steps=2", new=True).run
    assert 12 not in bench.points(run)
    assert 12 in bench.points(run, "train/lr")


SKIPPING = Disturbance(nan=at(10), spike=at(11), keep_up=True)


@pytest.fixture(scope="module")
def skipping(undisturbed: Callable[..., Whole]) -> Whole:
    """The run whose steps 10, which a checkpoint follows, and 11 are not applied."""
    with SKIPPING.here():
        return undisturbed(*CALM)


@pytest.mark.parametrize(
    ("step", "resumed"),
    [
        (10, 5),  # before the bad steps
        (11, 10),  # between two of them: the first is in the checkpoint, and not logged yet
        (12, 10),  # before they are logged
        (13, 10),  # after
    ],
)
def test_killed_around_a_skipped_step_the_losses_are_the_same(
    bench: Bench, skipping: Whole, step: int, resumed: int
) -> None:
    bench.die_then_finish(SKIPPING.but(die_before=step), *CALM)
    assert bench.resumed(bench.only_run()) == [None, resumed]
    assert_as_if_undisturbed(bench, skipping)


def test_stopped_between_a_skipped_step_and_the_log_point(bench: Bench, skipping: Whole) -> None:
    with SKIPPING.here():
        bench.stop_before(12, *CALM)
        assert bench.train(*CALM).exit_code == 0
    assert_as_if_undisturbed(bench, skipping)
    steps = {e.step for e in bench.events(bench.only_run(), "stability/skipped")}
    assert steps == {10, 11}
