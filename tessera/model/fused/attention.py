"""Causal attention of one projection's output, by the fastest library that this machine has.

    flash4   flash-attention's kernels for Hopper and Blackwell (package flash-attn-4), compiled at
             the first use and kept on disk; writes all three gradients into one buffer
    cudnn    cuDNN through torch
    flash    flash-attention 2, which torch brings along
    math     ``F.scaled_dot_product_attention`` and autograd: any device, any floating dtype

All of them compute ``softmax(q k^T / sqrt(D)) v`` with every token seeing itself and what is before
it, without dropout. In the shapes below B is the batch, T the tokens of a sample, H the heads and D
the dimension of a head; q, k and v are planes 0, 1 and 2 of ``qkv`` (B, T, 3, H, D).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("flash4", "cudnn", "flash", "math")
"""Every backend, the preferred first."""

_HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten


class Saved(NamedTuple):
    """What ``backward`` needs besides the tensors that it is given.

    ``lse`` holds the logarithm of each row's sum of exponentials, B x H x T float32 values in a
    backend's own shape; None where the backend computes the forward pass again. ``extra`` is what
    torch's operators hand from one pass to the other (the unused state of a dropout).
    """

    lse: Tensor | None = None
    extra: tuple[Tensor, ...] = ()


class AttentionBackend(Protocol):
    """The forward and the backward pass of one library, without autograd."""

    @property
    def name(self) -> str:
        """One of ``NAMES``."""

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        """Qkv (B, T, 3, H, D) contiguous -> out (B, T, H, D) contiguous, and what to keep."""

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved) -> Tensor:
        """The gradient of ``qkv``, (B, T, 3, H, D) contiguous.

        dout is the gradient of out, (B, T, H, D) contiguous; qkv, out and saved are those of the
        forward pass. None of them is changed.
        """


def available_backends(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64
) -> dict[str, str | None]:
    """Every backend, the preferred first: None if it can be used, else the reason as a clause."""
    return {name: _REASONS[name](device, dtype, head_dim) for name in NAMES}


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """The backend called ``name``, or for ``auto`` the preferred one of those that can be used.

    Raises ValueError, one sentence, if there is no backend of that name or it cannot compute
    attention in ``dtype`` with heads of ``head_dim`` on ``device``.
    """
    if name == "auto":
        name = next(n for n in NAMES if _REASONS[n](device, dtype, head_dim) is None)
    elif name not in NAMES:
        known = ", ".join(("auto", *NAMES[:-1]))
        raise ValueError(f"attention backend {name!r} is unknown: choose {known} or {NAMES[-1]}")
    elif reason := _REASONS[name](device, dtype, head_dim):
        raise ValueError(f"attention backend {name!r} cannot be used here: {reason}")
    return _BACKENDS[name]()


class MathAttention:
    """What is meant, by torch's own choice of kernel; backward computes the forward pass again."""

    name = "math"

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        """See ``AttentionBackend``."""
        with torch.no_grad():
            return self._attend(qkv).contiguous(), Saved()

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved) -> Tensor:
        """See ``AttentionBackend``."""
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            again = self._attend(leaf)
        (gradient,) = torch.autograd.grad(again, leaf, dout)
        return gradient.contiguous()

    @staticmethod
    def _attend(qkv: Tensor) -> Tensor:
        q, k, v = _by_head(qkv)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class CudnnAttention:
    """cuDNN's kernels through torch, whose operators cannot write into a given buffer.

    The three gradients come apart and are put together by one pass over them.
    """

    name = "cudnn"

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        """See ``AttentionBackend``."""
        q, k, v = _by_head(qkv)
        out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=_scale(qkv)
        )
        return out.transpose(1, 2).contiguous(), Saved(lse, (seed, offset))

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved) -> Tensor:
        """See ``AttentionBackend``."""
        q, k, v = _by_head(qkv)
        tokens = qkv.size(1)
        return _together(
            _aten._scaled_dot_product_cudnn_attention_backward(
                dout.transpose(1, 2), q, k, v, out.transpose(1, 2), saved.lse, *saved.extra,
                None, None, None, tokens, tokens, 0.0, True, scale=_scale(qkv),
            )
        )  # fmt: skip


class FlashAttention:
    """Flash-attention 2 as built into torch; like ``CudnnAttention`` it returns three gradients."""

    name = "flash"

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        """See ``AttentionBackend``."""
        q, k, v = _by_head(qkv)
        out, lse, _, _, _, _, state, unused, _ = _aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, False, scale=_scale(qkv)
        )
        return out.transpose(1, 2).contiguous(), Saved(lse, (state, unused))

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved) -> Tensor:
        """See ``AttentionBackend``."""
        q, k, v = _by_head(qkv)
        tokens = qkv.size(1)
        return _together(
            _aten._scaled_dot_product_flash_attention_backward(
                dout.transpose(1, 2), q, k, v, out.transpose(1, 2), saved.lse,
                None, None, tokens, tokens, 0.0, True, *saved.extra, scale=_scale(qkv),
            )
        )  # fmt: skip


