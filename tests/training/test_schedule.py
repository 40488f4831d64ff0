from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.experiment import Cosine, LinearDecay
from tessera.training.schedule import learning_rate

PEAK, FINAL = 2e-4, 1e-5


def make(name: str, warmup: int, final: float = FINAL, share: float = 0.2) -> Cosine | LinearDecay:
    if name == "cosine":
        return Cosine(name="cosine", warmup_steps=warmup, final_lr=final)
    return LinearDecay(
        name="linear_decay", warmup_steps=warmup, final_lr=final, decay_fraction=share
    )


@pytest.mark.parametrize("name", ["cosine", "linear_decay"])
@given(
    warmup=st.integers(0, 50),
    more=st.integers(2, 300),
    share=st.floats(0.001, 1.0),
    final=st.floats(0.0, PEAK),
)
def test_up_to_the_peak_then_never_up_again(
    name: str, warmup: int, more: int, share: float, final: float
) -> None:
    steps = warmup + more
    schedule = make(name, warmup, final, share)
    rates = [learning_rate(schedule, PEAK, step, steps) for step in range(steps)]
    assert rates[0] > 0
    rise, fall = rates[: warmup + 1], rates[warmup:]
    assert rise[:warmup] == [pytest.approx(PEAK * (n + 1) / warmup) for n in range(warmup)]
    assert fall[0] == pytest.approx(PEAK)
    assert max(rates) <= PEAK * (1 + 1e-12)
    assert all(now <= before * (1 + 1e-12) for before, now in pairwise(fall))
    assert rates[-1] == pytest.approx(final, rel=1e-9, abs=1e-18)


def test_a_cosine_is_exact_at_its_quarters() -> None:
    schedule = make("cosine", 200)
    steps = 200 + 4001  # the last step is a whole half wave after the warm-up
    at = [learning_rate(schedule, PEAK, 200 + quarter * 1000, steps) for quarter in range(5)]
    cosines = [1, math.sqrt(0.5), 0, -math.sqrt(0.5), -1]
    expected = [FINAL + (PEAK - FINAL) * (1 + c) / 2 for c in cosines]
    assert at == [pytest.approx(value, rel=1e-12) for value in expected]
    assert at[2] == pytest.approx((PEAK + FINAL) / 2, rel=1e-12)


def test_a_linear_decay_is_flat_then_straight() -> None:
    schedule = make("linear_decay", 10, share=0.5)
    rates = [learning_rate(schedule, PEAK, step, 101) for step in range(101)]
    start = 50
    assert rates[10 : start + 1] == [PEAK] * (start + 1 - 10)
    slope = (FINAL - PEAK) / (100 - start)
    assert rates[start:] == [pytest.approx(PEAK + slope * n) for n in range(101 - start)]


def test_a_decay_shorter_than_a_step_still_ends_low() -> None:
    rates = [
        learning_rate(make("linear_decay", 2, share=0.001), PEAK, step, 20) for step in range(20)
    ]
    assert rates[-2:] == [PEAK, pytest.approx(FINAL)]


@pytest.mark.parametrize("name", ["cosine", "linear_decay"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_a_run_of_one_step_learns(name: str, warmup: int) -> None:
    assert learning_rate(make(name, warmup), PEAK, 0, 1) > 0
