from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.model.fused.norm import add_rms, add_rms_norm, rms_norm_backward
from tessera.model.protogpt import RMSNorm

EPS = 1e-5
SHAPES = [(5, 96), (1, 64), (9, 200), (3, 1536)]
DTYPES = [torch.bfloat16, torch.float32]


def draw(seed: int, M: int, C: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, delta, dh, dres (M, C) and a weight (C,)."""
    generator = torch.Generator().manual_seed(seed)
    wide = [torch.randn(M, C, generator=generator) * size for size in (3.0, 0.5, 0.1, 0.2)]
    weight = 1 + 0.3 * torch.randn(C, generator=generator)
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [*(x.to(device, dtype) for x in wide), weight.to(device, wide_dtype)]


def close(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    """Rounded once: within half a unit in the last place of float64 numbers of about ``size``."""
    half = {torch.bfloat16: 2.0**-8, torch.float32: 2e-6, torch.float64: 1e-13}[actual.dtype]
    atol = size * (1e-13 if actual.dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=1.01 * half, atol=atol)


def normed(total: Tensor, weight: Tensor) -> Tensor:
    """The float64 reference; autograd does the rest."""
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), SHAPES)
def test_forward(form: str, device: torch.device, M: int, C: int, dtype: torch.dtype) -> None:
    x, delta, _, _, weight = draw(1, M, C, dtype, device)
    total, rstd, h = add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(total, x + delta)
    assert (rstd.shape, rstd.dtype, h.dtype) == ((M,), torch.float32, dtype)
    close(rstd, torch.rsqrt(total.double().square().mean(-1) + EPS))
    close(h, normed(total.double(), weight.double()), 5.0)
    again = add_rms(x, delta, EPS)
    assert torch.equal(again[0], total)
    assert torch.equal(again[1], rstd)


def test_without_an_addition_the_total_is_the_input_itself(form: str, device: torch.device) -> None:
    x, _, _, _, weight = draw(2, 7, 96, torch.bfloat16, device)
    total, rstd, h = add_rms_norm(x, None, weight, EPS)
    assert total is x
    close(rstd, torch.rsqrt(x.double().square().mean(-1) + EPS))
    close(h, normed(x.double(), weight.double()), 5.0)
    assert add_rms(x, None, EPS)[0] is x


def test_it_is_the_norm_of_the_model(form: str, device: torch.device) -> None:
    x, _, _, _, weight = draw(3, 6, 200, torch.bfloat16, device)
    norm = RMSNorm(200, EPS).to(device)
    with torch.no_grad():
        norm.weight.copy_(weight)
        expected = norm(x)
    h = add_rms_norm(x, None, weight, EPS).h
    if form == "torch":
        assert torch.equal(h, expected)
    else:  # Sums in another order.
        assert float((h != expected).float().mean()) < 0.01
        torch.testing.assert_close(h, expected, rtol=2.0**-7, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("M", "C"), SHAPES)
def test_backward(
    form: str, device: torch.device, M: int, C: int, residual: bool, dtype: torch.dtype
) -> None:
    total, _, dh, dres, weight = draw(4, M, C, dtype, device)
    rstd = add_rms(total, None, EPS)[1]
    before = torch.randn(C, generator=torch.Generator().manual_seed(5)).to(device)
    dweight = before.clone()
    dx = rms_norm_backward(dh, total, rstd, weight, dres if residual else None, dweight)
    assert dx.dtype == dtype

    leaves = [total.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.autograd.grad(normed(*leaves), leaves, dh.double())
    close(dx, expected[0] + (dres.double() if residual else 0.0))
    close(dweight, before.double() + expected[1], 5.0)


@pytest.mark.parametrize("form", ["triton"], indirect=True)
def test_how_the_rows_are_shared_changes_nothing(form: str, device: torch.device) -> None:
    from tessera.model.fused.kernels import norm as kernels

    total, _, dh, dres, weight = draw(6, 21, 70, torch.bfloat16, device)
    rstd = add_rms(total, None, EPS)[1]
    results = []
    for programs, stages in ((4, 1), (21, 1), (528, 2)):
        dweight = torch.zeros(70, device=device)
        dx = kernels.rms_norm_backward(
            dh, total, rstd, weight, dres, dweight, programs=programs, stages=stages
        )
        results.append((dx, dweight))
    for dx, dweight in results[1:]:
        torch.testing.assert_close(dx, results[0][0], rtol=2.0**-7, atol=1e-6)
        torch.testing.assert_close(dweight, results[0][1])
    for rows in (1, 2, 8):
        torch.testing.assert_close(kernels.add_rms(total, None, None, EPS, rows=rows)[1], rstd)


def test_equal_inputs_give_equal_bits(form: str, device: torch.device) -> None:
    total, _, dh, dres, weight = draw(7, 33, 96, torch.bfloat16, device)
    rstd = add_rms(total, None, EPS)[1]
    first, second = torch.zeros(96, device=device), torch.zeros(96, device=device)
    for dweight in (first, second):
        rms_norm_backward(dh, total, rstd, weight, dres, dweight)
    assert torch.equal(first, second)


def test_float64_stays_float64() -> None:
    device = torch.device("cpu")
    x, delta, dh, dres, weight = draw(8, 4, 12, torch.float64, device)
    total, rstd, h = add_rms_norm(x, delta, weight, EPS)
    dweight = torch.zeros(12, dtype=torch.float64)
    dx = rms_norm_backward(dh, total, rstd, weight, dres, dweight)
    assert {t.dtype for t in (total, rstd, h, dx)} == {torch.float64}
    leaves = [total.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(normed(*leaves), leaves, dh)
    close(h, normed(total, weight))
    close(dx, expected[0] + dres)
    close(dweight, expected[1])
