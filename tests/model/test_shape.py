"""The arithmetic as published, and the FLOPs formula against a count of what torch really does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tessera.model.lora import add_lora
from tessera.model.loss import summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import (
    LINEARS,
    ModelShape,
    flops_per_token,
    linear_sizes,
    lora_parameters,
    parameters,
    training_memory,
)

REFERENCE = ModelShape(layers=32, d_model=1536, heads=16, context=4096, vocab_size=65_536)


def test_the_reference_comes_out_exactly() -> None:
    assert REFERENCE.head_dim == 96
    assert REFERENCE.hidden == 6144
    assert (
        parameters(REFERENCE)
        == 65536 * 1536 + 4096 * 1536 + 32 * (12 * 1536**2 + 2 * 1536) + 1536
        == 1_013_024_256
    )
    assert (
        lora_parameters(REFERENCE, 16)
        == 32 * 16 * (1536 + 4608 + 1536 + 1536 + 1536 + 6144 + 6144 + 1536)
        == 12_582_912
    )
    assert 24_504_827_904 % 65_536 == 0
    assert 24_504_827_904 // 65_536 == 373_914


def test_lora_of_some_linears_counts_only_those() -> None:
    each = [lora_parameters(REFERENCE, 8, (name,)) for name in LINEARS]
    assert sum(each) == lora_parameters(REFERENCE, 8)
    assert each[0] == 32 * 8 * (1536 + 4608)


def test_the_linears_are_those_of_a_block() -> None:
    shape = ModelShape(1, 24, 3, 12, 37, mlp_ratio=3)
    block = ProtoGPT(shape).blocks[0]
    for name, (inner, outer) in linear_sizes(shape).items():
        weight = block.get_parameter(f"{name}.weight")
        assert weight.shape == (outer, inner)
    adapted = ProtoGPT(shape)
    trainable = add_lora(adapted, 5, 10.0, seed=1)
    assert sum(p.numel() for p in trainable) == lora_parameters(shape, 5)


@pytest.mark.parametrize(
    "shape", [ModelShape(2, 32, 2, 64, 101), ModelShape(3, 48, 4, 32, 64, mlp_ratio=2)]
)
def test_flops_a_token_are_those_that_torch_counts(shape: ModelShape) -> None:
    """torch counts matrix products alone, and attention over the whole square.

    (Attention is taken apart into plain products here, because the counter passes over the CPU's
    fused kernel.)

    Counted there: the four linears of each block, the head, and the two products of attention.
    Not counted there: norms, GELU, soft-max, residuals, the look-up in the tables, the optimiser.
    The formula differs on purpose in two ways: attention is half of the square (causal), and the
    norm weights are among the parameters that it multiplies by six (a share of 1e-4 at 1B).
    """
    model = ProtoGPT(shape)
    model.initialize(1)
    ids = torch.randint(shape.vocab_size, (2, shape.context))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        states = model.hidden(ids)
        loss = summed_cross_entropy(states, model.tokens.weight, ids)
        forward = counter.get_total_flops()
        loss.backward()  # type: ignore[no-untyped-call]
    T, d = shape.context, shape.d_model
    linears = sum(i * o for i, o in linear_sizes(shape).values())
    square = 4 * shape.layers * d * T  # a token, forward: queries x keys and shares x values
    products = 2 * (shape.layers * linears + shape.vocab_size * d)
    assert forward == ids.numel() * (products + square)

    norms = (2 * shape.layers + 1) * d
    assert flops_per_token(shape) == 3 * products + 3 * square // 2 + 6 * norms
    assert counter.get_total_flops() == ids.numel() * 3 * (products + square)


def test_the_estimate_for_the_fused_operations_is_what_a_gpu_took() -> None:
    """66.56 GiB on an H200, benchmarks/throughput.md."""
    from tessera.model.fused.head import CHUNK

    parts = training_memory(REFERENCE, 8, low_precision=True, fused=True)
    assert sum(parts.values()) / 2**30 == pytest.approx(66.56, rel=0.02)
    assert parts["logits"] == CHUNK * REFERENCE.vocab_size * 2
    assert training_memory(REFERENCE, 1, low_precision=True, fused=True)["logits"] == 2**29


def test_memory_states_are_exact_and_activations_grow_with_the_micro_batch() -> None:
    one, four = (training_memory(REFERENCE, n, low_precision=True) for n in (1, 4))
    count = parameters(REFERENCE)
    assert one["weights"] + one["gradients"] + one["optimizer"] == 16 * count
    assert four["activations"] == 4 * one["activations"]
    assert four["logits"] == 4 * one["logits"]
    float32 = training_memory(REFERENCE, 1, low_precision=False)
    assert float32["activations"] == 2 * one["activations"]
