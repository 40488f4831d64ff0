from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tessera.model.loss import IGNORE, summed_cross_entropy


def make(batch: int = 4, length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(batch, length, 8, generator=generator)
    head = torch.randn(11, 8, generator=generator)
    targets = torch.randint(11, (batch, length), generator=generator)
    targets[0, 2:] = IGNORE
    targets[2] = IGNORE
    return states, head, targets


def by_hand(states: Tensor, head: Tensor, targets: Tensor) -> float:
    total = 0.0
    for row, wanted in zip(states.double(), targets.tolist(), strict=True):
        for state, target in zip(row, wanted, strict=True):
            if target == IGNORE:
                continue
            scores = [float((state * line).sum()) for line in head.double()]
            top = max(scores)
            total += top + math.log(sum(math.exp(s - top) for s in scores)) - scores[target]
    return total


def test_it_is_the_sum_over_targets_that_count() -> None:
    states, head, targets = make()
    loss = summed_cross_entropy(states, head, targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert float(loss) == pytest.approx(by_hand(states, head, targets), rel=1e-6)


def test_micro_batches_add_up_however_they_are_cut() -> None:
    states, head, targets = make()
    whole = float(summed_cross_entropy(states, head, targets))
    for size in (1, 2, 3):
        parts = [
            float(summed_cross_entropy(s, head, t))
            for s, t in zip(torch.split(states, size), torch.split(targets, size), strict=True)
        ]
        assert sum(parts) == pytest.approx(whole, rel=1e-6)


def test_nothing_that_counts_is_zero_and_has_no_gradient() -> None:
    states, head, targets = make()
    states.requires_grad_()
    loss = summed_cross_entropy(states, head, torch.full_like(targets, IGNORE))
    assert loss.detach() == 0.0
    loss.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert float(states.grad.abs().max()) == 0.0


def test_an_ignored_position_gets_no_gradient_and_the_others_do() -> None:
    states, head, targets = make()
    states.requires_grad_()
    summed_cross_entropy(states, head, targets).backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    moved = states.grad.abs().amax(-1) > 0
    assert torch.equal(moved, targets != IGNORE)


def test_soft_max_is_in_float32_below_bf16_states() -> None:
    states, head, targets = make()
    states = states.bfloat16()
    loss = summed_cross_entropy(states, head, targets)
    logits = torch.nn.functional.linear(states, head.bfloat16())
    expected = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
