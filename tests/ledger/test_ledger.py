from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import InputError
from tessera.ledger.forecast import forecast
from tessera.ledger.invoices import invoice_path, share_out
from tessera.ledger.meter import (
    CATEGORIES,
    Bill,
    Interval,
    Span,
    Usage,
    bill,
    file_seconds,
    subtract,
    total_usd,
)
from tessera.ledger.prices import HourlyPrice, choose_price


def usage(attempt: str, billed: float, started: float, ended: float, **changes: Any) -> Usage:
    """On instance i-1 at a cent a second (36 dollars an hour)."""
    fields: dict[str, Any] = {
        "attempt": attempt, "provider": "vast", "instance": "i-1", "billed_from": billed,
        "started_at": started, "ended_at": ended, "usd_per_hour": 36.0, **changes,
    }  # fmt: skip
    return Usage(**fields)


# -- the bill --------------------------------------------------------------------------------------


def test_one_attempt_pays_from_the_start_of_the_bill_to_its_end() -> None:
    only = bill([usage("a", 0, 40, 100)])["a"]
    assert only == Bill("a", ((0, 100),), 100, 36.0 * 100 / 3600, False)


def test_two_attempts_that_overlap_pay_each_second_once() -> None:
    bills = bill([usage("a", 0, 10, 100), usage("b", 0, 60, 150)])
    assert bills["a"].intervals == ((0, 100),)
    assert bills["b"].intervals == ((100, 150),)
    assert total_usd(bills.values()) == pytest.approx(1.5)


def test_an_idle_gap_belongs_to_the_later_attempt() -> None:
    bills = bill([usage("b", 0, 200, 300), usage("a", 0, 10, 100)])
    assert bills["a"].intervals == ((0, 100),)
    assert bills["b"].intervals == ((100, 300),)


def test_a_bill_that_begins_again_leaves_the_gap_to_nobody() -> None:
    bills = bill([usage("a", 0, 10, 100), usage("b", 190, 200, 300)])
    assert bills["b"].intervals == ((190, 300),)
    assert sum(item.seconds for item in bills.values()) == 210


def test_an_attempt_within_another_one_is_free() -> None:
    bills = bill([usage("a", 0, 10, 100), usage("b", 0, 20, 50)])
    assert (bills["b"].intervals, bills["b"].seconds, bills["b"].usd) == ((), 0, 0.0)


def test_an_attempt_around_others_pays_what_is_left_on_both_sides() -> None:
    bills = bill([usage("a", 20, 20, 30), usage("b", 40, 41, 50), usage("c", 10, 45, 60)])
    assert bills["c"].intervals == ((10, 20), (30, 40), (50, 60))
    assert bills["c"].usd == pytest.approx(0.30)


def test_runs_that_share_an_instance_share_its_bill() -> None:
    bills = bill([usage("base/1-aa", 0, 10, 100), usage("voice/1-bb", 0, 110, 120)])
    assert bills["voice/1-bb"].seconds == 20
    assert sum(item.seconds for item in bills.values()) == 120


@pytest.mark.parametrize("other", [{"instance": "i-2"}, {"provider": "runpod"}])
def test_another_instance_has_a_bill_of_its_own(other: dict[str, str]) -> None:
    bills = bill([usage("a", 0, 10, 100), usage("b", 0, 10, 100, **other)])
    assert bills["a"].seconds == bills["b"].seconds == 100


def test_attempts_of_one_instance_may_have_different_prices() -> None:
    bills = bill([usage("a", 0, 10, 100), usage("b", 0, 100, 200, usd_per_hour=72.0)])
    assert bills["a"].usd == pytest.approx(1.0)
    assert bills["b"].usd == pytest.approx(2.0)


def test_an_unknown_price_is_unknown_and_not_zero() -> None:
    bills = bill([usage("a", 0, 10, 100), usage("b", 0, 100, 200, usd_per_hour=None)])
    assert bills["b"].usd is None
    assert bills["b"].seconds == 100
    assert total_usd(bills.values()) is None
    assert total_usd([bills["a"]]) == pytest.approx(1.0)
    assert total_usd([]) == 0.0
    assert bill([usage("c", 0, 1, 2, usd_per_hour=0.0)])["c"].usd == 0.0


def test_an_estimated_end_stays_marked() -> None:
    bills = bill([usage("a", 0, 10, 100, estimated=True), usage("b", 0, 100, 200)])
    assert (bills["a"].estimated, bills["b"].estimated) == (True, False)


def test_a_bill_that_begins_after_the_start_begins_with_the_start() -> None:
    assert bill([usage("a", 50, 10, 100)])["a"].intervals == ((10, 100),)


