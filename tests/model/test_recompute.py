"""Activations computed again in the backward pass: the same numbers, from less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessera.model.lora import add_lora
from tessera.model.loss import summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape

SHAPE = ModelShape(layers=3, d_model=48, heads=3, context=16, vocab_size=37)


def make(recompute: bool, lora: bool = False) -> ProtoGPT:
    model = ProtoGPT(SHAPE)
    model.initialize(3, init_std=0.3)  # large enough that every part matters
    if lora:
        for parameter in add_lora(model, 4, 8.0, seed=5):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    model.recompute = recompute
    return model


def ids() -> Tensor:
    return torch.randint(SHAPE.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


def loss_of(model: ProtoGPT, dtype: torch.dtype = torch.float32) -> Tensor:
    states = model.hidden(ids(), dtype)
    return summed_cross_entropy(states, model.tokens.weight, ids())


def learned(model: ProtoGPT, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loss of two micro-batches and every gradient that they leave."""
    total = torch.zeros(())
    for _ in range(2):
        loss = loss_of(model, dtype)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **gradients}


def blocks_entered(model: ProtoGPT, work: Callable[[], object]) -> int:
    """How often a block of ``model`` begins its forward pass during ``work``."""
    count = 0

    def enter(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [block.register_forward_pre_hook(enter) for block in model.blocks]
    work()
    for handle in handles:
        handle.remove()
    return count


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_losses_and_gradients_are_equal_to_the_bit(dtype: torch.dtype, lora: bool) -> None:
    plain, again = (learned(make(recompute, lora), dtype) for recompute in (False, True))
    assert plain.keys() == again.keys()
    assert len(plain) > 8
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name


def test_every_block_is_computed_twice_and_without_gradients_once() -> None:
    def backward(model: ProtoGPT) -> None:
        loss_of(model).backward()  # type: ignore[no-untyped-call]

    def evaluate(model: ProtoGPT) -> None:
        with torch.no_grad():
            loss_of(model)

    plain, again = make(False), make(True)
    assert blocks_entered(plain, lambda: backward(plain)) == SHAPE.layers
    assert blocks_entered(again, lambda: backward(again)) == 2 * SHAPE.layers
    assert blocks_entered(again, lambda: evaluate(again)) == SHAPE.layers


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(model: ProtoGPT) -> int:
        """Elements of blocks' activations that the graph holds, each storage once."""
        weights = {p.data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.hidden(ids())
        return sum(held.values())

    inputs_of_blocks = SHAPE.layers * ids().numel() * SHAPE.d_model * 4
    assert kept(make(True)) + inputs_of_blocks < kept(make(False)) / 4


def test_compiled_blocks_are_recomputed_to_the_bit() -> None:
    found = []
    for recompute in (False, True):
        model = make(recompute)
        for block in model.blocks:
            block.compile(backend="aot_eager")  # the graphs of a compilation without its C++
        found.append(learned(model))
    torch.compiler.reset()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
