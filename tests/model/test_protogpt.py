"""ProtoGPT against a slow float64 model written from the published description."""

from __future__ import annotations

import math
import platform

import pytest
import torch
from torch import Tensor

from tessera.model.digest import weights_digest
from tessera.model.loss import summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape, parameters

SHAPE = ModelShape(layers=2, d_model=24, heads=3, context=12, vocab_size=37)
REFERENCE = ModelShape(layers=32, d_model=1536, heads=16, context=4096, vocab_size=65_536)


def make(shape: ModelShape = SHAPE, seed: int = 3) -> ProtoGPT:
    model = ProtoGPT(shape)
    model.initialize(seed, init_std=0.3)  # large enough that every part matters
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms that are all one would hide a forgotten weight
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def draw_ids(batch: int, length: int, shape: ModelShape = SHAPE, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab_size, (batch, length), generator=generator)


# -- the reference ---------------------------------------------------------------------------------


def naive_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.stack([row / torch.sqrt((row * row).sum() / len(row) + eps) for row in x]) * weight


def naive_gelu(x: Tensor, kind: str) -> Tensor:
    if kind == "exact":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_attention(x: Tensor, qkv: Tensor, out: Tensor, heads: int) -> Tensor:
    T, C = x.shape
    D = C // heads
    rows = []
    for t in range(T):
        joined = []
        for h in range(heads):
            lines = slice(h * D, (h + 1) * D)
            query = qkv[:C][lines] @ x[t]
            keys = [qkv[C : 2 * C][lines] @ x[s] for s in range(t + 1)]
            values = [qkv[2 * C :][lines] @ x[s] for s in range(t + 1)]
            scores = torch.stack([(query * key).sum() / math.sqrt(D) for key in keys])
            shares = torch.exp(scores - scores.max())
            shares = shares / shares.sum()
            joined.append(torch.stack([a * v for a, v in zip(shares, values, strict=True)]).sum(0))
        rows.append(out @ torch.cat(joined))
    return torch.stack(rows)