def test_an_end_before_the_start_costs_nothing() -> None:
    bills = bill([usage("a", 100, 100, 90), usage("b", 0, 95, 120)])
    assert (bills["a"].seconds, bills["a"].intervals) == (0, ())
    assert bills["b"].seconds == 120


_TIMES = st.integers(0, 60)
_USAGES = st.lists(st.tuples(_TIMES, _TIMES, _TIMES, st.sampled_from("xy")), max_size=8).map(
    lambda rows: [
        usage(str(n), billed, started, ended, instance=instance)
        for n, (billed, started, ended, instance) in enumerate(rows)
    ]
)


def _seconds_covered(usages: list[Usage]) -> set[tuple[str, int]]:
    """The union of what is billed, second by second: slow and plainly right."""
    return {
        (u.instance, second)
        for u in usages
        for second in range(int(min(u.billed_from, u.started_at)), int(u.ended_at))
    }


@given(_USAGES)
def test_the_bills_of_an_instance_are_the_union_of_its_intervals(usages: list[Usage]) -> None:
    bills = bill(usages)
    assert set(bills) == {u.attempt for u in usages}
    owned = [
        (u.instance, second)
        for u in usages
        for start, end in bills[u.attempt].intervals
        for second in range(int(start), int(end))
    ]
    assert len(owned) == len(set(owned)), "a second was billed twice"
    assert set(owned) == _seconds_covered(usages)
    for item in bills.values():
        assert item.seconds == sum(end - start for start, end in item.intervals)
        assert all(start < end for start, end in item.intervals)
        assert list(item.intervals) == sorted(item.intervals)
        assert item.usd == pytest.approx(0.01 * item.seconds)


@given(_USAGES, st.randoms(use_true_random=False))
def test_the_bills_do_not_depend_on_the_order_of_listing(usages: list[Usage], dice: Any) -> None:
    shuffled = list(usages)
    dice.shuffle(shuffled)
    assert bill(shuffled) == bill(usages)


@given(_USAGES)
def test_an_attempt_that_comes_later_takes_nothing_from_those_before(usages: list[Usage]) -> None:
    """Otherwise yesterday's published cost would change today."""
    before = bill(usages)
    late = bill([*usages, usage("late", 0, 1000, 1100, instance="x")])
    assert {name: late[name] for name in before} == before


@given(
    st.tuples(_TIMES, _TIMES),
    st.lists(st.tuples(_TIMES, _TIMES), max_size=5),
)
def test_subtraction_second_by_second(wanted: Interval, raw: list[Interval]) -> None:
    taken: list[Interval] = []
    for interval in raw:
        taken = sorted([*taken, *subtract(interval, taken)])
    left = subtract(wanted, taken)
    seconds = [s for start, end in left for s in range(int(start), int(end))]
    covered = {s for start, end in taken for s in range(int(start), int(end))}
    assert seconds == [s for s in range(int(wanted[0]), int(wanted[1])) if s not in covered]


# -- filing ----------------------------------------------------------------------------------------


def spend(
    bill_: Bill,
    *spans: Span,
    started: float = 40,
    setup: float | None = None,
    kept: int | None = None,
) -> dict[str, float]:
    """The categories that are not empty."""
    filed = file_seconds(bill_, spans, started_at=started, setup_started_at=setup, kept_upto=kept)
    assert set(filed) == set(CATEGORIES)
    assert sum(filed.values()) == pytest.approx(bill_.seconds)
    return {name: seconds for name, seconds in filed.items() if seconds}


def of(*intervals: Interval) -> Bill:
    return Bill("a", intervals, sum(end - start for start, end in intervals), None, False)


def test_time_before_the_process_is_provision_and_from_setup_on_setup() -> None:
    assert spend(of((0, 100))) == {"provision": 40, "idle": 60}
    assert spend(of((0, 100)), setup=25) == {"provision": 25, "setup": 15, "idle": 60}
    assert spend(of((0, 100)), setup=-5) == {"setup": 40, "idle": 60}
    assert spend(of((0, 100)), setup=70) == {"provision": 40, "idle": 60}
    assert spend(of((0, 30)), setup=25) == {"provision": 25, "setup": 5}
    assert spend(of((40, 100)), setup=25) == {"idle": 60}


def test_provision_is_counted_in_what_one_owns_only() -> None:
    owned = of((0, 10), (20, 30), (35, 100))
    assert spend(owned, setup=25) == {"provision": 15, "setup": 10, "idle": 60}


def test_spans_are_filed_and_the_rest_is_idle() -> None:
    spans = [Span("a", "train", 30, 10), Span("a", "data_wait", 5, 10), Span("a", "train", 10, 20)]
    assert spend(of((0, 100)), *spans) == {
        "provision": 40, "train": 40, "data_wait": 5, "idle": 15,
    }  # fmt: skip


