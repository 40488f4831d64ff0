from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.model.fused.embedding import embed, embedding_backward
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape

SHAPES = [(1, 1, 8, 5, 3), (3, 7, 24, 11, 9), (2, 40, 40, 4, 40), (4, 33, 520, 90, 64)]
"""B, T, C, V, P; few entries make long runs of one token."""


def assert_rounded(found: Tensor, wanted: Tensor) -> None:
    """Equal, but for the last place of bf16: Triton's interpreter cuts off where GPUs round."""
    rtol = 2**-7 if wanted.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0.0)


@pytest.mark.parametrize(("B", "T", "C", "V", "P"), SHAPES)
def test_rows_are_added_and_rounded_once(
    form: str, device: torch.device, B: int, T: int, C: int, V: int, P: int
) -> None:
    draw = torch.Generator().manual_seed(B * T * C)
    ids = torch.randint(V, (B, T), generator=draw).to(device)
    tokens = torch.randn(V, C, generator=draw).to(device)
    positions = torch.randn(P, C, generator=draw).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        found = embed(ids, tokens, positions, dtype)
        wanted = (tokens[ids] + positions[:T]).to(dtype)
        assert found.dtype == dtype
        assert_rounded(found, wanted.view(B * T, C))


def test_it_is_what_the_model_does(form: str, device: torch.device) -> None:
    model = ProtoGPT(ModelShape(layers=1, d_model=16, heads=2, context=12, vocab_size=50))
    model.initialize(3)
    model.to(device)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    wanted = model._embed(ids, 0, torch.bfloat16)
    found = embed(ids, model.tokens.weight, model.positions.weight, torch.bfloat16)
    assert_rounded(found.view(2, 9, 16), wanted)


def test_more_positions_than_the_table_has(form: str, device: torch.device) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
    tokens, positions = torch.zeros(2, 8, device=device), torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match="4 positions do not fit a position table of 3"):
        embed(ids, tokens, positions, torch.float32)


@pytest.mark.parametrize(("B", "T", "C", "V", "P"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_float64_autograd(
    form: str, device: torch.device, dtype: torch.dtype, B: int, T: int, C: int, V: int, P: int
) -> None:
    draw = torch.Generator().manual_seed(B * T + C + V)
    ids = torch.randint(V, (B, T), generator=draw)
    ids[:, T // 2 :] = V - 1  # one token more often than the others
    dx = torch.randn(B * T, C, generator=draw).to(dtype)
    old_tokens, old_positions = (torch.randn(n, C, generator=draw) for n in (V, P))
    tokens = torch.zeros(V, C, dtype=torch.float64, requires_grad=True)
    positions = torch.zeros(P, C, dtype=torch.float64, requires_grad=True)
    (tokens[ids] + positions[:T]).backward(dx.double().view(B, T, C))  # type: ignore[no-untyped-call]
    assert tokens.grad is not None
    assert positions.grad is not None
    dtokens, dpositions = old_tokens.clone().to(device), old_positions.clone().to(device)
    embedding_backward(dx.to(device), ids.to(device), dtokens, dpositions)
    assert dtokens.dtype == dpositions.dtype == torch.float32
    torch.testing.assert_close(
        dtokens.cpu().double(), old_tokens + tokens.grad, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        dpositions.cpu().double(), old_positions + positions.grad, rtol=1e-5, atol=1e-5
    )


def test_the_same_inputs_give_the_same_bits(form: str, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(9)
    ids = torch.randint(3, (4, 50), generator=draw).to(device)
    dx = torch.randn(200, 24, generator=draw).to(device)
    results = []
    for _ in range(2):
        sums = torch.zeros(3, 24, device=device), torch.zeros(50, 24, device=device)
        embedding_backward(dx, ids, *sums)
        results.append(sums)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
