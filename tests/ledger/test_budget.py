"""Plans of a run that a budget ends: where the end is, how it moves, what stays back."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import InputError
from tessera.experiment import LinearDecay
from tessera.ledger.budget import OPEN, Budget, Plan, choose_budget, closing_usd, read_budget
from tessera.training.schedule import learning_rate, planned_rate

PEAK, FINAL = 1e-3, 1e-5


def schedule(warmup: int, share: float) -> LinearDecay:
    return LinearDecay(
        name="linear_decay", warmup_steps=warmup, final_lr=FINAL, decay_fraction=share
    )


@given(
    end=st.integers(1, 500), warmup=st.integers(0, 40), share=st.floats(0.01, 1.0),
)  # fmt: skip
def test_a_plan_that_never_moves_is_the_schedule_of_that_many_steps(
    end: int, warmup: int, share: float
) -> None:
    shape = schedule(warmup, share)
    plan = Plan().moved(0, end, warmup, share)
    for step in range(end):
        expected = learning_rate(shape, PEAK, step, end)
        assert planned_rate(shape, PEAK, step, plan) == pytest.approx(expected, rel=1e-12)


@given(data=st.data(), warmup=st.integers(0, 20), share=st.floats(0.05, 1.0))
def test_the_learning_rate_never_jumps_whatever_the_plans(
    data: st.DataObject, warmup: int, share: float
) -> None:
    shape = schedule(warmup, share)
    plan = Plan().moved(0, data.draw(st.integers(warmup + 5, 300)), warmup, share)
    rates: list[float] = []
    done = 0
    while done < plan.end_step and done < 400:
        rates.append(planned_rate(shape, PEAK, done, plan))
        done += 1
        if done < plan.end_step - 1 and data.draw(st.booleans()):
            before = planned_rate(shape, PEAK, done - 1, plan)
            plan = plan.moved(done, done + data.draw(st.integers(2, 200)), warmup, share)
            # The last step that was taken lies on the new line as it lay on the old one.
            assert planned_rate(shape, PEAK, done - 1, plan) == pytest.approx(before, rel=1e-12)
    after = rates[max(warmup - 1, 0) :]
    assert all(now <= last * (1 + 1e-12) for last, now in itertools.pairwise(after))
    if done == plan.end_step > warmup + 2:
        assert rates[-1] == pytest.approx(FINAL, rel=1e-9)
        # What is left of the way goes down in equal steps: none is a jump.
        line = range(plan.decay_start, plan.end_step)
        falls = [planned_rate(shape, PEAK, n, plan) for n in line]
        steps = [a - b for a, b in itertools.pairwise(falls)]
        assert max(steps) == pytest.approx(min(steps), rel=1e-6)


def test_a_decay_that_has_begun_moves_its_end_alone() -> None:
    plan = Plan().moved(0, 100, 0, 0.5)
    assert (plan.end_step, plan.decay_start, plan.level) == (100, 50, 1.0)
    longer = plan.moved(60, 140, 0, 0.5)
    assert (longer.decay_start, longer.level) == (59, plan.share(59))
    assert longer.share(139) == 0.0
    assert longer.share(60) > plan.share(60)
    shorter = plan.moved(60, 70, 0, 0.5)
    assert shorter.share(59) == plan.share(59)
    assert shorter.share(69) == 0.0


def test_before_the_decay_an_end_that_comes_near_begins_it_at_once() -> None:
    plan = Plan().moved(0, 1000, 10, 0.2)
    near = plan.moved(500, 520, 10, 0.2)
    assert (near.decay_start, near.end_step) == (499, 520)
    assert near.share(499) == 1.0
    assert 0.9 < near.share(500) < 1.0


def test_small_moves_are_not_worth_a_plan() -> None:
    plan = Plan().moved(0, 10_000, 0, 0.2)
    assert not plan.differs(plan.moved(5000, 10_050, 0, 0.2), 5000)
    assert plan.differs(plan.moved(5000, 10_051, 0, 0.2), 5000)
    assert plan.differs(plan.moved(9_990, 9_998, 0, 0.2), 9_990)
    assert not plan.differs(plan.moved(9_990, 9_999, 0, 0.2), 9_990)
    assert Plan().differs(plan, 5)


@given(
    st.builds(Plan, st.integers(0, OPEN), st.integers(0, OPEN), st.floats(0.0, 1.0)),
)
def test_a_plan_survives_its_record_to_the_last_bit(plan: Plan) -> None:
    assert Plan.of(json.loads(json.dumps(plan.state()))) == plan


@pytest.mark.parametrize("data", [{}, {"steps": 5}, {"steps": "x", "decay_start": 1, "level": 1}])
def test_what_is_no_plan_is_none(data: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError, TypeError)):
        Plan.of(data)


def test_what_the_rest_of_the_money_pays_for() -> None:
    budget = Budget(100.0, 10.0)
    assert (budget.line_usd, budget.aim_usd) == (90.0, 89.0)
    assert budget.steps_left(39.0, 0.5) == 100
    assert budget.steps_left(39.0, 0.51) == 98
    assert budget.steps_left(89.0, 0.5) == budget.steps_left(95.0, 0.5) == 0
    assert budget.steps_left(0.0, 0.0) == OPEN


def test_the_default_reserve_pays_for_the_end_of_a_run() -> None:
    model = 16 * 1_013_024_256  # the checkpoint and the model of the reference
    rented = closing_usd(2.16, rented=True, upload_bytes=model, usd_per_gb_up=0.01)
    assert rented == pytest.approx(2.16 * (600 + 60 + model / 50e6) / 3600 + 0.16208, rel=1e-3)
    own = closing_usd(2.16, rented=False, upload_bytes=model, usd_per_gb_up=0.0)
    assert own == pytest.approx(2.16 * (60 + model / 50e6) / 3600)


def test_the_option_counts_before_the_variable() -> None:
    assert choose_budget("315", "100") == (315.0, "--budget 315")
    assert choose_budget(None, "100") == (100.0, "TESSERA_BUDGET_USD=100")
    assert choose_budget(None, " ") is choose_budget(None, None) is None


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "cheap", "$315", "", " ", "1e400"])
def test_what_is_no_budget_is_a_sentence(text: str) -> None:
    with pytest.raises(InputError) as error:
        read_budget(text, "--budget")
    assert str(error.value) == (f"--budget is {text!r}; expected US dollars above 0, such as 315.")


# -- simulated runs: what is planned, stopped and spent --------------------------------------------


def spend(budget: Budget, seconds: list[float], prices: list[float], fraction: float) -> Any:
    """The loop in a few lines: log points every ten steps, a hard stop asked for at every step."""
    plan, usd, done = Plan(), 0.0, 0
    window: list[float] = []
    rates = []
    while done < plan.end_step and done < len(seconds):
        rates.append(plan.share(done))
        usd += seconds[done] * prices[done] / 3600
        window = [*window[-199:], seconds[done]]
        done += 1
        if usd >= budget.line_usd:
            return usd, done, plan, rates, True
        if done % 10 == 0:
            per_step = math.fsum(window) / len(window) * prices[done - 1] / 3600
            end = done + max(1, budget.steps_left(usd, per_step))
            new = plan.moved(done, end, 0, fraction)
            plan = new if plan.differs(new, done) else plan
    return usd, done, plan, rates, False


@given(
    noise=st.lists(st.floats(0.5, 2.0), min_size=20, max_size=60),
    turn=st.integers(0, 600),
    slower=st.floats(0.3, 4.0),
    dearer=st.floats(0.3, 4.0),
    fraction=st.floats(0.1, 0.9),
)
def test_whatever_happens_less_than_the_reserve_is_overspent(
    noise: list[float], turn: int, slower: float, dearer: float, fraction: float
) -> None:
    count = 20_000
    seconds = [noise[n % len(noise)] * (slower if n > turn else 1.0) for n in range(count)]
    prices = [2.0 * (dearer if n > turn else 1.0) for n in range(count)]
    budget = Budget(0.5, 0.02)
    usd, done, plan, rates, stopped = spend(budget, seconds, prices, fraction)
    assert done < count
    assert usd < budget.usd
    assert usd - budget.line_usd < budget.reserve_usd
    if not stopped:
        assert rates[-1] == pytest.approx(0.0, abs=1e-9)
        assert usd > 0.97 * budget.aim_usd
    assert all(now <= last + 1e-12 for last, now in itertools.pairwise(rates))
    assert plan.known
