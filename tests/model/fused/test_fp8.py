from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.model.fused import fp8
from tessera.model.fused.fp8 import Float8
from tessera.model.fused.gelu import Approximate

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPES = [(128, 64), (132, 70), (37, 33), (4, 160), (260, 208), (1, 1)]
KINDS = ["bf16", "float32", "normed", "gelu", "gelu exact", "gelu backward", "gelu backward exact"]


def bits(x8: Tensor) -> Tensor:
    """The bytes, as integers whose order is that of the numbers."""
    raw = x8.view(torch.int8).int()
    return torch.where(raw < 0, -(raw & 127), raw)


def draw(seed: int, M: int, C: int, device: torch.device, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(M, C, generator=generator) * size).bfloat16().to(device)


def scalars(device: torch.device, scale: float) -> tuple[Tensor, Tensor]:
    """A scale and an amax as views into larger tensors; neighbours of the amax are NaN."""
    amaxes = torch.full((5,), torch.nan, device=device)
    amaxes[3] = 0.0
    return torch.full((3,), scale, device=device)[1:2], amaxes[3:4]


def make(
    kind: str, M: int, C: int, device: torch.device
) -> tuple[Callable[[Tensor, Tensor, torch.dtype], Float8], Tensor]:
    """The cast to test and what it casts, in float64."""
    x, u = draw(1, M, C, device, 3.0), draw(2, M, C, device, 2.0)
    form: Approximate = "none" if kind.endswith("exact") else "tanh"
    leaf = u.double().requires_grad_()
    activated = F.gelu(leaf, approximate=form)
    if kind == "bf16":
        return lambda s, a, t: fp8.cast(x, s, a, t), x.double()
    if kind == "float32":
        wide = x.float() * 1.2345
        return lambda s, a, t: fp8.cast(wide, s, a, t), wide.double()
    if kind == "normed":
        rstd = 1 + draw(3, M, 1, device).float().abs()[:, 0]
        weight = 1 + draw(4, C, 1, device).float()[:, 0]
        value = x.double() * rstd.double()[:, None] * weight.double()
        return lambda s, a, t: fp8.cast_normed(x, rstd, weight, s, a, t), value
    if kind.startswith("gelu backward"):
        value = torch.autograd.grad(activated, leaf, x.double())[0]
        return lambda s, a, t: fp8.cast_gelu_backward(x, u, form, s, a, t), value
    return lambda s, a, t: fp8.cast_gelu(u, form, s, a, t), activated.detach()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "C"), SHAPES)
def test_rows_columns_and_amax(
    form: str, device: torch.device, M: int, C: int, kind: str, dtype: torch.dtype
) -> None:
    run, value = make(kind, M, C, device)
    scale, amax = scalars(device, 17.0)
    rows, columns = run(scale, amax, dtype)
    assert (rows.shape, columns.shape) == ((M, C), (C, M))
    assert (rows.dtype, columns.dtype) == (dtype, dtype)
    assert rows.is_contiguous()
    assert columns.is_contiguous()
    limit = torch.finfo(dtype).max
    expected = (value * 17.0).float().clamp(-limit, limit).to(dtype)
    off = (bits(rows) - bits(expected)).abs()
    if kind in ("bf16", "float32"):
        assert int(off.max()) == 0
    else:  # float32 against float64: a value next to the middle of two may fall to either.
        small = value.abs() * 17.0 < 1e-3
        assert int(off[~small].max()) <= 1 if (~small).any() else True
        assert float((off[~small] > 0).float().sum()) <= 2 + 0.001 * off.numel()
        torch.testing.assert_close(
            fp8.restore(rows, scale).double()[small], value[small], rtol=0.0, atol=1e-4
        )
    assert torch.equal(columns.view(torch.int8), rows.view(torch.int8).t())
    torch.testing.assert_close(amax.double(), value.abs().max()[None], rtol=2e-6, atol=1e-6)


def test_amax_is_raised_never_lowered_and_its_neighbours_are_left(
    form: str, device: torch.device
) -> None:
    amaxes = torch.tensor([-1.0, 0.25, -2.0], device=device)
    scale = torch.ones(1, device=device)
    for top, expected in ((0.5, 0.5), (0.125, 0.5), (8.0, 8.0)):
        x = torch.zeros(200, 40, dtype=torch.bfloat16, device=device)
        x[150, 7] = -top
        fp8.cast(x, scale, amaxes[1:2], E4M3)
        assert amaxes.tolist() == [-1.0, expected, -2.0]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_too_large_becomes_the_largest(
    form: str, device: torch.device, dtype: torch.dtype
) -> None:
    limit = torch.finfo(dtype).max
    x = torch.tensor([[2.0 * limit, -2.0 * limit, limit, 1.0]], device=device)
    scale, amax = scalars(device, 8.0)
    rows, columns = fp8.cast(x, scale, amax, dtype)
    assert rows.float().tolist() == [[limit, -limit, limit, 8.0]]
    assert columns.float().tolist() == [[limit], [-limit], [limit], [8.0]]
    assert float(amax) == 2.0 * limit


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("first", [0, 3])
def test_nan_and_infinity_show(
    form: str, device: torch.device, first: int, dtype: torch.dtype
) -> None:
    x = torch.ones(first + 5, 6, dtype=torch.bfloat16, device=device)
    scale, amax = scalars(device, 1.0)
    x[first, 2] = -torch.inf
    rows, _ = fp8.cast(x, scale, amax, dtype)
    assert float(rows[first, 2].float()) == -torch.finfo(dtype).max
    assert float(amax) == torch.inf
    x[first + 1, 1] = torch.nan
    rows, columns = fp8.cast(x, scale, amax, dtype)
    assert rows.float().isnan().nonzero().tolist() == [[first + 1, 1]]
    assert columns.float().isnan().nonzero().tolist() == [[1, first + 1]]
    assert bool(amax.isnan())
    fp8.cast(torch.ones_like(x), scale, amax, dtype)
    assert bool(amax.isnan())