class Flash4Attention:
    """Flash-attention's CuTe kernels, which read and write the planes of one buffer in place."""

    name = "flash4"

    def __init__(self) -> None:
        self._library = _flash4()

    def forward(self, qkv: Tensor) -> tuple[Tensor, Saved]:
        """See ``AttentionBackend``."""
        q, k, v = qkv.unbind(2)
        batch, tokens, heads, _ = q.shape
        out = qkv.new_empty(q.shape)
        lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
        self._library._flash_attn_fwd(
            q, k, v, softmax_scale=_scale(qkv), causal=True, out=out, lse=lse
        )
        return out, Saved(lse)

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Saved) -> Tensor:
        """See ``AttentionBackend``."""
        q, k, v = qkv.unbind(2)
        gradient = torch.empty_like(qkv)
        dq, dk, dv = gradient.unbind(2)
        self._library._flash_attn_bwd(
            q, k, v, out, dout, saved.lse,
            softmax_scale=_scale(qkv), causal=True, dq=dq, dk=dk, dv=dv,
        )  # fmt: skip
        return gradient


def _by_head(qkv: Tensor) -> list[Tensor]:
    """q, k and v as views (B, H, T, D), the order that torch's operators want."""
    return [plane.transpose(1, 2) for plane in qkv.unbind(2)]


def _together(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Gradients of q, k, v (B, H, T, D), in any memory order -> (B, T, 3, H, D) contiguous."""
    return torch.stack([g.transpose(1, 2) for g in gradients], dim=2)


def _scale(qkv: Tensor) -> float:
    return float(qkv.size(-1) ** -0.5)


def _flash4() -> Any:
    """flash-attn-4's module of low-level functions; raises what its import raises.

    Compiling takes about 10 s, so what was compiled is kept on disk, where the library's variable
    ``FLASH_ATTENTION_CUTE_DSL_CACHE_DIR`` says (default: a folder in the temporary directory).
    The library reads these variables when it is imported.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    # Said by its compiler about the library's own code, at every first compilation.
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
    return importlib.import_module("flash_attn.cute.interface")


def _no_half(
    device: torch.device, dtype: torch.dtype, head_dim: int, most: int, oldest: tuple[int, int]
) -> str | None:
    """Why a kernel for half precision on GPUs from ``oldest`` on cannot be used, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < oldest:
        found, needed = (f"{major}.{minor}" for major, minor in (capability, oldest))
        return f"it needs a GPU of compute capability {needed} or newer, this one has {found}"
    if dtype not in _HALF:
        return f"it computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or not 0 < head_dim <= most:
        return f"it needs a head dimension that is a multiple of 8 up to {most}, not {head_dim}"
    return None


def _no_flash4(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if reason := _no_half(device, dtype, head_dim, most=128, oldest=(9, 0)):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"it is for compute capability 9.x and 10.x, this GPU has {major}.{minor}"
    try:
        module = _flash4()
    except ModuleNotFoundError as error:
        return f"the module {error.name} is missing, pip install 'tessera[fast]' brings it"
    except Exception as error:  # a compiler's import fails in many ways; none should stop a run
        first = str(error).partition("\n")[0]
        return f"flash-attn-4 is installed but importing it failed ({first}), reinstall it"
    if not (hasattr(module, "_flash_attn_fwd") and hasattr(module, "_flash_attn_bwd")):
        return "this version of flash-attn-4 is unknown, pip install 'tessera[fast]' brings ours"
    return None


def _no_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if reason := _no_half(device, dtype, head_dim, most=128, oldest=(8, 0)):
        return reason
    cudnn: Any = torch.backends.cudnn  # untyped functions
    version = cudnn.version() if cudnn.is_available() else None
    if version is None:
        return "this PyTorch has no cuDNN, install one built for CUDA"
    if version < 90100:
        return f"it needs cuDNN 9.1 or newer, this PyTorch has {version}: install a newer one"
    return None


def _no_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if reason := _no_half(device, dtype, head_dim, most=256, oldest=(8, 0)):
        return reason
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without flash-attention, install PyTorch's own build"
    return None


def _no_math(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


_REASONS: dict[str, Callable[[torch.device, torch.dtype, int], str | None]] = {
    "flash4": _no_flash4,
    "cudnn": _no_cudnn,
    "flash": _no_flash,
    "math": _no_math,
}
_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "flash4": Flash4Attention,
    "cudnn": CudnnAttention,
    "flash": FlashAttention,
    "math": MathAttention,
}
