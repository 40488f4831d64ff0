from __future__ import annotations

import pytest
import torch

from tessera.model.fused.matmul import _adds_in_place, accumulate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("narrow", "wide", "error"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (33, 70, 17), (16, 256, 24)])
def test_the_product_is_added_and_never_rounded_to_the_dtype_of_the_factors(
    narrow: torch.dtype, wide: torch.dtype, error: float, n: int, m: int, k: int
) -> None:
    draw = torch.Generator().manual_seed(n + m + k)
    left = torch.randn(m, n, generator=draw).to(DEVICE, narrow).t()
    right = torch.randn(m, k, generator=draw).to(DEVICE, narrow)
    total = torch.randn(n, k, generator=draw).to(DEVICE, wide)
    wanted = total.double() + left.double() @ right.double()
    scale = left.double().abs() @ right.double().abs() + 1.0
    accumulate(total, left, right)
    assert float(((total.double() - wanted).abs() / scale).max()) < error


def test_a_torch_that_cannot_mix_dtypes_is_recognised() -> None:
    # On a CPU torch has no such product.
    assert not _adds_in_place(torch.bfloat16, torch.float32, torch.device("cpu"))