def test_what_was_computed_again_is_lost_whatever_it_was_spent_on() -> None:
    spans = [
        Span("a", "train", 20, 10), Span("a", "checkpoint", 5, 10),
        Span("a", "train", 10, 11), Span("a", "evaluate", 5, 20),
    ]  # fmt: skip
    assert spend(of((0, 100)), *spans, kept=10) == {
        "provision": 40, "train": 20, "checkpoint": 5, "lost": 15, "idle": 20,
    }  # fmt: skip
    assert spend(of((0, 100)), *spans, kept=None).get("lost") is None
    assert spend(of((0, 100)), *spans, kept=0)["lost"] == 40


def test_spans_beyond_the_bill_are_scaled_to_it() -> None:
    spans = [Span("a", "train", 90, 10), Span("a", "evaluate", 30, 10)]
    assert spend(of((40, 100)), *spans) == {
        "train": pytest.approx(45), "evaluate": pytest.approx(15),
    }  # fmt: skip
    assert spend(of(), *spans) == {}
    assert spend(of()) == {}


_SPANS = st.lists(
    st.builds(
        Span,
        st.just("a"),
        st.sampled_from(CATEGORIES),
        st.floats(0, 1e5),
        st.integers(0, 30),
    ),
    max_size=10,
)


@given(
    usages=_USAGES.filter(bool),
    spans=_SPANS,
    setup=st.none() | _TIMES,
    kept=st.none() | st.integers(0, 30),
)
def test_filed_seconds_add_up_to_the_bill(
    usages: list[Usage], spans: list[Span], setup: int | None, kept: int | None
) -> None:
    for item in usages:
        own = bill(usages)[item.attempt]
        filed = file_seconds(
            own, spans, started_at=item.started_at, setup_started_at=setup, kept_upto=kept
        )
        assert sum(filed.values()) == pytest.approx(own.seconds)
        assert all(seconds >= 0 for seconds in filed.values())


# -- prices and forecast ---------------------------------------------------------------------------


def test_the_best_source_of_a_price_counts() -> None:
    assert choose_price(provider=1.5, variable="2", experiment=3.0) == HourlyPrice(1.5, "provider")
    assert choose_price(variable="2.16", experiment=3.0) == HourlyPrice(
        2.16, "TESSERA_USD_PER_HOUR"
    )
    assert choose_price(variable="", experiment=3.0) == HourlyPrice(3.0, "experiment")
    assert choose_price() == HourlyPrice(None, "unknown")
    assert choose_price(provider=0.0, experiment=3.0).usd_per_hour == 0.0
    assert choose_price(variable="0").usd_per_hour == 0.0


@pytest.mark.parametrize("text", ["two", "$2.16", "2,16", "nan", "inf", "-1", " ", "1e400"])
def test_a_price_that_is_no_number_of_dollars_is_a_sentence(text: str) -> None:
    with pytest.raises(InputError) as error:
        choose_price(variable=text, experiment=3.0)
    assert str(error.value) == (
        f"TESSERA_USD_PER_HOUR is {text!r}; expected US dollars an hour, such as 2.16."
    )


def test_the_forecast_carries_on_at_the_present_speed_and_price() -> None:
    found = forecast(steps_left=1800, seconds_per_step=2.0, usd_so_far=5.0, usd_per_hour=2.0)
    assert (found.seconds_left, found.usd_at_end) == (3600.0, 7.0)
    done = forecast(steps_left=0, seconds_per_step=2.0, usd_so_far=5.0, usd_per_hour=2.0)
    assert (done.seconds_left, done.usd_at_end) == (0.0, 5.0)


@pytest.mark.parametrize(("so_far", "price"), [(None, 2.0), (5.0, None), (None, None)])
def test_a_forecast_without_a_price_has_time_only(
    so_far: float | None, price: float | None
) -> None:
    found = forecast(steps_left=10, seconds_per_step=0.5, usd_so_far=so_far, usd_per_hour=price)
    assert (found.seconds_left, found.usd_at_end) == (5.0, None)
    assert math.isfinite(found.seconds_left)


# -- a price that moves ----------------------------------------------------------------------------


def test_each_second_costs_what_it_cost_then() -> None:
    moving = usage("a", 0, 10, 100, prices=((60.0, 72.0), (40.0, 0.0)))
    assert bill([moving])["a"].usd == pytest.approx(0.01 * 40 + 0.0 * 20 + 0.02 * 40)
    late = usage("a", 0, 10, 100, prices=((500.0, 72.0),))
    assert bill([late])["a"].usd == pytest.approx(1.0)
    early = usage("a", 0, 10, 100, prices=((-5.0, 72.0),))
    assert bill([early])["a"].usd == pytest.approx(2.0)


