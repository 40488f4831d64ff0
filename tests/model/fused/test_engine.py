"""The hand-written step against autograd over the plain model."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from tessera.model.fused.attention import choose_backend
from tessera.model.fused.engine import Engine
from tessera.model.fused.recipe import Recipe
from tessera.model.fused.scaling import Scales, sites_of
from tessera.model.fused.working import WorkingCopies
from tessera.model.loss import IGNORE, summed_cross_entropy
from tessera.model.protogpt import Block, ProtoGPT
from tessera.model.shape import ModelShape

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]


def shape(gelu: Literal["exact", "tanh"] = "tanh", layers: int = 2) -> ModelShape:
    return ModelShape(
        layers=layers, d_model=48, heads=3, context=40, vocab_size=131, mlp_ratio=4, gelu=gelu,
        norm_eps=1e-6,
    )  # fmt: skip


def model_of(shape: ModelShape, dtype: torch.dtype = torch.float32) -> ProtoGPT:
    model = ProtoGPT(shape)
    model.initialize(7, init_std=0.08)
    with torch.no_grad():
        for block in model.blocks:  # weights of ones would hide a norm that is not applied
            assert isinstance(block, Block)
            for norm in (block.norm1, block.norm2):
                norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    return model.to(dtype)


def block_of(model: ProtoGPT, number: int) -> Block:
    block = model.blocks[number]
    assert isinstance(block, Block)
    return block


def batches(count: int, B: int = 3, T: int = 37) -> list[Batch]:
    chance = torch.Generator().manual_seed(11)
    made = []
    for _ in range(count):
        ids = torch.randint(131, (B, T + 1), generator=chance)
        targets = ids[:, 1:].clone()
        targets[0, :5] = IGNORE
        made.append((ids[:, :-1].contiguous(), targets))
    return made


def engine_of(model: ProtoGPT, dtype: torch.dtype, *, float8: Recipe | None = None) -> Engine:
    backend = choose_backend("math", CPU, dtype, model.shape.head_dim)
    return Engine(model, dtype, backend, float8=float8)


def step(engine: Engine, data: list[Batch]) -> Tensor:
    total = torch.zeros(())
    for number, (ids, targets) in enumerate(data, 1):
        total = total + engine.micro_step(ids, targets, 100, last=number == len(data))
    return total


def by_autograd(model: ProtoGPT, dtype: torch.dtype, data: list[Batch]) -> Tensor:
    total = torch.zeros(())
    for ids, targets in data:
        states = model.hidden(ids, dtype)
        loss = summed_cross_entropy(states, model.tokens.weight, targets) / 100
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    return total


def take_gradients(model: ProtoGPT) -> dict[str, Tensor]:
    taken = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        taken[name] = parameter.grad
        parameter.grad = None
    return taken


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_autograd(gelu: Literal["exact", "tanh"], recompute: bool) -> None:
    model = model_of(shape(gelu), torch.float64)
    data = batches(2)
    wanted_loss = by_autograd(model, torch.float64, data)
    wanted = take_gradients(model)
    model.recompute = recompute
    loss = step(engine_of(model, torch.float64), data)
    got = take_gradients(model)
    # The plain loss goes through float32, so its own last digits are the limit.
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-6)
    assert {name: error(got[name], wanted[name]) for name in wanted} == pytest.approx(
        dict.fromkeys(wanted, 0.0), abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_no_more_than_autograd_does(dtype: torch.dtype) -> None:
    """Distance to the float64 gradient: at most that of autograd in the same dtype, and a bit."""
    exact = model_of(shape(), torch.float64)
    data = batches(2)
    by_autograd(exact, torch.float64, data)
    truth = take_gradients(exact)
    model = model_of(shape())
    by_autograd(model, dtype, data)
    theirs = take_gradients(model)
    step(engine_of(model, dtype), data)
    ours = take_gradients(model)
    for name, true in truth.items():
        assert error(ours[name], true) < 1.3 * error(theirs[name], true) + 1e-6, name


def test_working_copies_follow_the_weights() -> None:
    model = model_of(shape())
    engine = engine_of(model, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    data = batches(1)
    first = step(engine, data)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    second = step(engine, data)
    assert second < first - 0.01
    assert second.item() == pytest.approx(by_autograd(model, torch.bfloat16, data).item(), rel=5e-3)


# -- float8 ----------------------------------------------------------------------------------


def float8_data() -> list[Batch]:
    return batches(2, B=2, T=32)


def test_float8_begins_with_a_step_of_the_compute_dtype_that_learns_the_scales() -> None:
    model = model_of(shape())
    data = float8_data()
    plain = step(engine_of(model, torch.bfloat16), data)
    take_gradients(model)
    engine = engine_of(model, torch.bfloat16, float8=Recipe())
    assert torch.equal(step(engine, data), plain)
    take_gradients(model)
    assert not torch.equal(step(engine, data), plain), "the second step is in float8"


def test_float8_gradients_point_where_the_exact_ones_do() -> None:
    exact = model_of(shape(), torch.float64)
    data = float8_data()
    loss = by_autograd(exact, torch.float64, data)
    truth = take_gradients(exact)
    model = model_of(shape())
    engine = engine_of(model, torch.bfloat16, float8=Recipe())
    step(engine, data)
    take_gradients(model)
    assert step(engine, data).item() == pytest.approx(loss.item(), rel=5e-3)
    ours = take_gradients(model)
    for name, true in truth.items():
        cosine = torch.cosine_similarity(ours[name].double().flatten(), true.flatten(), dim=0)
        assert cosine > 0.985, (name, float(cosine))
    assert engine.take_cut() == {}


def test_a_restored_engine_continues_to_the_bit() -> None:
    data = float8_data()
    model = model_of(shape())
    engine = engine_of(model, torch.bfloat16, float8=Recipe())
    for _ in range(3):
        take_gradients(model) if model.tokens.weight.grad is not None else None
        step(engine, data)
    take_gradients(model)
    saved = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    whole = step(engine, data)
    wanted = take_gradients(model)

    other = engine_of(model, torch.bfloat16, float8=Recipe())
    for name, tensor in other.tensors().items():
        tensor.copy_(saved[name])
    other.restored()
    assert torch.equal(step(other, data), whole)
    got = take_gradients(model)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_inverse_scales_lie_where_cublas_takes_them() -> None:
    """It refuses a scale whose address is no multiple of 16 bytes."""
    scales = Scales(sites_of(3, ("a", "b"), ("c",), torch.float8_e5m2), torch.device("cpu"))
    assert [site.inverse.data_ptr() % 16 for site in scales.sites.values()] == [0] * 9
    scales.sites["1.b"].amax.fill_(3.5)
    scales.update()
    site = scales.sites["1.b"]
    assert float(site.scale) == 64.0
    assert float(site.inverse) == 1 / 64.0
    copies = WorkingCopies(model_of(shape()), torch.float32)
    copies.refresh([True, True])
    assert len(copies.blocks8) == 2
    for weights in copies.blocks8:
        assert weights is not None
        assert [weight.inverse.data_ptr() % 16 for weight in weights] == [0] * 4


def test_half_a_step_that_is_discarded_leaves_no_trace() -> None:
    data = float8_data()
    model = model_of(shape())
    engine = engine_of(model, torch.bfloat16, float8=Recipe())
    step(engine, data)
    take_gradients(model)
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    with torch.no_grad():
        model.tokens.weight.mul_(50)
    engine.micro_step(*data[0], 100, last=False)
    engine.discard()
    with torch.no_grad():
        model.tokens.weight.div_(50)
    take_gradients(model)
    again = engine_of(model, torch.bfloat16, float8=Recipe())
    for name, tensor in again.tensors().items():
        tensor.copy_(before[name])
    again.restored()
    assert torch.equal(step(engine, data), step(again, data))
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(engine.tensors().values(), again.tensors().values(), strict=True)
    )


def test_values_that_do_not_fit_are_counted_and_their_blocks_can_go_back() -> None:
    data = float8_data()
    model = model_of(shape())
    engine = engine_of(model, torch.bfloat16, float8=Recipe())
    step(engine, data)
    with torch.no_grad():
        block_of(model, 1).norm2.weight.mul_(20)
    step(engine, data)
    cut = engine.take_cut()
    assert cut[1] >= 1
    assert engine.take_cut() == {}
    engine.without_float8([0, 1])
    assert engine.layers_in_float8() == []
    take_gradients(model)
    with torch.no_grad():
        block_of(model, 1).norm2.weight.div_(20)
    plain = engine_of(model, torch.bfloat16)
    assert torch.equal(step(engine, data), step(plain, data))


def test_a_value_that_is_no_number_reaches_the_loss_and_not_the_scales() -> None:
    data = float8_data()
    model = model_of(shape())
    engine = engine_of(model, torch.bfloat16, float8=Recipe())
    step(engine, data)
    take_gradients(model)
    sound = block_of(model, 0).norm1.weight.detach().clone()
    with torch.no_grad():
        block_of(model, 0).norm1.weight[3] = float("nan")
    assert step(engine, data).isnan()
    take_gradients(model)
    with torch.no_grad():
        block_of(model, 0).norm1.weight.copy_(sound)
    assert step(engine, data).isfinite()
    assert all(tensor.isfinite().all() for tensor in engine.tensors().values())


def test_a_shape_that_float8_cannot_take_is_refused_in_one_sentence() -> None:
    odd = ModelShape(
        layers=1, d_model=24, heads=2, context=16, vocab_size=64, mlp_ratio=4, gelu="tanh",
        norm_eps=1e-6,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"multiple of 16, and this one is 24; change it or"):
        engine_of(model_of(odd), torch.bfloat16, float8=Recipe())
