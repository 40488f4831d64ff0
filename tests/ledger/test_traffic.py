from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import InputError
from tessera.ledger.meter import Usage, bill, total_usd
from tessera.ledger.prices import TrafficPrice, choose_traffic_price
from tessera.ledger.traffic import (
    checkpoint_sentence,
    count_bytes,
    plus_traffic,
    size,
    traffic_usd,
)


def test_the_best_source_of_the_price_of_traffic_counts() -> None:
    choose = choose_traffic_price
    assert choose(provider=0.01, variable="2", experiment=3.0) == TrafficPrice(0.01, "provider")
    assert choose(variable="0.02", experiment=3.0) == TrafficPrice(0.02, "TESSERA_USD_PER_GB_UP")
    assert choose(variable="", experiment=3.0) == TrafficPrice(3.0, "experiment")
    assert choose() == TrafficPrice(0.0, "not billed")
    assert choose(variable="0", experiment=3.0).usd_per_gb == 0.0
    assert choose(provider=0.0, experiment=3.0).usd_per_gb == 0.0


@pytest.mark.parametrize("text", ["two", "$0.02", "0,02", "nan", "inf", "-1", " ", "1e400"])
def test_a_price_of_traffic_that_is_no_number_of_dollars_is_a_sentence(text: str) -> None:
    with pytest.raises(InputError) as error:
        choose_traffic_price(variable=text, experiment=3.0)
    assert str(error.value) == (
        f"TESSERA_USD_PER_GB_UP is {text!r}; expected US dollars for 10^9 bytes, such as 0.02."
    )


def test_a_gigabyte_is_ten_to_the_nine_bytes() -> None:
    assert traffic_usd(12_200_000_000, 0.01) == pytest.approx(0.122)
    assert traffic_usd(0, 5.0) == traffic_usd(5, 0.0) == 0.0


def test_figures_that_cannot_be_count_as_nothing() -> None:
    assert count_bytes([3.0, 4.0]) == 7
    assert count_bytes([]) == 0
    assert count_bytes([math.nan, math.inf, -math.inf, -5.0, 2.0]) == 2
    assert count_bytes([float(2**53 - 1)] * 3) == 3 * (2**53 - 1)


def test_traffic_is_known_where_the_machine_is_not() -> None:
    assert plus_traffic(1.5, 0.25) == 1.75
    assert plus_traffic(None, 0.25) is None


# -- in words --------------------------------------------------------------------------------------


def test_a_checkpoint_in_the_root_in_words() -> None:
    assert checkpoint_sentence(step=2000, sent=12_200_000_000, seconds=95.2, usd=0.122) == (
        "checkpoint of step 2000 is in the root: 12.2 GB in 95 s (128 MB/s, $0.12 of traffic)"
    )
    assert checkpoint_sentence(step=50, sent=9_876_543, seconds=0.25) == (
        "checkpoint of step 50 is in the root: 9.9 MB in 0.2 s (39.5 MB/s)"
    )
    assert checkpoint_sentence(step=5, sent=0, seconds=0.0) == (
        "checkpoint of step 5 is in the root: 0 B in 0.0 s"
    )
    assert "in 1,234 s (" in checkpoint_sentence(step=5, sent=10**12, seconds=1234.4)


@pytest.mark.parametrize(
    ("usd", "shown"),
    [(1234.5, "$1,234.50"), (1.0, "$1.00"), (0.1, "$0.10"), (0.0999, "$0.100"), (0.05, "$0.050"),
     (0.0012, "$0.0012"), (1.2e-7, "$0.00000012"), (1e-12, "$0.00000000")],
)  # fmt: skip
def test_small_sums_keep_two_digits(usd: float, shown: str) -> None:
    assert f", {shown} of traffic)" in checkpoint_sentence(step=1, sent=1000, seconds=1, usd=usd)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 B"), (950, "950 B"), (999.4, "999 B"), (999.5, "1.0 kB"), (1000, "1.0 kB"),
     (99_949, "99.9 kB"), (99_950, "100 kB"), (999_499, "999 kB"), (999_500, "1.0 MB"),
     (12.2e9, "12.2 GB"), (3.5e12, "3.5 TB"), (2.5e15, "2,500 TB")],
)  # fmt: skip
def test_sizes(number: float, shown: str) -> None:
    assert size(number) == shown


@given(st.floats(0, 1e18))
def test_a_size_is_within_its_last_digit_of_the_bytes(number: float) -> None:
    figure, unit = size(number).replace(",", "").split()
    factor = 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    last_digit = factor * (0.1 if "." in figure else 1)
    assert abs(float(figure) * factor - number) <= 0.5001 * last_digit


# -- every dollar once -----------------------------------------------------------------------------

_TIMES = st.integers(0, 60)
_ATTEMPTS = st.lists(
    st.tuples(
        _TIMES, _TIMES, _TIMES, st.sampled_from("xy"), st.sampled_from([0.0, 36.0, 72.0]),
        st.lists(st.integers(0, 10**12), max_size=4), st.sampled_from([0.0, 0.01, 2.0]),
    ),
    max_size=6,
)  # fmt: skip


def _total(rows: Iterable[tuple[Usage, list[float], float]]) -> float:
    """Dollars of machines and traffic, as the tables make them up."""
    known = list(rows)
    sent = {usage.attempt: (uploads, price) for usage, uploads, price in known}
    traffic = sum(traffic_usd(count_bytes(u), price) for u, price in sent.values())
    found = plus_traffic(total_usd(bill(usage for usage, _, _ in known).values()), traffic)
    assert found is not None
    return found


@given(attempts=_ATTEMPTS, dice=st.randoms(use_true_random=False))
def test_the_total_is_every_second_and_every_byte_once(attempts: list[Any], dice: Any) -> None:
    """Against a second-by-second and upload-by-upload account, shuffled and with repetitions."""
    rows = [
        (Usage(str(n), "vast", instance, float(max(start, billed)), float(billed),
               float(end), hour), [float(b) for b in uploads], gb)
        for n, (billed, start, end, instance, hour, uploads, gb) in enumerate(attempts)
    ]  # fmt: skip
    owner: dict[tuple[str, int], float] = {}
    for usage, _, _ in sorted(rows, key=lambda row: (row[0].started_at, row[0].attempt)):
        for second in range(int(usage.billed_from), int(usage.ended_at)):
            owner.setdefault((usage.instance, second), usage.usd_per_hour or 0.0)
    expected = sum(owner.values()) / 3600
    expected += sum(sent * gb / 1e9 for _, uploads, gb in rows for sent in uploads)
    shown = rows + [dice.choice(rows) for _ in range(3) if rows]
    dice.shuffle(shown)
    assert _total(shown) == pytest.approx(expected)


def test_an_attempt_that_was_read_twice_counts_as_far_as_it_was_seen_last() -> None:
    early = Usage("a", "vast", "i", 10, 0, 50, 36.0, estimated=True)
    late = Usage("a", "vast", "i", 10, 0, 100, 36.0)
    other = Usage("b", "vast", "i", 60, 0, 120, 36.0)
    for order in ([early, late, other], [late, other, early]):
        bills = bill(order)
        assert (bills["a"].seconds, bills["a"].estimated) == (100, False)
        assert bills["b"].seconds == 20
    told = Usage("a", "vast", "i", 10, 0, 50, 36.0)
    assert not bill([told, early])["a"].estimated
    assert not bill([early, told])["a"].estimated