def test_a_price_that_was_told_late_is_the_best_guess_for_what_came_before() -> None:
    late = usage("a", 0, 10, 100, usd_per_hour=None, prices=((50.0, 36.0), (60.0, 72.0)))
    assert bill([late])["a"].usd == pytest.approx(0.01 * 60 + 0.02 * 40)


def test_a_price_moves_only_what_its_own_attempt_owns() -> None:
    bills = bill([
        usage("a", 0, 10, 50, prices=((30.0, 72.0),)),
        usage("b", 0, 50, 100, prices=((90.0, 360.0),)),
    ])  # fmt: skip
    assert bills["a"].usd == pytest.approx(0.01 * 30 + 0.02 * 20)
    assert bills["b"].usd == pytest.approx(0.01 * 40 + 0.1 * 10)


_STEPS = st.lists(st.tuples(st.integers(-5, 70), st.sampled_from([0.0, 36.0, 72.0])), max_size=4)


@given(_USAGES, st.lists(_STEPS, min_size=8, max_size=8), st.randoms(use_true_random=False))
def test_steps_of_a_price_second_by_second(
    usages: list[Usage], steps: list[list[tuple[int, float]]], dice: Any
) -> None:
    """Against an account that asks for every owned second what an hour cost then."""
    moving = [replace(u, prices=tuple(s)) for u, s in zip(usages, steps, strict=False)]
    bills = bill(moving)
    for item in moving:
        expected = 0.0
        for start, end in bills[item.attempt].intervals:
            for second in range(int(start), int(end)):
                told = [(at, usd) for at, usd in item.prices if at <= second]
                expected += (max(told)[1] if told else item.usd_per_hour or 0.0) / 3600
        assert bills[item.attempt].usd == pytest.approx(expected)
        assert bills[item.attempt].intervals == bill(usages)[item.attempt].intervals
    shuffled = [replace(u, prices=tuple(dice.sample(u.prices, len(u.prices)))) for u in moving]
    assert bill(shuffled) == bills


def test_the_catalogs_price_stands_between_the_persons_and_the_experiments() -> None:
    every: dict[str, Any] = {"variable": "2", "catalog": "3", "experiment": 4.0, "note": "why"}
    assert choose_price(**every) == HourlyPrice(2.0, "TESSERA_USD_PER_HOUR", "why")
    assert choose_price(catalog="3", experiment=4.0) == HourlyPrice(3.0, "catalog")
    assert choose_price(provider=1.0, **every) == HourlyPrice(1.0, "provider")
    with pytest.raises(InputError, match="TESSERA_CATALOG_USD_PER_HOUR is 'cheap'; expected US"):
        choose_price(catalog="cheap")
    assert choose_price(variable="2", catalog="cheap").source == "TESSERA_USD_PER_HOUR"
    assert choose_price(catalog="2.5").words == "$2.5/h (catalog)"
    assert choose_price().words == "not known"


# -- invoices --------------------------------------------------------------------------------------


def test_an_invoice_is_shared_out_by_the_ledgers_dollars() -> None:
    assert share_out(3.0, {"a": (1.0, 9), "b": (2.0, 1)}) == pytest.approx({"a": 1, "b": 2})
    assert share_out(3.0, {"a": (None, 10), "b": (2.0, 20)}) == pytest.approx({"a": 1, "b": 2})
    assert share_out(3.0, {"a": (0.0, 10), "b": (0.0, 20)}) == pytest.approx({"a": 1, "b": 2})
    assert share_out(3.0, {"a": (0.0, 0), "b": (None, 0)}) == {"a": 1.5, "b": 1.5}


@given(
    st.floats(0, 1e4),
    st.dictionaries(
        st.text(max_size=3),
        st.tuples(st.none() | st.floats(0, 1e4), st.floats(0, 1e6)),
        min_size=1,
        max_size=5,
    ),
)
def test_every_billed_dollar_is_somebodys(
    usd: float, parts: dict[str, tuple[float | None, float]]
) -> None:
    shares = share_out(usd, parts)
    assert shares.keys() == parts.keys()
    assert sum(shares.values()) == pytest.approx(usd)
    assert all(share >= 0 for share in shares.values())


def test_an_instance_of_any_name_has_a_file_of_its_own() -> None:
    assert invoice_path("vast", "C.9001") == "bills/vast/C.9001.json"
    odd = invoice_path("lambda", "../mine/host 1")
    assert odd == "bills/lambda/..%2Fmine%2Fhost%201.json"
