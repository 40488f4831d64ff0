"""Which settings make another run, and that an experiment survives its record."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.experiment import Pretrain, dump, parse_experiment
from tessera.runs import identity_hash
from tests.experiment.conftest import PRETRAIN, SFT, changed, leaves

_LINEAR = {"name": "linear_decay", "warmup_steps": 2}
_FP8 = PRETRAIN | {"precision": "fp8"}
_FREE: list[tuple[dict[str, Any], str, Any]] = [
    (PRETRAIN, "name", "other"),
    (PRETRAIN, "description", "words"),
    (PRETRAIN, "batch.micro_batch", 1),
    (PRETRAIN, "batch.micro_batch", "auto"),
    (PRETRAIN, "data.cache_gib", 0.5),
    (PRETRAIN, "evaluation.every_steps", 1),
    (PRETRAIN, "checkpoint.every_steps", 1),
    (PRETRAIN, "checkpoint.keep", 9),
    (PRETRAIN, "checkpoint.local_every_steps", 2),
    (PRETRAIN, "checkpoint.local_keep", 3),
    (PRETRAIN, "preemption.grace_s", 110),
    (PRETRAIN, "log_every_steps", 1),
    (PRETRAIN, "compile", "on"),
    (PRETRAIN, "deterministic", True),
    (PRETRAIN, "recompute", True),
    (PRETRAIN, "parallel", "fsdp"),
    (PRETRAIN, "kernels", "fused"),
    (PRETRAIN | {"kernels": "fused"}, "attention", "cudnn"),
    (PRETRAIN, "price", {"usd_per_hour": 9.0, "usd_per_gb_up": 0.02, "note": "much"}),
    (PRETRAIN, "data.fingerprint", "abcd"),
    (PRETRAIN | {"schedule": _LINEAR}, "budget_usd", 315.0),
    (PRETRAIN | {"schedule": _LINEAR}, "budget_reserve_usd", 1.0),
    (SFT, "base", "base-1234abcd"),
    (SFT, "batch.micro_batch", 1),
    (SFT, "batch.micro_batch", "auto"),
    (SFT, "data.conversations", ["elsewhere/a.jsonl"]),
]  # fmt: skip

_LOSS_AFFECTING: list[tuple[dict[str, Any], str, Any]] = [
    (PRETRAIN, "seed", 2),
    (PRETRAIN, "tokens", 2560),
    (PRETRAIN, "precision", "bf16"),
    (PRETRAIN, "model.layers", 3),
    (PRETRAIN, "model.d_model", 128),
    (PRETRAIN, "model.heads", 8),
    (PRETRAIN, "model.context", 64),
    (PRETRAIN, "model.vocab_size", 513),
    (PRETRAIN, "model.mlp_ratio", 3),
    (PRETRAIN, "model.gelu", "exact"),
    (PRETRAIN, "model.norm_eps", 1e-5),
    (PRETRAIN, "model.init_std", 0.01),
    (PRETRAIN, "data.corpus", "other"),
    (PRETRAIN, "data.sequence", 16),
    (PRETRAIN, "optimizer.lr", 2e-3),
    (PRETRAIN, "optimizer.betas", [0.9, 0.99]),
    (PRETRAIN, "optimizer.eps", 1e-7),
    (PRETRAIN, "optimizer.weight_decay", 0.0),
    (PRETRAIN, "optimizer.clip_norm", 2.0),
    (PRETRAIN, "schedule", {"name": "linear_decay", "warmup_steps": 2, "final_lr": 1e-5}),
    (PRETRAIN, "schedule.warmup_steps", 3),
    (PRETRAIN, "schedule.final_lr", 1e-6),
    (PRETRAIN, "batch.tokens_per_step", 256),
    (PRETRAIN, "evaluation.tokens", 1024),
    (_FP8, "float8.gradients", "e4m3"),
    (_FP8, "float8.weights", "stochastic"),
    (_FP8, "float8.sums", "exact"),
    (_FP8, "float8.sums", "weights"),
    (_FP8, "float8.keep_first", 1),
    (_FP8, "float8.keep_last", 1),
    (PRETRAIN, "stability.window", 64),
    (PRETRAIN, "stability.sigma", 5.0),
    (PRETRAIN, "stability.max_skips", 0),
    (PRETRAIN, "stability.rollbacks", 2),
    (SFT, "epochs", 3),
    (SFT, "data.holdout", 0.2),
    (SFT, "batch.conversations_per_step", 16),
    (SFT, "schedule.decay_fraction", 0.5),
    (SFT, "lora.rank", 8),
    (SFT, "lora.alpha", 16.0),
    (SFT, "lora.targets", ["attn.qkv"]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "key", "value"), _FREE)
def test_a_free_setting_is_not_part_of_the_identity(
    data: dict[str, Any], key: str, value: Any
) -> None:
    before, after = parse_experiment(data), parse_experiment(changed(data, key, value))
    assert dump(before) != dump(after)
    assert before.identity == after.identity


@pytest.mark.parametrize(("data", "key", "value"), _LOSS_AFFECTING)
def test_a_loss_affecting_setting_changes_the_identity(
    data: dict[str, Any], key: str, value: Any
) -> None:
    before = parse_experiment(data).identity
    after = parse_experiment(changed(data, key, value)).identity
    differing = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    expected = {"schedule.name", "schedule.decay_fraction"} if key == "schedule" else {key}
    assert differing == expected


@pytest.mark.parametrize("data", [PRETRAIN, SFT], ids=["pretrain", "sft"])
def test_every_setting_is_in_one_of_the_two_tables(data: dict[str, Any]) -> None:
    tables = {key for _, key, _ in _FREE + _LOSS_AFFECTING}
    known = {"kind", "optimizer.name", "schedule.name", "price", "float8"}
    assert set(leaves(dump(parse_experiment(data)))) <= tables | known
    assert set(parse_experiment(data).identity) <= {k for _, k, _ in _LOSS_AFFECTING} | known


def test_what_came_later_names_no_run_that_does_as_runs_did_before() -> None:
    """Pinned: were it otherwise, a run that is under way would be begun anew."""
    plain = parse_experiment(_FP8)
    before = {
        "gradients": "e5m2",
        "weights": "nearest",
        "sums": "fast",
        "keep_first": 0,
        "keep_last": 0,
    }
    assert not [key for key in plain.identity if key.startswith("float8")]
    for section in (None, {}, before):
        assert parse_experiment(_FP8 | {"float8": section}).identity == plain.identity
    assert identity_hash(plain.identity, "0" * 64) == "d8d0beec"


@given(
    layers=st.integers(1, 64),
    heads=st.sampled_from([1, 2, 4, 8]),
    lr=st.floats(1e-9, 1.0),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    steps=st.integers(1, 10**6),
    micro=st.sampled_from([1, 2, 4, "auto"]),
    description=st.text(),
)
def test_an_experiment_survives_its_record(
    layers: int, heads: int, lr: float, betas: tuple[float, float], steps: int, micro: int | str,
    description: str,
) -> None:  # fmt: skip
    data = changed(changed(PRETRAIN, "model.layers", layers), "model.heads", heads)
    data = changed(changed(data, "optimizer.lr", lr), "optimizer.betas", list(betas))
    data = changed(changed(data, "tokens", 128 * steps), "batch.micro_batch", micro)
    experiment = parse_experiment(changed(data, "description", description))
    again = parse_experiment(dump(experiment))
    assert again == experiment
    assert again.identity == experiment.identity
    assert isinstance(again, Pretrain)
    assert again.steps == steps
