"""The fixed evaluation: the same tokens in the same order, for every run and every step.

Nats per token is the mean of -log p over the targets. Bits per byte divides the same sum by the
UTF-8 bytes of those targets, so that models with different tokenizers compare. The unigram
entropy of the targets is what the best model that ignores all context would reach: a base above
it learnt nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.model.loss import IGNORE, summed_cross_entropy
from tessera.model.protogpt import ProtoGPT


@dataclass(frozen=True)
class FixedEval:
    """Windows of the evaluation split: inputs and targets, each (N, T) int64 on the CPU.

    ``bytes`` and ``unigram_entropy`` are of the targets: UTF-8 bytes, and nats.
    """

    inputs: Tensor
    targets: Tensor
    bytes: int
    unigram_entropy: float


def fixed_windows(
    shards: Sequence[npt.NDArray[np.uint16]],
    sequence: int,
    limit: int,
    byte_lengths: npt.NDArray[np.int64],
) -> FixedEval:
    """The first windows of the split, in stored order, up to ``limit`` tokens.

    Windows are ``sequence`` + 1 consecutive tokens of one shard at stride ``sequence``, as in
    training; a split too short for one window is a ValueError.
    """
    rows: list[npt.NDArray[np.int64]] = []
    most = max(1, limit // sequence)
    for tokens in shards:
        starts = range(0, len(tokens) - sequence, sequence)[: most - len(rows)]
        rows += [tokens[start : start + sequence + 1].astype(np.int64) for start in starts]
        if len(rows) == most:
            break  # the shards after this one need not even be fetched
    if not rows:
        raise ValueError(f"the evaluation split has no {sequence + 1} tokens in one shard")
    windows = np.stack(rows)
    targets = windows[:, 1:]
    counts = np.bincount(targets.ravel(), minlength=len(byte_lengths))
    return FixedEval(
        torch.from_numpy(windows[:, :-1].copy()),
        torch.from_numpy(targets.copy()),
        int((counts * byte_lengths).sum()),
        entropy(counts),
    )


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Shannon entropy of a histogram, in nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


class Share(Protocol):
    """Who evaluates: this rank of so many; ``sum`` adds a tensor up over all, in place."""

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    def sum(self, tensor: Tensor) -> Tensor: ...  # noqa: D102


class _Alone:
    rank, size = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


ALONE: Share = _Alone()


CHUNK = 8192
"""Tokens whose logits exist at once when a loss is measured."""


class Scorer(Protocol):
    """Sums the loss of a batch: ``summed_cross_entropy`` over a model, wherever its weights are."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """(B, T), (B, T) -> nats, a float32 scalar."""


def scorer(model: ProtoGPT, compute_dtype: torch.dtype) -> Scorer:
    """The scorer of a model that is whole on one device.

    Logits exist for ``CHUNK`` tokens at a time: a micro-batch that was chosen for a training step
    without all logits at once must not be too large here.
    """
    device = model.tokens.weight.device

    def score(inputs: Tensor, targets: Tensor) -> Tensor:
        states = model.hidden(inputs.to(device), compute_dtype).flatten(0, 1)
        wanted = targets.to(device).flatten()
        sums = [
            summed_cross_entropy(states[i : i + CHUNK], model.tokens.weight, wanted[i : i + CHUNK])
            for i in range(0, states.size(0), CHUNK)
        ]
        return torch.stack(sums).sum()

    return score


@torch.no_grad()
def mean_loss(
    score: Scorer, batches: Iterable[tuple[Tensor, Tensor]], share: Share = ALONE
) -> tuple[float, int]:
    """Nats per token over (inputs, targets) batches, each (B, T), and the targets that counted.

    Several ranks take every so-manyth batch and the same number of them (a sharded model needs all
    ranks for each forward pass): who has one fewer scores one that counts nothing.
    """
    given = list(batches)
    total, count = 0.0, 0
    for first in range(0, len(given), share.size):
        place = first + share.rank
        inputs, targets = given[min(place, len(given) - 1)]
        if place >= len(given):
            targets = torch.full_like(targets, IGNORE)
        total += float(score(inputs, targets))
        count += int((targets != IGNORE).sum())
    if share.size > 1:
        sums = share.sum(torch.tensor([total, float(count)], dtype=torch.float64))
        total, count = float(sums[0]), int(sums[1])
    return total / count, count


def evaluate_fixed(
    score: Scorer, fixed: FixedEval, micro_batch: int, share: Share = ALONE
) -> dict[str, float]:
    """The figures of the fixed evaluation, under the names that the journal gives them."""
    batches = zip(
        torch.split(fixed.inputs, micro_batch), torch.split(fixed.targets, micro_batch), strict=True
    )
    loss, count = mean_loss(score, batches, share)
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval/bits_per_byte": loss * count / math.log(2) / fixed.bytes,
        "eval/unigram_entropy": fixed.unigram_entropy,
    }
