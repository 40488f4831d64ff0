from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.model.fused.gelu import Approximate, gelu, gelu_backward

SHAPES = [(3, 40), (1, 1), (37, 113), (64, 128)]
DTYPES = [torch.bfloat16, torch.float32]
FORMS: list[Approximate] = ["tanh", "none"]


def draw(seed: int, M: int, N: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """da and u, from both flat ends and the bend between them."""
    generator = torch.Generator().manual_seed(seed)
    da, u = (torch.randn(M, N, generator=generator) * size for size in (1.0, 2.5))
    return [x.to(device, dtype) for x in (da, u)]


def reference(da: Tensor, u: Tensor, approximate: Approximate) -> tuple[Tensor, Tensor]:
    leaf = u.double().requires_grad_()
    a = F.gelu(leaf, approximate=approximate)
    return a.detach(), torch.autograd.grad(a, leaf, da.double())[0]


def close(actual: Tensor, expected: Tensor) -> None:
    """Rounded once: within half a unit in the last place of the float64 numbers."""
    half = {torch.bfloat16: 2.0**-8, torch.float32: 2e-6}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=1.01 * half, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_it_and_its_gradient(
    form: str,
    device: torch.device,
    M: int,
    N: int,
    approximate: Approximate,
    dtype: torch.dtype,
) -> None:
    da, u = draw(1, M, N, dtype, device)
    a, du = reference(da, u, approximate)
    close(gelu(u, approximate), a)
    close(gelu_backward(da, u, approximate), du)


@pytest.mark.parametrize("approximate", FORMS)
def test_the_gradient_may_take_the_memory_of_its_input(
    form: str, device: torch.device, approximate: Approximate
) -> None:
    da, u = draw(2, 37, 113, torch.bfloat16, device)
    expected = gelu_backward(da, u, approximate)
    out = torch.full_like(da, torch.nan)
    assert gelu_backward(da, u, approximate, out) is out
    assert torch.equal(out, expected)
    assert gelu_backward(da, u, approximate, da) is da
    assert torch.equal(da, expected)


@pytest.mark.parametrize("approximate", FORMS)
def test_far_out_it_is_zero_or_the_input(
    form: str, device: torch.device, approximate: Approximate
) -> None:
    u = torch.tensor([[-1e4, -60.0, -20.0, 0.0, 20.0, 60.0, 1e4]], device=device)
    expected = u.clamp(min=0.0)
    torch.testing.assert_close(gelu(u, approximate), expected, rtol=0.0, atol=1e-12)
    slope = gelu_backward(torch.ones_like(u), u, approximate)
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]], device=device)
    torch.testing.assert_close(slope, expected, rtol=0.0, atol=1e-12)


def test_nan_stays_nan(form: str, device: torch.device) -> None:
    u = torch.tensor([[1.0, torch.nan, 2.0]], device=device)
    for out in (gelu(u, "tanh"), gelu_backward(torch.ones_like(u), u, "tanh")):
        assert out.isnan().tolist() == [[False, True, False]]


def test_float64_stays_float64() -> None:
    da, u = draw(3, 5, 7, torch.float64, torch.device("cpu"))
    for approximate in FORMS:
        a, du = reference(da, u, approximate)
        torch.testing.assert_close(gelu(u, approximate), a)
        torch.testing.assert_close(gelu_backward(da, u, approximate), du)
