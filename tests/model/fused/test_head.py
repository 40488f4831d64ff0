from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.model.fused.head import head_loss, head_sum
from tessera.model.loss import IGNORE, summed_cross_entropy

SHAPES = [(1, 8, 3, 8192), (37, 24, 101, 16), (64, 16, 300, 64), (50, 8, 40, 7)]
"""Tokens, width, vocabulary, chunk; most do not divide."""


class Inputs(NamedTuple):
    states: Tensor
    weight: Tensor
    targets: Tensor
    dweight: Tensor


def make(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: object) -> Inputs:
    draw = torch.Generator().manual_seed(tokens * vocabulary)
    wide = torch.promote_types(dtype, torch.float32)
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    targets[1::5] = IGNORE
    drawn = Inputs(
        torch.randn(tokens, width, generator=draw).to(dtype),
        torch.randn(vocabulary, width, generator=draw).to(dtype),
        targets,
        torch.randn(vocabulary, width, generator=draw).to(wide),
    )
    return Inputs(*(tensor.to(torch.device(str(device))) for tensor in drawn))


def reference(inputs: Inputs, divisor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the states and of the weight by autograd in float64."""
    states = inputs.states.double().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    loss = F.cross_entropy(
        states @ weight.t(), inputs.targets, ignore_index=IGNORE, reduction="sum"
    )
    (loss / divisor).backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert weight.grad is not None
    return (loss / divisor).detach(), states.grad, weight.grad


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest wanted number."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("tokens", "width", "vocabulary", "chunk"), SHAPES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-6), (torch.bfloat16, 0.02)])
def test_loss_and_gradients_are_those_of_float64_autograd(
    form: str,
    device: torch.device,
    tokens: int,
    width: int,
    vocabulary: int,
    chunk: int,
    dtype: torch.dtype,
    error: float,
) -> None:
    inputs = make(tokens, width, vocabulary, dtype, device)
    before = inputs.dweight.clone()
    loss, dstates = head_loss(*inputs[:3], 13, inputs.dweight, chunk)
    wanted, wanted_states, wanted_weight = reference(inputs, 13)
    assert loss.shape == ()
    assert loss.dtype == before.dtype
    assert dstates.dtype == dtype
    assert off(loss, wanted) < error / 3
    assert off(dstates, wanted_states) < error
    assert off(inputs.dweight.double() - before.double(), wanted_weight) < error


@pytest.mark.parametrize("form", ["torch"], indirect=True)
def test_the_plain_form_keeps_float64(form: str, device: torch.device) -> None:
    inputs = make(37, 24, 101, torch.float64, device)
    before = inputs.dweight.clone()
    loss, dstates = head_loss(*inputs[:3], 13, inputs.dweight, 16)
    wanted, wanted_states, wanted_weight = reference(inputs, 13)
    assert loss.dtype == dstates.dtype == torch.float64
    assert off(loss, wanted) < 1e-14
    assert off(dstates, wanted_states) < 1e-13
    assert off(inputs.dweight - before, wanted_weight) < 1e-13


def test_bf16_rounds_where_the_unfused_loss_rounds(form: str, device: torch.device) -> None:
    inputs = make(48, 32, 257, torch.bfloat16, device)
    states = inputs.states.clone().requires_grad_()
    plain = summed_cross_entropy(states[None], inputs.weight.float(), inputs.targets[None]) / 16
    plain.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    loss, dstates = head_loss(*inputs[:3], 16, inputs.dweight)
    assert float(loss) == pytest.approx(float(plain.detach()), rel=1e-6)
    # Rounded twice alike, so all that is left is the order of sums: one unit in the last place. But
    # Triton's interpreter cuts off where GPUs round.
    cuts_off = form == "triton" and not inputs.states.is_cuda
    rtol, atol = (0.02, 1e-3) if cuts_off else (2**-7, 1e-5)
    torch.testing.assert_close(dstates, states.grad, rtol=rtol, atol=atol)


def test_a_divisor_on_the_device_is_the_number_it_holds(form: str, device: torch.device) -> None:
    inputs = make(20, 8, 33, torch.float32, device)
    other = inputs.dweight.clone()
    number = head_loss(*inputs[:3], 7, inputs.dweight)
    scalar = head_loss(*inputs[:3], torch.tensor(7, device=device), other)
    for one, two in zip((*number, inputs.dweight), (*scalar, other), strict=True):
        assert torch.equal(one, two)


def test_where_nothing_counts_the_gradient_is_zero(form: str, device: torch.device) -> None:
    inputs = make(9, 8, 21, torch.bfloat16, device)
    before = inputs.dweight.clone()
    inputs.targets.fill_(IGNORE)
    loss, dstates = head_loss(*inputs[:3], 3, inputs.dweight, 4)
    assert float(loss) == 0.0
    assert not dstates.any()
    assert torch.equal(inputs.dweight, before)


def test_the_sum_alone_is_the_loss_and_leaves_no_trace(form: str, device: torch.device) -> None:
    inputs = make(37, 24, 101, torch.bfloat16, device)
    total = head_sum(*inputs[:3], 16)
    again, _ = head_loss(*inputs[:3], 1, inputs.dweight, 16)
    assert total.dtype == torch.float32
    assert torch.equal(total, again)


def test_huge_logits_do_not_overflow(form: str, device: torch.device) -> None:
    inputs = make(12, 8, 50, torch.float32, device)
    inputs.states.mul_(1e4)
    loss, dstates = head_loss(*inputs[:3], 5, inputs.dweight)
    wanted, wanted_states, _ = reference(inputs, 5)
    assert off(loss, wanted) < 1e-6
    assert off(dstates, wanted_states) < 1e-3


def test_a_state_that_is_not_a_number_is_not_hidden(form: str, device: torch.device) -> None:
    inputs = make(6, 8, 40, torch.float32, device)
    inputs.states[0, 0] = float("nan")
    loss, _ = head_loss(*inputs[:3], 1, inputs.dweight)
    assert bool(loss.isnan())


def test_a_target_beyond_the_vocabulary_is_noticed(form: str, device: torch.device) -> None:
    inputs = make(6, 8, 40, torch.float32, device)
    inputs.targets[2] = 40
    if form == "torch":
        with pytest.raises(RuntimeError, match="out of bounds"):
            head_loss(*inputs[:3], 1, inputs.dweight)
    else:
        loss, _ = head_loss(*inputs[:3], 1, inputs.dweight)
        assert bool(loss.isnan())


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize(("depth", "lanes"), [(1, 16), (2, 8), (4, 32), (8, 128)])
@pytest.mark.parametrize("vocabulary", [1, 16, 101, 512])
def test_however_a_row_is_cut(
    form: str, device: torch.device, depth: int, lanes: int, vocabulary: int
) -> None:
    pytest.importorskip("triton")
    from tessera.model.fused.kernels.cross_entropy import launch_cross_entropy

    draw = torch.Generator().manual_seed(depth * lanes * vocabulary)
    drawn = torch.randn(5, vocabulary, generator=draw) * 6
    targets = torch.randint(vocabulary, (5,), generator=draw)
    targets[3] = IGNORE
    wide = drawn.double().requires_grad_()
    F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert wide.grad is not None
    logits, places = drawn.clone().to(device), targets.to(device)
    losses = torch.full((5,), float("nan"), device=device)
    scale = torch.tensor(0.25, device=device)
    launch_cross_entropy(logits, places, losses, scale, depth=depth, lanes=lanes, num_warps=1)
    wanted = F.cross_entropy(drawn.double(), targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.cpu().double(), wide.grad * 0.25, rtol=1e-5, atol=1e-7)