def naive_logits(weights: dict[str, Tensor], ids: list[int], shape: ModelShape) -> Tensor:
    """One sequence (T,) -> logits (T, V) in float64."""
    x = torch.stack([weights["tokens.weight"][i] for i in ids])
    x = x + weights["positions.weight"][: len(ids)]
    for layer in range(shape.layers):
        part = {
            name.removeprefix(f"blocks.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        normed = naive_norm(x, part["norm1.weight"], shape.norm_eps)
        x = x + naive_attention(
            normed, part["attn.qkv.weight"], part["attn.out.weight"], shape.heads
        )
        normed = naive_norm(x, part["norm2.weight"], shape.norm_eps)
        hidden = naive_gelu(normed @ part["mlp.up.weight"].T, shape.gelu)
        x = x + hidden @ part["mlp.down.weight"].T
    return naive_norm(x, weights["norm.weight"], shape.norm_eps) @ weights["tokens.weight"].T


def in_float64(model: ProtoGPT) -> dict[str, Tensor]:
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_logits_and_gradients_are_those_of_the_description(gelu: str) -> None:
    shape = ModelShape(2, 24, 3, 12, 37, mlp_ratio=3, gelu=gelu, norm_eps=1e-3)
    model, ids = make(shape), draw_ids(2, 9)
    weights = in_float64(model)
    inputs, targets = ids[:, :-1], ids[:, 1:]

    expected = torch.stack([naive_logits(weights, row, shape) for row in inputs.tolist()])
    chosen = torch.log_softmax(expected, -1).gather(-1, targets.unsqueeze(-1))
    (-chosen.sum()).backward()  # type: ignore[no-untyped-call]

    logits = model(inputs)
    loss = summed_cross_entropy(model.hidden(inputs), model.tokens.weight, targets)
    loss.backward()  # type: ignore[no-untyped-call]

    # float32 against float64: rounding alone stays far below these bounds.
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=5e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        wanted = weights[name].grad
        assert wanted is not None
        error = (parameter.grad.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 5e-6, (name, float(error))


def test_the_two_gelus_differ() -> None:
    one = make(ModelShape(1, 24, 3, 12, 37, gelu="tanh"))
    other = make(ModelShape(1, 24, 3, 12, 37, gelu="exact"))
    assert (one(draw_ids(1, 8)) - other(draw_ids(1, 8))).abs().max() > 1e-5


# -- causality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [0, 4, 11])
def test_a_token_is_seen_by_no_earlier_position_and_by_every_later_one(changed: int) -> None:
    model, ids = make(), draw_ids(1, 12)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % SHAPE.vocab_size
    with torch.no_grad():
        moved = (model(ids) - model(other)).abs().amax(-1)[0]
    assert torch.equal(moved[:changed], torch.zeros(changed))
    assert (moved[changed:] > 1e-5).all()


def test_position_matters() -> None:
    model = make()
    logits = model(torch.full((1, 6), 5))
    assert (logits[0, 0] - logits[0, 1]).abs().max() > 1e-3


# -- weights ---------------------------------------------------------------------------------------


def test_the_head_is_the_token_table() -> None:
    model = make()
    tables = [n for n, p in model.named_parameters() if SHAPE.vocab_size in p.shape]
    assert tables == ["tokens.weight"]
    assert "tokens.weight" in model.state_dict()
    model(torch.tensor([[1, 2]]))[0, -1, 30].backward()
    gradient = model.tokens.weight.grad
    assert gradient is not None
    assert gradient[30].abs().max() > 1e-3, "a row that was no input gets its gradient by the head"
    assert gradient[31].abs().max() == 0


def test_no_linear_has_a_bias() -> None:
    assert all(name.endswith("weight") for name, _ in make().named_parameters())


def test_the_start_is_a_function_of_the_seed() -> None:
    def digest(seed: int) -> str:
        model = ProtoGPT(ModelShape(2, 32, 2, 16, 97))
        torch.manual_seed(seed + 7)  # the global state has no part in it
        model.initialize(seed)
        return weights_digest(model.state_dict())

    assert digest(3) == digest(3)
    assert digest(3) != digest(4)
    if platform.machine() in ("x86_64", "AMD64"):
        frozen = "8c3c7e6b2f20292a098ff3de576922d5b1002f2f4106ac8f7a320f4376550412"
        assert digest(3) == frozen, "every run on record would start from other weights"


def test_the_start_has_the_stated_spread() -> None:
    shape = ModelShape(8, 128, 4, 64, 512)
    model = ProtoGPT(shape)
    model.initialize(1, init_std=0.05)
    for name, parameter in model.state_dict().items():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        into_stream = name.endswith(("attn.out.weight", "mlp.down.weight"))
        expected = 0.05 / math.sqrt(2 * 8) if into_stream else 0.05
        assert float(parameter.std()) == pytest.approx(expected, rel=0.05), name
        assert abs(float(parameter.mean())) < expected / 20, name


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        ModelShape(1, 8, 1, 2, 3),
        ModelShape(3, 16, 4, 40, 11, mlp_ratio=2),
        ModelShape(4, 128, 4, 256, 2048),
    ],
)
def test_the_count_of_parameters_is_the_arithmetic(shape: ModelShape) -> None:
    assert sum(p.numel() for p in ProtoGPT(shape).parameters()) == parameters(shape)


def test_the_reference_has_1_013_024_256_parameters() -> None:
    with torch.device("meta"):
        model = ProtoGPT(REFERENCE)
    assert sum(p.numel() for p in model.parameters()) == 1_013_024_256


# -- generation's path -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", [[12], [1] * 12, [5, 7], [3, 1, 1, 4, 3], [11, 1]])
def test_extending_a_cache_gives_the_logits_of_the_whole(split: list[int]) -> None:
    model, ids = make(), draw_ids(2, 12)
    with torch.no_grad():
        whole = model(ids)
        caches, start = None, 0
        for length in split:
            logits, caches = model.extend(ids[:, start : start + length], caches)
            start += length
            # The same products in another order: rounding only.
            torch.testing.assert_close(logits, whole[:, start - 1], rtol=0, atol=1e-5)
    assert caches is not None
    assert caches[0].keys.shape == (2, SHAPE.heads, 12, SHAPE.head_dim)


def test_more_positions_than_the_table_holds_are_an_error() -> None:
    model = make()
    with pytest.raises(ValueError, match="13 positions do not fit a position table of 12"):
        model(draw_ids(1, 13))
    _, caches = model.extend(draw_ids(1, 12), None)
    with pytest.raises(ValueError, match="13 positions do not fit"):
        model.extend(draw_ids(1, 1), caches)


# -- precision -------------------------------------------------------------------------------------


def test_bf16_stays_close_to_float32_with_float32_gradients() -> None:
    model, ids = make(), draw_ids(2, 12)
    exact = model(ids)
    half = model(ids, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    spread = float(exact.detach().std())
    error = float((half.float() - exact).detach().abs().max())
    # bf16 keeps 8 bits: an error of a few percent of the spread, and not zero.
    assert 0 < error < 0.06 * spread

    states = model.hidden(ids, torch.bfloat16)
    loss = summed_cross_entropy(states, model.tokens.weight, ids)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
