from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tessera.model.generate import generate
from tessera.model.protogpt import KVCache, ProtoGPT
from tessera.model.shape import ModelShape

SHAPE = ModelShape(layers=2, d_model=24, heads=3, context=24, vocab_size=37)
STOP = 3


@pytest.fixture(scope="module")
def model() -> ProtoGPT:
    model = ProtoGPT(SHAPE)
    model.initialize(8, init_std=0.4)
    return model


class Fixed(ProtoGPT):
    """Says the same logits whatever it is asked, so that the distribution is known."""

    def __init__(self, logits: list[float], context: int = 4000) -> None:
        super().__init__(ModelShape(1, 4, 1, context, len(logits)))
        self.said = nn.Buffer(torch.tensor(logits))
        self.lengths: list[int] = []

    def extend(
        self,
        ids: Tensor,
        caches: list[KVCache] | None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, list[KVCache]]:
        self.lengths.append(ids.size(1))
        return self.said.repeat(ids.size(0), 1), []


def frequencies(
    logits: list[float],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    forbidden: tuple[int, ...] = (),
    draws: int = 1200,
) -> list[float]:
    (said,) = generate(
        Fixed(logits),
        [0],
        seeds=[11],
        max_new_tokens=draws,
        stop=-1,
        temperature=temperature,
        top_p=top_p,
        forbidden=forbidden,
    )
    assert len(said) == draws
    return [said.count(token) / draws for token in range(len(logits))]


def logs(*shares: float) -> list[float]:
    return [math.log(share) for share in shares]


def close(found: list[float], expected: list[float]) -> bool:
    """Within five standard errors; a share of zero is met exactly."""
    return all(
        abs(f - e) <= 5 * math.sqrt(e * (1 - e) / 1200)
        for f, e in zip(found, expected, strict=True)
    )


def test_greedy_is_the_largest_logit_of_the_whole_sequence_each_time(model: ProtoGPT) -> None:
    prompt = [5, 1, 30, 8]
    ids = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert len(set(ids[4:])) > 1, "a model that repeats itself would hide a stale cache"
    assert generate(model, prompt, seeds=[None], max_new_tokens=12, stop=-1) == [ids[4:]]
    cold = generate(model, prompt, seeds=[5], max_new_tokens=12, stop=-1, temperature=0.0)
    assert cold == [ids[4:]]


def test_a_seed_says_the_same_whoever_is_beside_it(model: ProtoGPT) -> None:
    def ask(*seeds: int | None) -> list[list[int]]:
        return generate(model, [5, 1, 30], seeds=seeds, max_new_tokens=15, stop=STOP)

    together = ask(1, 2, None, 3, 1)
    for answer, seed in zip(together, (1, 2, None, 3, 1), strict=True):
        assert ask(seed) == [answer]
    assert ask(3, 2, 1) == [together[3], together[1], together[0]]
    assert len({tuple(answer) for answer in together}) == 4, "different seeds say different things"


def test_the_global_random_state_has_no_part(model: ProtoGPT) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = generate(model, [5], seeds=[4], max_new_tokens=8, stop=-1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generate(model, [5], seeds=[4], max_new_tokens=8, stop=-1) == one


def test_an_answer_ends_before_the_stop_token_and_the_others_go_on(model: ProtoGPT) -> None:
    def ask(stop: int) -> list[list[int]]:
        seeds = list(range(12))
        return generate(model, [5, 1], seeds=seeds, max_new_tokens=20, stop=stop, temperature=4.0)

    free, answers = ask(-1), ask(STOP)
    expected = [said[: said.index(STOP)] if STOP in said else said for said in free]
    assert answers == expected
    assert len({len(answer) for answer in answers}) > 2, "they must end at different times"


def test_nothing_more_is_computed_once_all_have_stopped() -> None:
    model = Fixed([0.0, 0.0, 0.0, 50.0])
    assert generate(model, [0], seeds=[1, 2], max_new_tokens=30, stop=3) == [[], []]
    assert model.lengths == [1]


def test_a_cache_is_used() -> None:
    model = Fixed([1.0, 0.0])
    generate(model, [0, 0, 0], seeds=[None], max_new_tokens=4, stop=-1)
    assert model.lengths == [3, 1, 1, 1]


def test_plain_sampling_draws_the_soft_max() -> None:
    shares = [0.5, 0.3, 0.15, 0.05]
    assert close(frequencies(logs(*shares)), shares)


def test_temperature_sharpens_and_flattens() -> None:
    shares = [0.6, 0.3, 0.1]
    for temperature in (0.5, 2.0):
        powers = [share ** (1 / temperature) for share in shares]
        expected = [power / sum(powers) for power in powers]
        assert close(frequencies(logs(*shares), temperature=temperature), expected)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.2, 1), (0.59, 1), (0.61, 2), (0.89, 2), (0.95, 3), (1.0, 4), (0.0, 1)]
)
def test_top_p_keeps_the_least_set_that_reaches_it(top_p: float, kept: int) -> None:
    # Not in order of share, so that a mix-up of sorted places and ids shows.
    shares = [0.08, 0.6, 0.02, 0.3]
    largest = sorted(shares, reverse=True)[:kept]
    expected = [share / sum(largest) if share in largest else 0.0 for share in shares]
    assert close(frequencies(logs(*shares), top_p=top_p), expected)


def test_temperature_comes_before_top_p() -> None:
    # At temperature 0.5 the shares 0.5, 0.3, 0.2 become 0.66, 0.24, 0.11.
    found = frequencies(logs(0.5, 0.3, 0.2), temperature=0.5, top_p=0.6)
    assert found == [1.0, 0.0, 0.0]


def test_forbidden_tokens_never_come() -> None:
    shares = [0.7, 0.1, 0.1, 0.1]
    found = frequencies(logs(*shares), forbidden=(0, 2))
    assert close(found, [0.0, 0.5, 0.0, 0.5])
    greedy = generate(
        Fixed(logs(*shares)), [0], seeds=[None], max_new_tokens=3, stop=-1, forbidden=[0, 1]
    )
    assert greedy == [[2, 2, 2]]


def test_an_answer_ends_where_the_position_table_does(model: ProtoGPT) -> None:
    prompt = [5] * 20
    answers = generate(model, prompt, seeds=[None, 1], max_new_tokens=50, stop=-1)
    assert [len(answer) for answer in answers] == [4, 4]
    assert len(generate(model, [5] * 23, seeds=[None], max_new_tokens=50, stop=-1)[0]) == 1


@pytest.mark.parametrize("length", [0, 24, 25])
def test_a_prompt_without_room_for_an_answer_is_refused(model: ProtoGPT, length: int) -> None:
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens leaves no room"):
        generate(model, [5] * length, seeds=[None], max_new_tokens=1, stop=-1)
