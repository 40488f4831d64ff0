"""LoRA, and its files read and written by their owner, ``peft``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from tessera.evaluation.weights import Base
from tessera.experiment import Lora
from tessera.model.lora import LoRALinear, add_lora, load_lora_state, lora_state
from tessera.model.loss import summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import LINEARS, ModelShape, lora_parameters
from tessera.runs import Run, RunRecord
from tessera.storage import Root
from tessera.training.publish import publish_adapter

SHAPE = ModelShape(layers=2, d_model=24, heads=3, context=12, vocab_size=37)
IDS = torch.tensor([[1, 5, 9, 2, 2, 30], [7, 0, 36, 4, 11, 3]])


def make_base() -> ProtoGPT:
    model = ProtoGPT(SHAPE)
    model.initialize(3, init_std=0.2)
    return model


def make_adapted(rank: int = 4, alpha: float = 6.0, targets: tuple[str, ...] = LINEARS) -> ProtoGPT:
    """An adapter that moves the logits: B is drawn instead of zero."""
    model = make_base()
    add_lora(model, rank, alpha, seed=5, targets=targets)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.normal_(0, 0.3, generator=generator)
    return model


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS)
    return logits


# -- the arithmetic --------------------------------------------------------------------------------


def test_a_fresh_adapter_says_nothing() -> None:
    model = make_base()
    before = logits_of(model)
    add_lora(model, 4, 8.0, seed=1)
    assert torch.equal(logits_of(model), before)


def test_an_adapter_is_the_low_rank_update_times_alpha_over_rank() -> None:
    adapted, merged = make_adapted(rank=4, alpha=6.0), make_base()
    state = lora_state(adapted)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in state:
                low, high = state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]
                parameter.add_((6.0 / 4) * high @ low)
    difference = (logits_of(adapted) - logits_of(make_base())).abs().max()
    assert difference > 0.1
    torch.testing.assert_close(logits_of(adapted), logits_of(merged), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [LINEARS, ("attn.qkv", "mlp.down")])
def test_only_the_adapter_is_trained(targets: tuple[str, ...]) -> None:
    model = make_base()
    trainable = add_lora(model, 3, 6.0, seed=1, targets=targets)
    assert sum(p.numel() for p in trainable) == lora_parameters(SHAPE, 3, targets)
    states = model.hidden(IDS)
    summed_cross_entropy(states, model.tokens.weight, IDS).backward()  # type: ignore[no-untyped-call]
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in with_gradient)
    assert len(with_gradient) == len(trainable) == 2 * SHAPE.layers * len(targets)
    # With B zero the gradient reaches B alone; A follows once B has moved.
    for name, parameter in model.named_parameters():
        if name in with_gradient and name.endswith("lora_B"):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0


def test_the_start_is_a_function_of_the_seed() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        model = make_base()
        torch.manual_seed(seed + 3)
        add_lora(model, 4, 8.0, seed=seed)
        return lora_state(model)

    one, again, other = state(1), state(1), state(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    name = "base_model.model.blocks.0.attn.qkv.lora_A.weight"
    assert not torch.equal(one[name], other[name])
    bound = 1 / SHAPE.d_model**0.5
    assert bound * 0.8 < float(one[name].abs().max()) <= bound


def test_bf16_activations_are_allowed() -> None:
    model = make_adapted()
    with torch.no_grad():
        half = model(IDS, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    spread = logits_of(model).std()
    assert (half.float() - logits_of(model)).abs().max() < 0.1 * spread


# -- state -----------------------------------------------------------------------------------------


def test_a_state_travels_whole() -> None:
    source, target = make_adapted(), make_base()
    add_lora(target, 4, 6.0, seed=99)
    load_lora_state(target, lora_state(source))
    assert torch.equal(logits_of(target), logits_of(source))


def test_another_rank_a_missing_and_a_foreign_tensor_are_named() -> None:
    state = lora_state(make_adapted(rank=4))
    model = make_base()
    add_lora(model, 8, 6.0, seed=1)
    before = lora_state(model)
    with pytest.raises(ValueError, match=r"lora_A has shape \(4, 24\), .* \(8, 24\)"):
        load_lora_state(model, state)
    assert all(torch.equal(before[name], now) for name, now in lora_state(model).items())

    model = make_base()
    add_lora(model, 4, 6.0, seed=1)
    name = "base_model.model.blocks.1.mlp.up.lora_B.weight"
    missing = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(ValueError, match=f"differ in 1 tensors, first {name}"):
        load_lora_state(model, missing)
    with pytest.raises(ValueError, match=r"first base_model\.model\.odd"):
        load_lora_state(model, {**state, "base_model.model.odd": torch.zeros(1)})


def test_a_second_adapter_is_refused() -> None:
    model = make_adapted()
    with pytest.raises(ValueError, match=r"attn\.qkv already has an adapter"):
        add_lora(model, 4, 6.0, seed=1)


# -- peft ------------------------------------------------------------------------------------------


def publish(tmp_path: Path, model: ProtoGPT, lora: Lora) -> Path:
    """The adapter folder that a fine-tuning leaves."""
    root = Root(str(tmp_path / "root"), attempts=1)
    record = RunRecord("voice", "voice", "sft", 0.0, {}, {}, "f" * 64, {}, None)
    base = Base("base-run", model, None, "b" * 64)  # type: ignore[arg-type]
    publish_adapter(Run(root, record), "ep1", model, lora, base)
    return tmp_path / "root" / "runs" / "voice" / "adapters" / "ep1"


@pytest.mark.parametrize("targets", [LINEARS, ("attn.out", "mlp.up")])
def test_peft_reads_what_we_publish(tmp_path: Path, targets: tuple[str, ...]) -> None:
    ours = make_adapted(4, 6.0, targets)
    lora = Lora.model_validate({"rank": 4, "alpha": 6.0, "targets": targets})
    folder = publish(tmp_path, ours, lora)
    theirs = PeftModel.from_pretrained(make_base(), str(folder))
    assert (logits_of(ours) - logits_of(make_base())).abs().max() > 0.1
    # The same products in the same order but for the scale: rounding only.
    torch.testing.assert_close(logits_of(theirs), logits_of(ours), rtol=0, atol=1e-5)
    assert sum(".lora_" in name for name, _ in theirs.named_parameters()) == 4 * len(targets)


def test_we_read_what_peft_saves(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(LINEARS))
    theirs = get_peft_model(make_base(), config)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3, generator=generator)
    theirs.save_pretrained(str(tmp_path))

    written = json.loads((tmp_path / "adapter_config.json").read_bytes())
    ours = make_base()
    targets = [name for name in LINEARS if name in written["target_modules"]]
    add_lora(ours, written["r"], written["lora_alpha"], seed=0, targets=targets)
    load_lora_state(ours, load_file(tmp_path / "adapter_model.safetensors"))
    assert (logits_of(ours) - logits_of(make_base())).abs().max() > 0.1
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=0, atol=1e-5)
