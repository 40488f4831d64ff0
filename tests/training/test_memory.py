"""Which micro-batch ``auto`` comes to.

Memory cannot run out on a CPU as it does on a GPU, so here a GPU is SIMULATED: a counter of bytes
whose step raises ``torch.OutOfMemoryError`` above its size. The arithmetic for CPUs is real.
``gpu_memory.py`` beside this file holds the real trial for a machine with a GPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.model.shape import ModelShape, training_memory
from tessera.training.memory import (
    GPU_SHARE,
    Choice,
    Trial,
    choose_micro_batch,
    choose_on_card,
    divisors,
    out_of_memory_sentence,
    resolve_micro_batch,
)

CPU = torch.device("cpu")
GIB = 2**30


@dataclass
class SimulatedCard:
    """A GPU of ``size`` bytes: weights, gradients from the first pass on, activations per sample.

    ``bend`` makes memory grow faster than the samples, as a straight line does not foresee.
    """

    size: int
    weights: int = 4 * GIB
    gradients: int = 4 * GIB
    per_sample: int = 3 * GIB
    bend: int = 0
    others: int = 0
    seen: int = 0
    held: int = 0
    fragments: int = 0
    steps: list[int] = field(default_factory=list)

    def usable(self) -> int:
        return self.size - self.others

    def watch(self) -> None:
        self.seen = self.weights + self.held

    def peak(self) -> int:
        return self.seen

    def tidy(self) -> None:
        self.fragments = 0

    def step(self, size: int) -> None:
        self.steps.append(size)
        self.fragments += 1  # what a pass leaves in the cache
        needed = self.weights + self.held + self.per_sample * size + self.bend * size * size
        if needed > self.usable():
            raise torch.OutOfMemoryError("simulated")
        self.held = self.gradients
        # In a first pass the gradients appear while the activations go.
        self.seen = max(self.seen, needed)

    def release(self) -> None:
        self.held = 0

    def at(self, size: int) -> int:
        """Bytes that a pass over ``size`` needs once there are gradients."""
        return self.weights + self.gradients + self.per_sample * size + self.bend * size * size

    def trial(self, samples: int, **settings: object) -> Trial:
        return Trial(samples, self.step, self.release, **settings)  # type: ignore[arg-type]


# -- the search ------------------------------------------------------------------------------------


@given(
    base=st.integers(0, 10**6),
    slope=st.integers(1, 10**5),
    limit=st.integers(1, 10**7),
    samples=st.integers(1, 400),
)
def test_of_a_straight_line_the_largest_is_found_in_three_trials(
    base: int, slope: int, limit: int, samples: int
) -> None:
    tried: list[int] = []

    def peak_of(size: int) -> float:
        tried.append(size)
        return base + slope * size

    size, peak = choose_micro_batch(peak_of, divisors(samples), limit)
    fitting = [n for n in divisors(samples) if base + slope * n <= limit]
    # A line through two points is exact up to rounding, which may cost the size that just fits.
    tight = {n for n in fitting if base + slope * n > limit * (1 - 1e-9)}
    assert size == max(fitting, default=1) or max(fitting) in tight
    assert peak == base + slope * size
    assert samples % size == 0
    assert len(tried) <= 3
    assert size in tried, "nothing is promised that was not run"


@given(
    peaks=st.lists(st.one_of(st.integers(0, 1000), st.just(math.inf)), min_size=1, max_size=8),
    limit=st.integers(0, 1000),
)
def test_whatever_the_memory_does_the_answer_was_run_and_fits(
    peaks: list[float], limit: int
) -> None:
    sizes = [2**i for i in range(len(peaks))]
    table = dict(zip(sizes, peaks, strict=True))
    if math.isinf(peaks[0]):
        with pytest.raises(torch.OutOfMemoryError):
            choose_micro_batch(table.__getitem__, sizes, limit)
        return
    size, peak = choose_micro_batch(table.__getitem__, sizes, limit)
    assert peak == table[size] < math.inf
    assert peak <= limit or size == 1


def test_sizes_are_those_that_cut_a_step_evenly() -> None:
    assert divisors(16) == [1, 2, 4, 8, 16]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


# -- on a simulated GPU ----------------------------------------------------------------------------


@pytest.mark.parametrize(("gib", "size"), [(12, 1), (16, 2), (24, 4), (40, 8), (80, 16)])
def test_the_largest_that_fits_a_gpu_is_taken(gib: int, size: int) -> None:
    card = SimulatedCard(gib * GIB)
    choice = choose_on_card(card, card.trial(16))
    assert choice.size == size
    assert card.at(size) <= GPU_SHARE * card.usable() or size == 1
    assert size == 16 or card.at(2 * size) > GPU_SHARE * card.usable()


def test_the_gradients_of_a_step_in_parts_are_counted() -> None:
    # A first pass over 4 would fit the 92 %: 4 + 12 of 19.3 GiB. With gradients it does not.
    card = SimulatedCard(21 * GIB)
    assert card.weights + 4 * card.per_sample < GPU_SHARE * card.usable() < card.at(4)
    assert choose_on_card(card, card.trial(16)).size == 2
    # A step that goes through the model at once never holds both.
    whole = SimulatedCard(10 * GIB)
    assert choose_on_card(whole, whole.trial(1)).size == 1


def test_memory_that_grows_faster_than_foreseen_costs_a_trial_and_not_the_run() -> None:
    card = SimulatedCard(64 * GIB, per_sample=GIB, bend=GIB // 8)
    choice = choose_on_card(card, card.trial(32))
    assert choice.size == 16
    assert card.at(16) <= GPU_SHARE * card.usable() < card.at(32)
    assert 32 in card.steps, "the line foresaw it"


def test_the_memory_of_other_processes_and_of_a_later_optimiser_is_left_alone() -> None:
    def size(others: int = 0, reserve: int = 0) -> int:
        card = SimulatedCard(40 * GIB, others=others)
        return choose_on_card(card, card.trial(16, reserve=reserve)).size

    assert size() == 8
    assert size(others=15 * GIB) == 4
    assert size(reserve=8 * GIB) == 4


def test_nothing_is_left_behind_whatever_was_tried() -> None:
    for gib in (8, 11, 24, 80):
        card = SimulatedCard(gib * GIB)
        try:
            choose_on_card(card, card.trial(16))
        except torch.OutOfMemoryError:
            assert gib < 11
        assert (card.held, card.fragments) == (0, 0), gib


def test_a_trial_that_breaks_for_another_reason_is_not_taken_for_one_that_does_not_fit() -> None:
    def step(size: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        choose_on_card(SimulatedCard(GIB), Trial(16, step))


def test_a_gpu_on_which_not_one_sample_fits_says_so() -> None:
    card = SimulatedCard(10 * GIB)
    with pytest.raises(torch.OutOfMemoryError, match="micro-batch 1 does not fit"):
        choose_on_card(card, card.trial(16))


def test_one_sample_that_just_fits_is_taken_though_it_is_tight() -> None:
    card = SimulatedCard(11 * GIB)
    assert str(choose_on_card(card, card.trial(16))) == (
        "micro-batch 1: the smallest, though tight (11.0 GiB measured, 10.1 GiB may be used)"
    )


def test_the_line_says_what_was_measured() -> None:
    card = SimulatedCard(24 * GIB)
    assert str(choose_on_card(card, card.trial(16))) == (
        "micro-batch 4: the largest that fits (20.0 GiB measured, 22.1 GiB may be used)"
    )
    later = choose_on_card(card, card.trial(8, reserve=3 * GIB // 2))
    assert "beside 1.5 GiB of optimiser" in later.how


def test_the_size_of_the_checkpoint_is_kept_where_it_fits() -> None:
    card = SimulatedCard(80 * GIB)
    choice = choose_on_card(card, card.trial(16), 4)
    assert choice == Choice(4, "as recorded in the checkpoint, so that sums round as before")
    assert set(card.steps) == {4}

    smaller = SimulatedCard(19 * GIB)
    choice = choose_on_card(smaller, smaller.trial(16), 4)
    assert choice.size == 2
    assert choice.how.endswith("; the 4 of the checkpoint did not fit")

    of_more_gpus = SimulatedCard(80 * GIB)
    assert choose_on_card(of_more_gpus, of_more_gpus.trial(6), 4).size == 6


def test_several_ranks_try_the_same_and_agree_on_the_smallest_card() -> None:
    cards = [SimulatedCard(80 * GIB), SimulatedCard(24 * GIB), SimulatedCard(40 * GIB)]
    told = [0.0] * len(cards)
    barrier = threading.Barrier(len(cards))

    def worst(rank: int) -> Callable[[float], float]:
        def agree(number: float) -> float:
            told[rank] = number
            barrier.wait(10)
            largest = max(told)
            barrier.wait(10)
            return largest

        return agree

    found: dict[int, int] = {}

    def work(rank: int) -> None:
        card = cards[rank]
        found[rank] = choose_on_card(card, card.trial(16, worst=worst(rank))).size

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(cards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {0: 4, 1: 4, 2: 4}
    # A rank whose card is full leaves its second pass out; the sizes are the same all the same.
    assert len({tuple(dict.fromkeys(card.steps)) for card in cards}) == 1


# -- on a CPU --------------------------------------------------------------------------------------

SMOKE = ModelShape(layers=4, d_model=128, heads=4, context=256, vocab_size=2048)


def on_cpu(shape: ModelShape, samples: int, remembered: int | None = None) -> Choice:
    def estimate(size: int) -> int:
        return sum(training_memory(shape, size, low_precision=False).values())

    def step(size: int) -> None:
        raise AssertionError("a CPU is not tried: it would be killed instead of told")

    return resolve_micro_batch(
        "auto", samples=samples, step=step, device=CPU, estimate=estimate, remembered=remembered
    )


def test_a_small_model_on_a_cpu_gets_no_more_than_helps() -> None:
    choice = on_cpu(SMOKE, 16)
    assert choice.size == 8
    assert choice.how.startswith("more make a CPU no faster (about 0.")
    assert on_cpu(SMOKE, 4).size == 4
    assert on_cpu(SMOKE, 22).size == 2


def test_a_cpu_is_filled_to_half_of_what_is_available() -> None:
    # A vocabulary-sized model whose samples take about a fifth of the allowed half each.
    half = psutil.virtual_memory().available / 2
    context = int(half / 5 / (65_536 * 12))
    shape = ModelShape(layers=1, d_model=8, heads=1, context=context, vocab_size=65_536)
    choice = on_cpu(shape, 16)
    assert choice.size in (2, 4)
    assert choice.how.startswith("the largest that fits")


def test_a_model_too_large_for_a_cpu_gets_the_smallest() -> None:
    huge = ModelShape(layers=10_000, d_model=8192, heads=64, context=4096, vocab_size=65_536)
    choice = on_cpu(huge, 16)
    assert choice.size == 1
    assert choice.how.startswith("the smallest, though tight")


def test_a_cpu_keeps_the_size_of_the_checkpoint() -> None:
    assert on_cpu(SMOKE, 16, remembered=2).size == 2
    assert on_cpu(SMOKE, 16, remembered=3).size == 8, "three do not divide sixteen"


def test_a_number_is_taken_as_it_is() -> None:
    def never(size: int) -> Any:
        raise AssertionError("nothing is tried")

    choice = resolve_micro_batch(
        3, samples=16, step=never, device=CPU, estimate=never, remembered=8
    )  # fmt: skip
    assert choice == Choice(3, "as the experiment says")


# -- what to do when memory ran out ----------------------------------------------------------------


_SMALLER = "batch.micro_batch 8; set batch.micro_batch to auto or to a smaller number"
_RECOMPUTE = "batch.micro_batch 1; set recompute: true (the loss stays the same)."
_ALL_DONE = "1 with recompute: true; use a larger GPU, or several with parallel: fsdp."


@pytest.mark.parametrize(
    ("micro_batch", "recompute", "says"),
    [
        (8, False, f"{_SMALLER} or set recompute: true (the loss stays the same with either)."),
        (8, True, f"{_SMALLER} (the loss stays the same)."),
        (1, False, _RECOMPUTE),
        ("auto", False, _RECOMPUTE),
        (1, True, f"even for batch.micro_batch {_ALL_DONE}"),
        ("auto", True, f"even for batch.micro_batch {_ALL_DONE}"),
    ],
)
def test_the_sentence_names_what_still_helps(
    micro_batch: int | str, recompute: bool, says: str
) -> None:
    text = out_of_memory_sentence("A100", micro_batch, recompute)  # type: ignore[arg-type]
    assert text.startswith("A100 has too little memory ")
    assert text.endswith(says)
