"""Working copies of a model's matrices: in the compute dtype or float8, made once a step.

The parameters stay float32. What a layer does not use in its current precision is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tessera.model.fused.block import BlockTensors
from tessera.model.fused.block8 import Weight8, Weights8
from tessera.model.fused.fp8 import cast, cast_dithered
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
        self._stochastic = stochastic
        self.head: Tensor = self._head
        self.blocks: list[BlockTensors] = []
        self.blocks8: list[Weights8 | None] = []

    @torch.no_grad()
    def refresh(self, float8: Sequence[bool], step: int = 0) -> None:
        """Make them from the parameters as they are, for the layers that use float8 in float8.

        ``step`` says which way weights are rounded, if it is by chance.
        """
        self.blocks, self.blocks8 = [], []  # before the new ones: they take the same memory
        self.head = self._head.to(self._dtype)
        pairs = list(zip(self._blocks, float8, strict=True))
        cast8 = self._in_float8([(n, block) for n, (block, on) in enumerate(pairs) if on], step)
        for block, eight in pairs:
            self.blocks.append(block if eight else self._in_compute_dtype(block))
            self.blocks8.append(next(cast8) if eight else None)

    def _in_compute_dtype(self, block: BlockTensors) -> BlockTensors:
        matrices = {name: getattr(block, name).to(self._dtype) for name in _MATRICES}
        return block._replace(**matrices)

    def _in_float8(
        self, blocks: Sequence[tuple[int, BlockTensors]], step: int
    ) -> Iterator[Weights8]:
        """Each scaled so that its largest value is float8's; all together, to launch little.

        ``blocks`` come with their numbers, which tell random numbers apart.
        """
        matrices = [getattr(block, name) for _, block in blocks for name in _MATRICES]
        numbers = [len(_MATRICES) * n + i for n, _ in blocks for i in range(len(_MATRICES))]
        if not matrices:
            return
        largest = torch.stack(torch._foreach_norm(matrices, float("inf")))
        scales = torch.finfo(torch.float8_e4m3fn).max / largest.clamp(min=1e-12)
        seen = torch.zeros_like(scales)
        inverses = aligned_inverses(scales)
        each = zip(
            matrices, numbers, torch.split(scales, 1), torch.split(seen, 1), inverses.unbind(),
            strict=True,
        )  # fmt: skip
        dtype = torch.float8_e4m3fn
        made = [
            Weight8(
                cast_dithered(matrix, scale, amax, number, step)
                if self._stochastic
                else cast(matrix, scale, amax, dtype),
                inverse[:1],
            )
            for matrix, number, scale, amax, inverse in each
        ]
        for first in range(0, len(made), len(_MATRICES)):
            yield Weights8(*made[first : first + len(_MATRICES)])


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
