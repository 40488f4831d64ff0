"""The shape of a ProtoGPT and what follows from it by arithmetic: parameters, FLOPs, memory.

No torch here. Every figure that the project prints about a model's size or cost comes from these
formulas, and the tests hold them against the tensors that ``ProtoGPT`` really allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOPS_FORMULA = (
    "6 x (parameters - position table) + 6 x layers x d_model x sequence "
    "(training, forward and backward; causal attention counted as half of the square)"
)
LINEARS = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
"""The four linears of every block, by the names that LoRA targets."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a ProtoGPT.

    ``layers`` blocks of width ``d_model`` with ``heads`` heads, a table of ``context`` learned
    positions and a vocabulary of ``vocab_size``; ``mlp_ratio`` x d_model hidden units in the MLP.
    ``gelu`` is ``"exact"`` (erf) or ``"tanh"``; ``norm_eps`` is RMSNorm's epsilon.
    """

    layers: int
    d_model: int
    heads: int
    context: int
    vocab_size: int
    mlp_ratio: int = 4
    gelu: str = "tanh"
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.mlp_ratio * self.d_model


def linear_sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(in, out) features of the four linears of a block, keyed as in ``LINEARS``."""
    d, h = shape.d_model, shape.hidden
    return {"attn.qkv": (d, 3 * d), "attn.out": (d, d), "mlp.up": (d, h), "mlp.down": (h, d)}


def parameters(shape: ModelShape) -> int:
    """Number of parameters: token and position tables, blocks, final norm; the head is tied."""
    linears = sum(i * o for i, o in linear_sizes(shape).values())
    tables = (shape.vocab_size + shape.context) * shape.d_model
    return tables + shape.layers * (linears + 2 * shape.d_model) + shape.d_model


def lora_parameters(shape: ModelShape, rank: int, targets: tuple[str, ...] = LINEARS) -> int:
    """Trainable parameters of LoRA of ``rank`` on ``targets`` of every block: r x (in + out)."""
    sizes = linear_sizes(shape)
    return shape.layers * sum(rank * sum(sizes[name]) for name in targets)


def flops_per_token(shape: ModelShape, sequence: int | None = None) -> int:
    """FLOPs a trained token; see ``FLOPS_FORMULA`` (Kaplan et al. 2020, causal).

    ``sequence`` is the length of the samples in tokens, by default the whole context.
    """
    positions = shape.context * shape.d_model
    attention = 6 * shape.layers * shape.d_model * (sequence or shape.context)
    return 6 * (parameters(shape) - positions) + attention


_FUSED_TOKENS = 8192
"""``fused.head.CHUNK``, which needs torch."""


def training_memory(
    shape: ModelShape,
    micro_batch: int,
    low_precision: bool,
    sequence: int | None = None,
    *,
    fused: bool = False,
) -> dict[str, int]:
    """Estimated peak bytes of one training step, by part.

    For ``micro_batch`` samples of ``sequence`` tokens, by default the whole context.

    States are exact (float32 master weights, gradients and two AdamW moments). Activations count
    what the backward pass of a compiled block keeps (16 x d_model elements a token and block: two
    norm inputs and outputs, fused qkv, attention output, and the MLP's hidden layer before and
    after GELU), the logits twice in float32 and once in the compute precision. With ``fused`` (the
    fused operations) logits exist for 8,192 tokens at a time, in the compute precision alone, and
    there is a working copy of the weights. An estimate: measured peaks are in ``benchmarks/``.
    """
    count = parameters(shape)
    element = 2 if low_precision else 4
    tokens = micro_batch * (sequence or shape.context)
    logits = tokens * shape.vocab_size * (2 * 4 + element)
    if fused:
        logits = min(tokens, _FUSED_TOKENS) * shape.vocab_size * element
    parts = {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "activations": tokens * shape.layers * 16 * shape.d_model * element,
        "logits": logits,
    }
    return parts | {"working_copies": element * count} if fused else parts
