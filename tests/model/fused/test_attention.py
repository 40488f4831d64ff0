"""Every attention backend of this machine against the definition, written out in float64.

On a machine without a GPU that is ``math`` alone, plus the calls of the operators of torch on
tensors without data, which check names, order and types of their arguments.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tessera.model.fused.attention import (
    NAMES,
    AttentionBackend,
    CudnnAttention,
    FlashAttention,
    available_backends,
    choose_backend,
)

CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = pytest.mark.gpu
SHAPES = [(2, 64, 3, 96), (1, 100, 2, 96), (2, 33, 2, 96), (3, 257, 1, 64), (1, 1024, 2, 96)]
"""(B, T, H, D): one block of a kernel and less, several, and a part of one; few D, each of which
flash4 compiles for seconds."""

# The operators say in C++ that they add in no fixed order; asking for NaN in new memory asks too.
pytestmark = pytest.mark.filterwarnings("ignore:.*determinis")


def usable(dtype: torch.dtype) -> list[str]:
    return [n for n, reason in available_backends(HERE, dtype, 96).items() if reason is None]


def half_and_double() -> list[object]:
    """(backend, dtype) of everything that this machine can run."""
    found: list[object] = [pytest.param("math", torch.float64, id="math-float64")]
    for name in usable(torch.bfloat16):
        marks = [] if name == "math" else [ON_GPU]
        found.append(pytest.param(name, torch.bfloat16, id=f"{name}-bfloat16", marks=marks))
    return found


def definition(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Out (B, T, H, D) and the rows' log-sum-exp (B, H, T), with autograd, in qkv's dtype."""
    q, k, v = (plane.transpose(1, 2) for plane in qkv.unbind(2))
    scores = q @ k.transpose(-1, -2) / math.sqrt(qkv.size(-1))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
    scores = scores.masked_fill(later, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return (torch.exp(scores - lse[..., None]) @ v).transpose(1, 2), lse


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Qkv and the gradient of out; values that soft-max tells apart."""
    batch, tokens, heads, dim = shape
    source = torch.Generator().manual_seed(seed)
    qkv = torch.randn((batch, tokens, 3, heads, dim), generator=source, dtype=torch.float64)
    dout = torch.randn((batch, tokens, heads, dim), generator=source, dtype=torch.float64)
    return (1.5 * qkv).to(HERE, dtype), dout.to(HERE, dtype)


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square error over root mean square value."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "dtype"), half_and_double())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_are_the_definition(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    batch, tokens, heads, dim = shape
    qkv, dout = inputs(shape, dtype, seed=tokens)
    backend = choose_backend(name, HERE, dtype, dim)
    out, saved = backend.forward(qkv)
    dqkv = backend.backward(dout, qkv, out, saved)

    leaf = qkv.double().requires_grad_()
    expected, lse = definition(leaf)
    (gradient,) = torch.autograd.grad(expected, leaf, dout.double())
    # bfloat16 rounds each result by up to 2^-9 of itself, and P and dS inside the kernels as well.
    bound = 1e-12 if dtype == torch.float64 else 1e-2
    assert distance(out, expected.detach()) < bound
    for plane in (0, 1, 2):
        assert distance(dqkv[:, :, plane], gradient[:, :, plane]) < bound
    if saved.lse is not None:
        kept = saved.lse.reshape(batch, heads, tokens).double()
        assert float((kept - lse.detach()).abs().max()) < 1e-2


@pytest.mark.parametrize(("name", "dtype"), half_and_double())
def test_results_are_contiguous_and_the_arguments_stay(name: str, dtype: torch.dtype) -> None:
    qkv, dout = inputs((2, 130, 2, 96), dtype, seed=1)
    before = qkv.clone(), dout.clone()
    backend = choose_backend(name, HERE, dtype, 96)
    out, saved = backend.forward(qkv)
    kept = out.clone()
    dqkv = backend.backward(dout, qkv, out, saved)
    assert backend.name == name
    assert out.shape == dout.shape
    assert dqkv.shape == qkv.shape
    assert out.is_contiguous()
    assert dqkv.is_contiguous()
    assert out.dtype == dqkv.dtype == dtype
    assert not out.requires_grad
    assert not dqkv.requires_grad
    assert torch.equal(qkv, before[0])
    assert torch.equal(dout, before[1])
    assert torch.equal(out, kept)


def test_float32_on_any_device() -> None:
    qkv, dout = inputs((2, 70, 2, 24), torch.float32, seed=2)
    backend = choose_backend("auto", HERE, torch.float32, 24)
    assert backend.name == "math"
    out, saved = backend.forward(qkv)
    leaf = qkv.double().requires_grad_()
    expected, _ = definition(leaf)
    (gradient,) = torch.autograd.grad(expected, leaf, dout.double())
    assert distance(out, expected.detach()) < 1e-5
    assert distance(backend.backward(dout, qkv, out, saved), gradient) < 1e-5


def test_a_single_token_attends_to_itself() -> None:
    qkv, dout = inputs((2, 1, 3, 8), torch.float64, seed=4)
    backend = choose_backend("math", HERE, torch.float64, 8)
    out, saved = backend.forward(qkv)
    dqkv = backend.backward(dout, qkv, out, saved)
    assert torch.allclose(out, qkv[:, :, 2])
    assert torch.allclose(dqkv[:, :, 2], dout)
    assert float(dqkv[:, :, :2].abs().max()) < 1e-12


def test_it_works_where_autograd_is_switched_off() -> None:
    qkv, dout = inputs((1, 20, 2, 16), torch.float64, seed=3)
    backend = choose_backend("math", HERE, torch.float64, 16)
    expected = backend.backward(dout, qkv, *backend.forward(qkv))
    with torch.no_grad():
        assert torch.equal(backend.backward(dout, qkv, *backend.forward(qkv)), expected)


@pytest.mark.parametrize("backend", [CudnnAttention(), FlashAttention()], ids=lambda b: b.name)
@pytest.mark.parametrize("shape", [(2, 128, 4, 96), (1, 100, 3, 64)], ids=str)
def test_the_operators_of_torch_take_these_arguments(
    backend: AttentionBackend, shape: tuple[int, int, int, int]
) -> None:
    batch, tokens, heads, dim = shape
    with FakeTensorMode():
        qkv = torch.empty(
            (batch, tokens, 3, heads, dim), dtype=torch.bfloat16, device="cuda", requires_grad=False
        )
        dout = torch.empty((batch, tokens, heads, dim), dtype=torch.bfloat16, device="cuda")
        out, saved = backend.forward(qkv)
        dqkv = backend.backward(dout, qkv, out, saved)
        assert saved.lse is not None
        assert saved.lse.numel() == batch * heads * tokens
        assert out.shape == dout.shape
        assert dqkv.shape == qkv.shape
        assert out.is_contiguous()
        assert dqkv.is_contiguous()
        assert dqkv.dtype == torch.bfloat16


def test_on_a_cpu_only_math_is_left_and_every_reason_is_given() -> None:
    found = available_backends(CPU)
    assert tuple(found) == NAMES == ("flash4", "cudnn", "flash", "math")
    assert found == {
        "flash4": "it needs an NVIDIA GPU, not cpu",
        "cudnn": "it needs an NVIDIA GPU, not cpu",
        "flash": "it needs an NVIDIA GPU, not cpu",
        "math": None,
    }
    assert choose_backend("auto", CPU, torch.bfloat16, 96).name == "math"


@pytest.mark.parametrize("name", ["flash4", "cudnn", "flash"])
def test_a_named_backend_that_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as refused:
        choose_backend(name, CPU, torch.bfloat16, 96)
    assert str(refused.value) == (
        f"attention backend '{name}' cannot be used here: it needs an NVIDIA GPU, not cpu"
    )


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError) as refused:
        choose_backend("flash3", CPU, torch.bfloat16, 96)
    assert str(refused.value) == (
        "attention backend 'flash3' is unknown: choose auto, flash4, cudnn, flash or math"
    )


def test_a_hopper_gpu_without_the_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what a GPU that is too old and heads of an odd size are told."""
    cuda = torch.device("cuda")
    # No machine of the tests has such a card: the answers of the driver are all that is made up.
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr("importlib.import_module", _no_module)
    assert available_backends(cuda)["flash4"] == (
        "the module cutlass is missing, pip install 'tessera[fast]' brings it"
    )
    assert available_backends(cuda)["cudnn"] == (
        "this PyTorch has no cuDNN, install one built for CUDA"
    )
    assert available_backends(cuda, torch.float32)["flash4"] == (
        "it computes in bfloat16 or float16, not in float32"
    )
    assert available_backends(cuda, head_dim=100)["cudnn"] == (
        "it needs a head dimension that is a multiple of 8 up to 128, not 100"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert available_backends(cuda)["flash4"] == (
        "it is for compute capability 9.x and 10.x, this GPU has 12.0"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert available_backends(cuda)["flash"] == (
        "it needs a GPU of compute capability 8.0 or newer, this one has 7.5"
    )


def _no_module(name: str) -> object:
    raise ModuleNotFoundError(f"No module named 'cutlass' (importing {name})", name="cutlass")
