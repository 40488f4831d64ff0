"""The least time that a whole step can take at ceilings measured on the same card.

Products and attention at the FLOP/s that they reach alone, and everything else at the speed of a
copy, each tensor travelling once wherever operations could be one pass. No step reaches it: nothing
overlaps in it, and nothing waits either. What it is good for is the distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.model.probe import AttentionSpeed, Rates, attention_flops
from tessera.model.shape import ModelShape, linear_sizes, parameters

FLOOR_FORMULA = (
    "matrix FLOPs / measured matrix FLOP/s + attention FLOPs / measured attention FLOP/s "
    "(the best backend, causal half) + (element-wise bytes + optimiser bytes) / measured copy "
    "bytes/s; fraction of the ceiling = that time / measured time of a step"
)

OPTIMIZER_BYTES = 38
"""A parameter: gradient for the norm 4; gradient, weight and two moments read 16, weight and
moments written 12, and the working copies or casts of the next step made from it 6."""
_NORMS = 16
"""Elements of d_model a token and block, read and written by both norms with the sum before them:
4 each forward (two terms, their sum, the result) and 4 backward."""
_GELU = 5
"""Elements of the hidden layer a token and block: 2 forward, 3 backward."""
_CASTS = 24
"""Bytes of d_model a token and block that float8 adds: attention's output, and the gradients of
the MLP's output, of the attention's projection and of qkv, read once and written in both
orientations (4 + 4 + 4 + 12)."""
_AROUND = 12
"""Elements of d_model a token outside of the blocks: embedding 2, its backward 2, last norm 8."""
_LOGITS = 3
"""Times that the logits travel in the loss: read, and read and overwritten by their gradient."""


@dataclass(frozen=True)
class Ceilings:
    """Speeds measured on this card, in the experiment's precision and, where it has it, float8.

    ``matrix`` and ``float8`` are FLOP/s; float8 None where the card has none. ``copy`` is in bytes
    a second, read and written together.
    """

    copy: float
    matrix: Rates
    float8: Rates | None
    attention: Sequence[AttentionSpeed]


@dataclass(frozen=True)
class Floor:
    """Seconds of one step, by part."""

    blocks_s: float
    head_s: float
    attention_s: float
    elementwise_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """All parts, one after the other."""
        return (
            self.blocks_s + self.head_s + self.attention_s + self.elementwise_s + self.optimizer_s
        )


def floor_of_step(
    shape: ModelShape,
    sequence: int,
    tokens: int,
    ceilings: Ceilings,
    *,
    element: int,
    float8: bool,
) -> Floor | None:
    """Of a step of ``tokens`` with ``element`` bytes an activation.

    None where the part that would decide was not measured.
    """
    rate = ceilings.float8 if float8 else ceilings.matrix
    if rate is None or not ceilings.attention:
        return None
    blocks = 6.0 * tokens * shape.layers * sum(i * o for i, o in linear_sizes(shape).values())
    head = 6.0 * tokens * shape.d_model * shape.vocab_size
    forward, backward = attention_flops(shape, sequence, tokens)
    attention = min(
        forward / speed.forward_flops_per_s + backward / speed.backward_flops_per_s
        for speed in ceilings.attention
    )
    return Floor(
        blocks_s=blocks / rate.blocks,
        head_s=head / ceilings.matrix.head,
        attention_s=shape.layers * attention,
        elementwise_s=elementwise_bytes(shape, tokens, element, float8) / ceilings.copy,
        optimizer_s=OPTIMIZER_BYTES * parameters(shape) / ceilings.copy,
    )


def elementwise_bytes(shape: ModelShape, tokens: int, element: int, float8: bool) -> int:
    """Bytes that norms, GELU, embedding and loss read and write, and with float8 the casts."""
    per_block = _NORMS * shape.d_model + _GELU * shape.hidden
    outside = _AROUND * shape.d_model + _LOGITS * shape.vocab_size
    elements = shape.layers * per_block + outside
    casts = _CASTS * shape.layers * shape.d_model if float8 else 0
    return tokens * (elements * element + casts)
