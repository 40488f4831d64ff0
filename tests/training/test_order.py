from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.training.order import WINDOW, Place, SampleOrder, derive_key, permute, permute_all

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=14).filter(any)
SEEDS = st.integers(0, 2**63 - 1)


def every_place(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]


def epoch(order: SampleOrder, number: int) -> list[tuple[int, int]]:
    first = number * order.per_epoch
    places = [order[first + i] for i in range(order.per_epoch)]
    return [(place.shard, place.index) for place in places]


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@given(size=st.integers(2**31, 2**50), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permute_needs_no_table_of_billions(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=2, max_size=20))
    images = {permute(i, size, key) for i in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < size for image in images)


@pytest.mark.parametrize("index", [-1, 5])
def test_permute_refuses_what_it_does_not_cover(index: int) -> None:
    with pytest.raises(ValueError, match=r"outside of range\(5\)"):
        permute(index, 5, 1)
    with pytest.raises(ValueError, match=r"outside of range\(5\)"):
        permute_all(np.array([0, index, 4]), 5, 1)


@given(size=st.integers(1, 2**50), key=st.integers(0, 2**64 - 1), data=st.data())
def test_many_at_once_are_permuted_as_one_by_one(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    expected = [permute(index, size, key) for index in indices]
    assert permute_all(np.array(indices, np.int64), size, key).tolist() == expected


@given(sizes=SIZES, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_every_epoch_takes_every_sample_once(sizes: list[int], seed: int) -> None:
    order = SampleOrder(sizes, seed, "f")
    assert order.per_epoch == sum(sizes)
    for number in range(3):
        assert sorted(epoch(order, number)) == every_place(sizes)


@given(sizes=SIZES, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_windows_follow_one_another_and_touch_few_shards(sizes: list[int], seed: int) -> None:
    order = SampleOrder(sizes, seed, "f")
    at, seen = 0, []
    while at < 3 * order.per_epoch:
        window = order.window(at)
        assert window.first == at < window.stop
        assert order.window(window.stop - 1) == window
        touched = {order[number].shard for number in range(at, window.stop)}
        assert touched == set(window.shards)
        assert len(touched) <= WINDOW
        assert window.stop - at == sum(sizes[shard] for shard in touched)
        seen.append(at)
        at = window.stop
    assert at == 3 * order.per_epoch, "an epoch ends where a window does"
    assert {epoch * order.per_epoch for epoch in range(3)} <= set(seen)


@given(
    sizes=st.lists(st.integers(0, 40) | st.integers(1000, 3000), min_size=1, max_size=9),
    seed=SEEDS,
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_of_places_is_what_each_number_says(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    order = SampleOrder([*sizes, 1], seed, "f")
    first = data.draw(st.integers(0, 3 * order.per_epoch))
    count = data.draw(st.integers(0, 200) | st.just(1500))
    shards, indices = order.places(first, count)
    found = [Place(*pair) for pair in zip(shards.tolist(), indices.tolist(), strict=True)]
    assert found == [order[number] for number in range(first, first + count)]


def test_epochs_seeds_and_data_each_give_another_order() -> None:
    sizes = [30] * 9
    order = SampleOrder(sizes, 1, "f")
    orders = [
        epoch(order, 0),
        epoch(order, 1),
        epoch(order, 7),
        epoch(SampleOrder(sizes, 2, "f"), 0),
        epoch(SampleOrder(sizes, 1, "g"), 0),
    ]
    assert len({tuple(places) for places in orders}) == 5
    first_windows = {frozenset(shard for shard, _ in places[: 30 * WINDOW]) for places in orders}
    assert len(first_windows) == 5


@given(sizes=SIZES, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_few_shards_are_open_at_a_time(sizes: list[int], seed: int) -> None:
    """Walked through an epoch, the shards come in windows: none comes back once its is over."""
    places = epoch(SampleOrder(sizes, seed, "f"), 0)
    used = [shard for shard, _ in places]
    first = {shard: used.index(shard) for shard in set(used)}
    last = {shard: len(used) - 1 - used[::-1].index(shard) for shard in set(used)}
    for at in range(len(used)):
        assert sum(first[s] <= at <= last[s] for s in set(used)) <= WINDOW


def test_samples_of_a_window_are_mixed() -> None:
    used = [shard for shard, _ in epoch(SampleOrder([200] * WINDOW, 1, "f"), 0)]
    runs = len(list(groupby(used)))
    assert runs > 500, "four shards of 200 mixed well change about 600 times"
    assert all(0.15 < used[:200].count(shard) / 200 < 0.35 for shard in range(WINDOW))


@given(sizes=SIZES, seed=SEEDS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_order_of_asking_does_not_matter(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    order = SampleOrder(sizes, seed, "f")
    numbers = data.draw(st.lists(st.integers(0, 5 * order.per_epoch - 1), max_size=30))
    asked = {number: order[number] for number in numbers}
    for number in sorted(asked, reverse=True):
        assert SampleOrder(sizes, seed, "f")[number] == asked[number]


def test_nothing_to_order_is_an_error() -> None:
    with pytest.raises(ValueError, match="no shard holds a whole sample"):
        SampleOrder([0, 0], 1, "f")


def test_the_order_is_frozen() -> None:
    """A run on record could not be continued if this changed; nothing here depends on a library."""
    assert derive_key(20260614, "f" * 64, 0) == 10956962831399569136
    assert [permute(i, 10, 42) for i in range(10)] == [5, 9, 6, 8, 7, 4, 3, 2, 1, 0]
    order = SampleOrder([3, 1, 4, 1, 5, 9, 2], 20260614, "f" * 64)
    first = [(2, 1), (5, 0), (5, 5), (5, 4), (2, 0), (5, 6)]
    assert [order[i] for i in range(6)] == [Place(*pair) for pair in first]
    second_epoch = [(5, 0), (2, 3), (2, 2), (5, 4)]
    assert [order[i] for i in range(25, 29)] == [Place(*pair) for pair in second_epoch]
