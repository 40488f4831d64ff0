"""Ceilings of a device: what is measured is what a training step does; no figure is judged here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tessera.model import probe
from tessera.model.shape import ModelShape, flops_per_token, linear_sizes

CPU = torch.device("cpu")
SHAPE = ModelShape(layers=3, d_model=32, heads=2, context=16, vocab_size=48)
UUID = "12345678"


def products(tokens: int, dtype: torch.dtype = torch.float32) -> list[probe.Product]:
    return probe.matrix_products(SHAPE, tokens, dtype, CPU, 1)


def test_the_products_are_those_of_a_step() -> None:
    """All of them over one layer and the head come to 6 FLOPs a token and matrix element."""
    found = products(64)
    head = sum(p.flops for p in found if p.name.startswith("head "))
    blocks = sum(p.flops for p in found) - head
    assert head == 6 * 64 * SHAPE.d_model * SHAPE.vocab_size
    assert blocks == 6 * 64 * sum(i * o for i, o in linear_sizes(SHAPE).values())
    assert len({p.name for p in found}) == len(found) == 15
    assert all(p.seconds > 0 and p.dtype == "float32" for p in found)


def test_products_and_attention_come_to_the_flops_of_a_token() -> None:
    """Attention's backward pass as two of the forward's, which is how model FLOPs count it."""
    tokens, sequence = 32, 16
    found = products(tokens)
    head = sum(p.flops for p in found if p.name.startswith("head "))
    matrices = head + SHAPE.layers * (sum(p.flops for p in found) - head)
    forward, backward = probe.attention_flops(SHAPE, sequence, tokens)
    assert backward == 2.5 * forward
    norms = 6 * tokens * (2 * SHAPE.layers + 1) * SHAPE.d_model
    whole = matrices + norms + SHAPE.layers * 3 * forward
    assert whole == tokens * flops_per_token(SHAPE, sequence)


def test_logits_are_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "HEAD_TOKENS", 8)
    heads = {p.name: (p.m, p.k, p.n) for p in products(64) if p.name.startswith("head ")}
    assert heads == {
        "head forward": (8, 32, 48), "head d_input": (8, 48, 32), "head d_weight": (48, 8, 32),
    }  # fmt: skip


def test_told_after_every_product() -> None:
    told: list[str] = []
    probe.matrix_products(SHAPE, 16, torch.float32, CPU, 1, told.append)
    assert len(told) == 15
    assert told[0] == "float32 attn.qkv forward"


def test_a_rate_weighs_by_time() -> None:
    slow = probe.Product("mlp.up forward", "bf16", 10, 10, 10, seconds=3.0)
    fast = probe.Product("mlp.down forward", "bf16", 10, 10, 10, seconds=1.0)
    head = probe.Product("head forward", "bf16", 10, 10, 20, seconds=2.0)
    rates = probe.rates([slow, fast, head])
    assert rates == probe.Rates(blocks=4000 / 4.0, head=4000 / 2.0)
    assert probe.rates([slow, fast]).head == 0.0


def test_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 9.0])  # marks: intervals of 1, 2 and 6 s
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert probe.median_seconds(work, CPU, 3) == 2.0
    assert calls == 3 + probe._WARM_UP


def test_a_cpu_copies_and_attends() -> None:
    assert probe.copy_speed(CPU, 1) > 0
    speed = probe.attention_speed("math", SHAPE, 2, 16, torch.float32, CPU, 1)
    assert speed.backend == "math"
    assert speed.forward_flops_per_s > 0
    assert speed.backward_flops_per_s > 0


def test_an_attention_backend_that_is_not_here_says_why() -> None:
    with pytest.raises(ValueError, match="cannot be used here"):
        probe.attention_speed("cudnn", SHAPE, 2, 16, torch.bfloat16, CPU, 1)


def test_a_cpu_has_no_float8() -> None:
    assert probe.float8_missing(CPU) == "a CPU has no float8 products"


def test_a_cpu_is_described() -> None:
    card = probe.describe_card(CPU, "CPU of the test")
    assert (card.name, card.kind, card.torch) == ("CPU of the test", "cpu", torch.__version__)
    assert card.memory_bytes > 2**28
    assert card.power_limit_w is None
    assert card.driver is None
    assert card.cuda is None


def answering(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "answers"),
    [
        ("echo '700.00, 580.159.04, 1980'", ["700.00", "580.159.04", "1980"]),
        ("echo '[N/A], 580.159.04, [N/A]'", [None, "580.159.04", None]),
        ("echo 'No devices were found'", [None, None, None]),
        ("exit 9", [None, None, None]),
    ],
)
def test_what_nvidia_smi_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    answers: list[str | None],
) -> None:
    answering(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert probe._nvidia_smi(UUID) == answers


def test_it_is_asked_about_this_card_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    answering(tmp_path, f'echo "$@" > {asked}; echo "700, 1, 2"')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    probe._nvidia_smi(UUID)
    assert asked.read_text().split() == [
        "--id=GPU-12345678", "--query-gpu=power.limit,driver_version,clocks.max.sm",
        "--format=csv,noheader,nounits",
    ]  # fmt: skip


def test_no_tool_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe._nvidia_smi(UUID) == [None, None, None]