def test_without_columns(form: str, device: torch.device) -> None:
    x = draw(5, 37, 33, device)
    scale, amax = scalars(device, 2.0)
    rows, columns = fp8.cast(x, scale, amax, E4M3, columns=False)
    assert columns.shape == (0,)
    assert torch.equal(bits(rows), bits((x.float() * 2.0).to(E4M3)))
    assert float(amax) == float(x.abs().max())


def test_restore_undoes_the_scale(form: str, device: torch.device) -> None:
    x = draw(6, 40, 30, device)
    scale, amax = scalars(device, 64.0)
    back = fp8.restore(fp8.cast(x, scale, amax, E4M3).rows, scale)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, x.float(), rtol=2.0**-4, atol=2.0**-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("M", "C"), [(1, 1), (37, 33), (300, 70)])
def test_amax_of(form: str, device: torch.device, M: int, C: int, dtype: torch.dtype) -> None:
    x = draw(7, M, C, device).to(dtype)
    amax = fp8.amax_of(x)
    assert (amax.shape, amax.dtype) == ((1,), torch.float32)
    assert float(amax) == float(x.abs().max())
    x[M // 2, C // 2] = torch.nan
    assert bool(fp8.amax_of(x).isnan())


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("tile", [(32, 32, 4, 1), (64, 128, 4, 2), (128, 128, 8, 16)])
def test_tiles_change_nothing(
    form: str, device: torch.device, tile: tuple[int, int, int, int]
) -> None:
    from tessera.model.fused.kernels import fp8 as kernels

    x = draw(8, 260, 208, device)
    scale, amax = scalars(device, 5.0)
    rows, columns = kernels.cast(kernels.PLAIN, x, scale, amax, E4M3, tile=kernels.Tile(*tile))
    assert torch.equal(bits(rows), bits((x.float() * 5.0).to(E4M3)))
    assert torch.equal(columns.view(torch.int8), rows.view(torch.int8).t())
    assert float(amax) == float(x.abs().max())


@pytest.mark.parametrize("gradients", [E4M3, E5M2])
def test_casts_are_verified(form: str, device: torch.device, gradients: torch.dtype) -> None:
    fp8.verify(device, gradients, "tanh", dithered=True)


CASTS = ("cast", "cast_dithered", "cast_normed", "cast_gelu", "cast_gelu_backward")


@pytest.mark.parametrize(
    ("broken", "both"),
    [*((name, False) for name in CASTS), ("cast", True), ("cast_dithered", True)],
)
def test_a_byte_that_a_compiler_mixed_up_is_refused(
    monkeypatch: pytest.MonkeyPatch, broken: str, both: bool
) -> None:
    """In the transposed copy, or of what is nothing but rounded in both alike."""
    right = getattr(fp8, broken)

    def wrong(*given: object) -> Float8:
        made: Float8 = right(*given)
        made.columns.view(torch.int8)[100, 200] ^= 1
        if both:
            made.rows.view(torch.int8)[200, 100] ^= 1
        return made

    monkeypatch.setattr(fp8, broken, wrong)
    with pytest.raises(ValueError, match="write wrong bytes"):
        fp8.verify(torch.device("cpu"), E5M2, "none", dithered=True)


def test_nan_and_infinity_show_in_dithered_casts(form: str, device: torch.device) -> None:
    bits = torch.tensor([[0x7FFFFFFF, 0x7FC00000], [0x7F800000, -0x800000]], dtype=torch.int32)
    x = bits.view(torch.float32).to(device)
    for step in range(20):
        scale, amax = scalars(device, 1.0)
        rows = fp8.cast_dithered(x, scale, amax, 0, step).rows.float()
        assert bool(rows[0].isnan().all())
        assert rows[1].tolist() == [448.0, -448.0]


_COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tessera.model.fused.kernels import fp8

kernel = fp8._cast_kernel
types = dict(x="*bf16", u="*bf16", rstd="*fp32", weight="*fp32", scale="*fp32", amax="*i32")
types |= dict(rows="*fp8e4nv", columns="*i32", M="i32", C="i32")
types |= dict(key="i32")
tile = fp8.TILE
for kind, dither in [(0, False), (1, False), (2, False), (3, False), (0, True)]:
    given = dict(KIND=kind, TANH=True, PTX=True, COLUMNS=True, PACK=True)
    given |= dict(DITHER=dither)
    given |= dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP=tile.group)
    given |= {} if kind == fp8.NORMED else dict(rstd=None, weight=None)
    given |= {} if kind == fp8.GELU_BACKWARD else dict(u=None)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in given else types[name] for name in names}
    others = ("scale", "amax", "key")
    aligned = [i for i, name in enumerate(names) if name in types and name not in others]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=given,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=tile.num_warps)
    )
    ptx = made.asm["ptx"]
    cubin = len(made.asm["cubin"]) > 0
    print(kind, ptx.count("st.global.v4"), ptx.count("cvt.rn.satfinite"), ptx.count("prmt"), cubin)
"""


def test_it_compiles_for_hopper_with_wide_stores_and_no_recomputation(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: 64 elements a thread are 32 casts of 2, and 8 stores of 16 bytes."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["0", "1", "2", "3", "0"]
    for _, stores, casts, permutes, compiled in lines:
        assert (int(stores), int(casts), compiled) == (8, 32, "True")
        assert int(permutes) == 32
