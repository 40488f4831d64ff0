"""Working copies of a model's matrices: in the compute dtype or float8, made once a step.

The parameters stay float32. What a layer does not use in its current precision is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tessera.model.fused.block import BlockTensors
from tessera.model.fused.block8 import Weight8, Weights8
from tessera.model.fused.fp8 import Float8, cast
from tessera.model.fused.scaling import aligned_inverses
from tessera.model.protogpt import ProtoGPT

_MATRICES = ("qkv", "out", "up", "down")


class WorkingCopies:
    """Of all blocks and of the head; ``refresh`` when the weights have changed.

    Who changes them must say so: fused optimisers do not raise autograd's version counters.
    """

    def __init__(
        self, model: ProtoGPT, compute_dtype: torch.dtype, *, stochastic: bool = False
    ) -> None:
        """``stochastic``: as ``Recipe.stochastic_weights``."""
        self._dtype = compute_dtype
        self._head = model.tokens.weight
        self._blocks = [block_parameters(block) for block in model.blocks]
        self._device = self._head.device
        self._chance = torch.Generator(self._device) if stochastic else None
        self.head: Tensor = self._head
        self.blocks: list[BlockTensors] = []
        self.blocks8: list[Weights8 | None] = []

    @torch.no_grad()
    def refresh(self, float8: Sequence[bool], step: int = 0) -> None:
        """Make them from the parameters as they are, for the layers that use float8 in float8.

        ``step`` chooses the random numbers, if there are any.
        """
        if self._chance is not None:
            self._chance.manual_seed(step)
        self.blocks, self.blocks8 = [], []  # before the new ones: they take the same memory
        self.head = self._head.to(self._dtype)
        cast8 = iter(self._in_float8([b for b, on in zip(self._blocks, float8, strict=True) if on]))
        for block, eight in zip(self._blocks, float8, strict=True):
            self.blocks.append(block if eight else self._in_compute_dtype(block))
            self.blocks8.append(next(cast8) if eight else None)

    def _in_compute_dtype(self, block: BlockTensors) -> BlockTensors:
        matrices = {name: getattr(block, name).to(self._dtype) for name in _MATRICES}
        return block._replace(**matrices)

    def _in_float8(self, blocks: Sequence[BlockTensors]) -> Iterator[Weights8]:
        """Each scaled so that its largest value is float8's; all together, to launch little."""
        matrices = [getattr(block, name) for block in blocks for name in _MATRICES]
        if not matrices:
            return
        largest = torch.stack(torch._foreach_norm(matrices, float("inf")))
        scales = torch.finfo(torch.float8_e4m3fn).max / largest.clamp(min=1e-12)
        seen = torch.zeros_like(scales)
        inverses = aligned_inverses(scales)
        each = zip(
            matrices, torch.split(scales, 1), torch.split(seen, 1), inverses.unbind(), strict=True
        )
        made = [
            Weight8(self._cast(matrix, scale, amax), inverse[:1])
            for matrix, scale, amax, inverse in each
        ]
        for first in range(0, len(made), len(_MATRICES)):
            yield Weights8(*made[first : first + len(_MATRICES)])

    def _cast(self, matrix: Tensor, scale: Tensor, amax: Tensor) -> Float8:
        if self._chance is not None:
            matrix, scale = dithered(matrix * scale, self._chance), torch.ones_like(scale)
        return cast(matrix, scale, amax, torch.float8_e4m3fn)


def dithered(x: Tensor, chance: torch.Generator) -> Tensor:
    """Each number of ``x``, float32, as one of its two neighbours in e4m3, on average itself.

    What is too small for e4m3's normal numbers (below 2^-6) keeps bits that e4m3 does not have.
    """
    bits = x.view(torch.int32)
    beyond = 23 - 3  # bits of the mantissa that e4m3 cuts off
    below = torch.randint(
        1 << beyond, x.shape, generator=chance, dtype=torch.int32, device=x.device
    )
    return below.add_(bits).bitwise_and_(-(1 << beyond)).view(torch.float32)


def block_parameters(block: nn.Module) -> BlockTensors:
    """The parameters of a ``Block``, by the names that the operations use."""
    named = dict(block.named_parameters())
    return BlockTensors(
        norm1=named["norm1.weight"],
        qkv=named["attn.qkv.weight"],
        out=named["attn.out.weight"],
        norm2=named["norm2.weight"],
        up=named["mlp.up.weight"],
        down=named["mlp.down.weight"],
    )
