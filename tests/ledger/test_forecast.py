"""What a forecast is worth, over runs of a generator that knows nothing of it."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest

from tessera.ledger.forecast import Forecast, Forecaster, Point
from tessera.ledger.pace import Pace
from tests.ledger.generator import (
    EVALUATE_EVERY,
    LOG_EVERY,
    REGIMES,
    SAVE_EVERY,
    STEPS,
    LogPoint,
    MadeRun,
    make_run,
)

EVERY = {"evaluate": EVALUATE_EVERY, "checkpoint": SAVE_EVERY}
RUNS = 80  # of each regime
MOMENTS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def foresee(run: MadeRun, share: float, *, through_json: bool = False) -> Forecast:
    """The forecast at the first log point beyond ``share`` of the run, as a trainer makes it."""
    forecaster, pace, attempt = Forecaster(SAVE_EVERY), Pace(), 1
    for at in run.points:
        if at.attempt != attempt:
            pace, attempt = Pace(), at.attempt
            if through_json:
                state = json.loads(json.dumps(forecaster.state()))
                forecaster = Forecaster.of(SAVE_EVERY, state)
        pace.steps(LOG_EVERY, at.seconds, STEPS - at.step)
        seconds = pace.seconds_per_step(EVERY)
        assert seconds is not None
        forecaster.observe(_point(at), seconds, STEPS)
        if at.step >= share * STEPS:
            return forecaster.forecast(STEPS - at.step, seconds)
        for kind, took in at.asides:
            pace.aside(kind, took)
    raise AssertionError("the run is over")


def _point(at: LogPoint) -> Point:
    return Point(at.attempt, at.step, at.hours, at.usd, at.usd_per_hour)


@cache
def hits(regime: str) -> tuple[int, int]:
    """How many runs of a regime ended within the interval, and how many hours did."""
    dollars = hours = 0
    for seed in range(RUNS):
        run = make_run(regime, 10_000 + seed)
        share = random.Random(f"{regime} {seed}").choice(MOMENTS)
        found = foresee(run, share)
        assert found.usd_low is not None
        assert found.usd_high is not None
        assert found.seconds_low is not None
        assert found.seconds_high is not None
        dollars += found.usd_low <= run.usd <= found.usd_high
        now = next(at.hours for at in run.points if at.step >= share * STEPS)
        hours += found.seconds_low <= 3600 * (run.hours - now) <= found.seconds_high
    return dollars, hours


def test_four_of_five_runs_end_within_the_interval() -> None:
    moving = [regime for regime in REGIMES if regime != "calm"]
    assert RUNS * len(moving) >= 400
    assert 0.75 <= sum(hits(regime)[0] for regime in moving) / (RUNS * len(moving)) <= 0.85


@pytest.mark.parametrize("regime", REGIMES)
def test_no_regime_is_far_from_it(regime: str) -> None:
    dollars, hours = hits(regime)
    assert dollars / RUNS >= 0.6
    assert hours / RUNS >= 0.55


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_where_nothing_moves_the_point_is_within_three_per_cent(share: float) -> None:
    for seed in range(60):
        run = make_run("calm", seed)
        found = foresee(run, share)
        assert found.usd_at_end == pytest.approx(run.usd, rel=0.03), seed


def test_what_an_attempt_learnt_travels_with_the_checkpoint() -> None:
    run = make_run("taken away", 1)
    assert run.points[-1].attempt > 2
    straight, travelled = foresee(run, 0.9), foresee(run, 0.9, through_json=True)
    assert straight.usd_at_end == pytest.approx(travelled.usd_at_end, rel=0.02)


@pytest.mark.parametrize("state", [None, {}, {"last": {}, "seen": {}}, {"seen": 3, "last": None}])
def test_a_state_that_cannot_be_read_begins_anew(state: dict[str, object] | None) -> None:
    assert Forecaster.of(10, state).last is None


def test_the_end_is_certain() -> None:
    forecaster = Forecaster(10)
    forecaster.observe(Point(1, 90, 1.0, 2.0, 3.0), 1.0, 100)
    found = forecaster.forecast(0, 1.0)
    assert (found.usd_at_end, found.usd_low, found.usd_high, found.seconds_left) == (2, 2, 2, 0)


def test_a_young_run_is_told_wide_and_an_old_one_narrow() -> None:
    def width(share: float) -> float:
        found = foresee(make_run("everything", 5), share)
        assert found.usd_low is not None
        assert found.usd_high is not None
        return found.usd_high - found.usd_low

    assert width(0.05) > 2 * width(0.9)


def test_a_budget_bounds_what_the_end_can_cost() -> None:
    wide = Forecast(10.0, 300.0, 280.0, 340.0)
    within = wide.within(310.0, 314.0)
    assert (within.usd_low, within.usd_at_end, within.usd_high) == (300.0, 300.0, 314.0)
    beyond = Forecast(10.0, 330.0, 320.0, 340.0).within(310.0, 314.0)
    assert (beyond.usd_low, beyond.usd_at_end, beyond.usd_high) == (314.0, 314.0, 314.0)
    unknown = Forecast(10.0, None)
    assert unknown.within(1.0, 2.0) == unknown
