"""The copy to host memory: all that the training loop waits for.

Host memory is taken once and used again. On a GPU it is page-locked, which makes the copy run at
the speed of the bus (50 GB/s instead of 5), and it is cut from slabs of one gibibyte, because
torch's allocator of such memory rounds every piece up to a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_SLAB = 1 << 30
_ALIGN = 512


class HostCopy:
    """Copies a state to host memory, always the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._slab: Tensor | None = None
        self._used = 0

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors`` on the CPU, valid until the next call; shards stay shards."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            buffer = self._buffer(name, local)
            buffer.copy_(local, non_blocking=self._pinned)
            copies[name] = _shard_like(tensor, buffer) if isinstance(tensor, DTensor) else buffer
        if self._pinned:
            torch.cuda.current_stream(self._device).synchronize()
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._allocate(like)
            self._buffers[name] = buffer
        return buffer

    def _allocate(self, like: Tensor) -> Tensor:
        if not self._pinned:
            return torch.empty(like.shape, dtype=like.dtype)
        size = like.numel() * like.element_size()
        if self._slab is None or self._used + size > len(self._slab):
            length = max(_SLAB, math.ceil(size / _ALIGN) * _ALIGN)
            self._slab, self._used = torch.empty(length, dtype=torch.uint8, pin_memory=True), 0
        piece = self._slab[self._used : self._used + size]
        self._used += math.ceil(size / _ALIGN) * _ALIGN
        return piece.view(like.dtype).view(like.shape)


def _shard_like(shard: DTensor, local: Tensor) -> DTensor:
    """The same shard of the same whole with its bytes elsewhere.

    What a GPU's mesh says about offsets holds; ``from_local`` would carry the bytes back to it.
    """
    made: DTensor = DTensor(local, shard._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made
