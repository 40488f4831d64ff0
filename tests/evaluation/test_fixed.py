"""The fixed evaluation's figures by hand."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tessera.corpus.tokenizer import Tokenizer
from tessera.evaluation.fixed import (
    Share,
    entropy,
    evaluate_fixed,
    fixed_windows,
    mean_loss,
    scorer,
)
from tessera.model.loss import IGNORE, summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape

TEXTS = ["the ferry goes. 船が行く。 🧵", "the kettle sings. やかんが鳴る。", "a lamp, a river."]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads, and very much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 5, vocab_size=285)


def make_model(vocabulary: int = 285) -> ProtoGPT:
    model = ProtoGPT(ModelShape(2, 24, 3, 16, vocabulary))
    model.initialize(5, init_std=0.3)
    return model


def ones(count: int = 100) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.ones(count, dtype=np.int64)


@pytest.mark.parametrize("chunk", [1, 7, 64, 8192])
def test_the_loss_does_not_depend_on_how_many_logits_exist_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    model = make_model(100)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 100, (4, 16), generator=draw)
    targets = torch.randint(0, 100, (4, 16), generator=draw)
    targets[1, 3:9] = IGNORE
    with torch.no_grad():
        whole = summed_cross_entropy(model.hidden(ids), model.tokens.weight, targets)
        monkeypatch.setattr("tessera.evaluation.fixed.CHUNK", chunk)
        found = scorer(model, torch.float32)(ids, targets)
    assert found.shape == ()
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=0.0)


def test_windows_are_those_of_training_in_stored_order() -> None:
    shards = [np.arange(10, dtype=np.uint16), np.arange(50, 57, dtype=np.uint16)]
    fixed = fixed_windows(shards, sequence=3, limit=1000, byte_lengths=ones())
    assert fixed.inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [50, 51, 52], [53, 54, 55]]
    assert fixed.targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [51, 52, 53], [54, 55, 56]]
    assert fixed.inputs.dtype == fixed.targets.dtype == torch.int64
    assert fixed.bytes == 15


@pytest.mark.parametrize(("limit", "windows"), [(1, 1), (3, 1), (5, 1), (6, 2), (11, 3), (12, 4)])
def test_the_limit_is_in_tokens_and_at_least_one_window(limit: int, windows: int) -> None:
    shards = [np.arange(10, dtype=np.uint16), np.arange(10, dtype=np.uint16)]
    assert len(fixed_windows(shards, 3, limit, ones()).inputs) == windows


@pytest.mark.parametrize(("length", "enough"), [(3, False), (4, True)])
def test_a_window_needs_one_token_more_than_its_length(length: int, enough: bool) -> None:
    shards = [np.zeros(length, dtype=np.uint16)]
    if enough:
        assert fixed_windows(shards, 3, 100, ones()).inputs.shape == (1, 3)
    else:
        with pytest.raises(ValueError, match="the evaluation split has no 4 tokens in one shard"):
            fixed_windows(shards, 3, 100, ones())


def test_unigram_entropy_by_hand() -> None:
    assert entropy(np.array([1, 1])) == pytest.approx(math.log(2))
    assert entropy(np.array([7, 0])) == 0.0
    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert entropy(np.array([2, 0, 1, 1])) == pytest.approx(expected)
    # The first token of a window is no target: of 9, 1, 1, 2, 2 the targets are two and two.
    fixed = fixed_windows([np.array([9, 1, 1, 2, 2], dtype=np.uint16)], 4, 100, ones())
    assert fixed.unigram_entropy == pytest.approx(math.log(2))


def test_figures_are_those_of_a_direct_computation(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(" ".join(TEXTS)), tokenizer.end_of_text_id]
    shard = np.array(ids * 3, dtype=np.uint16)
    fixed = fixed_windows([shard], 8, 10_000, tokenizer.byte_lengths())
    model = make_model()
    score = scorer(model, torch.float32)

    nats, text = 0.0, b""
    for start in range(0, len(shard) - 8, 8):
        window = shard[start : start + 9].astype(np.int64)
        with torch.no_grad():
            shares = torch.log_softmax(model(torch.from_numpy(window[None, :-1]))[0].double(), -1)
        for place, target in enumerate(window[1:].tolist()):
            nats -= float(shares[place, target])
            if target != tokenizer.end_of_text_id:
                text += byte_string(tokenizer, target)
    count = fixed.targets.numel()

    figures = evaluate_fixed(score, fixed, 4)
    assert fixed.bytes == len(text)
    assert figures["eval/loss"] == pytest.approx(nats / count, rel=1e-6)
    assert figures["eval/perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert figures["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-6)
    assert figures["eval/unigram_entropy"] == fixed.unigram_entropy
    for micro_batch in (1, 3, 100):
        again = evaluate_fixed(score, fixed, micro_batch)
        assert again == pytest.approx(figures, rel=1e-6)


def byte_string(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of one token, by GPT-2's table of bytes, written down anew."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + place): byte for place, byte in enumerate(others)}
    spelled = str(tokenizer._backend.id_to_token(token))
    return bytes(letters[letter] for letter in spelled)


def test_a_hopeless_loss_has_an_infinite_perplexity() -> None:
    model = make_model(100)
    with torch.no_grad():
        model.norm.weight.mul_(1e5)
    score = scorer(model, torch.float32)
    fixed = fixed_windows([np.arange(90, dtype=np.uint16)], 8, 10_000, ones())
    figures = evaluate_fixed(score, fixed, 4)
    assert figures["eval/loss"] > 700
    assert figures["eval/perplexity"] == math.inf


def test_a_mean_is_over_the_targets_that_count() -> None:
    score = scorer(make_model(100), torch.float32)
    ids = torch.arange(12).reshape(2, 6)
    targets = ids + 1
    loss, count = mean_loss(score, [(ids, targets)])
    assert count == 12
    part = targets.clone()
    part[1, 2:] = IGNORE
    rest = torch.full_like(targets, IGNORE)
    rest[1, 2:] = targets[1, 2:]
    first, n = mean_loss(score, [(ids, part)])
    second, m = mean_loss(score, [(ids, rest)])
    assert (n, m) == (8, 4)
    assert loss == pytest.approx((first * n + second * m) / 12, rel=1e-6)
    both, _ = mean_loss(score, [(ids, part), (ids, rest)])
    assert both == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(("size", "batches"), [(2, 4), (2, 3), (3, 4), (3, 1)])
def test_ranks_that_share_an_evaluation_come_to_the_whole_mean(size: int, batches: int) -> None:
    """Every rank scores equally many batches; one that only fills up counts nothing."""
    plain = scorer(make_model(100), torch.float32)
    ids = torch.arange(12 * batches).remainder(99).reshape(batches, 2, 6)
    given = [(one, one + 1) for one in ids]
    given[0][1][1, 2:] = IGNORE  # batches count differently
    ranks = Ranks(size)

    def evaluate(rank: int) -> tuple[tuple[float, int], int]:
        scored = []

        def score(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            scored.append(inputs)
            return plain(inputs, targets)

        return mean_loss(score, given, ranks.share(rank)), len(scored)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(evaluate, range(size)))
    loss, count = mean_loss(plain, given)
    assert [scored for _, scored in results] == [-(-batches // size)] * size
    assert {figures for figures, _ in results} == {results[0][0]}
    assert results[0][0][1] == count == 12 * batches - 4
    assert results[0][0][0] == pytest.approx(loss, rel=1e-6)


class Ranks:
    """Threads that add a tensor up as processes would."""

    def __init__(self, size: int) -> None:
        self.size, self._barrier = size, threading.Barrier(size, timeout=60)
        self._given: dict[int, torch.Tensor] = {}

    def share(self, rank: int) -> Share:
        ranks = self

        class OfRank:
            size = ranks.size

            def __init__(self) -> None:
                self.rank = rank

            def sum(self, tensor: torch.Tensor) -> torch.Tensor:
                ranks._given[rank] = tensor.clone()
                ranks._barrier.wait()
                return tensor.copy_(torch.stack(list(ranks._given.values())).sum(0))

        return OfRank()
