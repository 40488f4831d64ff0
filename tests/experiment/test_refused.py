"""Whatever is wrong in an experiment is one sentence with its key and its file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.experiment.conftest import PRETRAIN, SFT, changed, refusal, write

_FP8 = PRETRAIN | {"precision": "fp8"}
_REFUSED: list[tuple[dict[str, Any], str, Any, str, str]] = [
    # experiment, key, value (... removes it), key that is named, what the sentence says
    (PRETRAIN, "learning_rate", 1, "learning_rate", "not a known key"),
    (PRETRAIN, "optimizer.learning_rate", 1, "optimizer.learning_rate", "not a known key"),
    (PRETRAIN, "cosine", 1, "cosine", "not a known key"),
    (PRETRAIN, "schedule.cosine", 1, "schedule.cosine", "not a known key"),
    (PRETRAIN, "schedule.decay_fraction", 0.2, "schedule.decay_fraction", "not a known key"),
    (PRETRAIN, "epochs", 2, "epochs", "not a known key"),
    (SFT, "model.layers", 2, "model", "not a known key"),
    (PRETRAIN, "seed", ..., "seed", "missing"),
    (PRETRAIN, "model.layers", ..., "model.layers", "missing"),
    (PRETRAIN, "schedule.warmup_steps", ..., "schedule.warmup_steps", "missing"),
    (PRETRAIN, "kind", ..., "kind", "missing"),
    (PRETRAIN, "schedule.name", ..., "schedule.name", "missing"),
    (SFT, "data.conversations", ..., "data.conversations", "missing"),
    (PRETRAIN, "model.layers", "many", "model.layers", "'many'"),
    (PRETRAIN, "model.layers", 0, "model.layers", "greater than 0"),
    (PRETRAIN, "model.vocab_size", 65_537, "model.vocab_size", "65536"),
    (PRETRAIN, "model", 3, "model", "a section of keys and values"),
    (PRETRAIN, "schedule", None, "schedule", "a section of keys and values"),
    (PRETRAIN, "optimizer.lr", float("nan"), "optimizer.lr", "finite"),
    (PRETRAIN, "optimizer.betas", [0.9], "optimizer.betas", "missing"),
    (PRETRAIN, "optimizer.betas", [0.9, 1.0], "optimizer.betas", "less than 1"),
    (PRETRAIN, "optimizer.name", "sgd", "optimizer.name", "'adamw'"),
    (PRETRAIN, "precision", "fp4", "precision", "'bf16'"),
    (PRETRAIN, "name", "Not A Name", "name", "'Not A Name'"),
    (SFT, "data.conversations", [], "data.conversations", "at least 1"),
    (SFT, "data.conversations", ["a", 1], "data.conversations", "valid string"),
    (SFT, "lora.targets", ["head"], "lora.targets", "'attn.qkv'"),
    (SFT, "base", "", "base", "at least 1"),
    (PRETRAIN, "kind", "dpo", "kind", "must be one of 'pretrain', 'sft'"),
    (PRETRAIN, "schedule.name", "step", "schedule.name", "one of 'cosine', 'linear_decay'"),
    (PRETRAIN, "model.heads", 5, "model.heads", "64 is not a multiple of heads 5"),
    (PRETRAIN, "data.sequence", 33, "data.sequence", "model.context 32"),
    (PRETRAIN, "batch.tokens_per_step", 100, "batch.tokens_per_step", "2 x sequence 32 = 64"),
    (PRETRAIN, "tokens", 1281, "tokens", "1,280"),
    (PRETRAIN, "tokens", 1, "tokens", "the nearest that is: 128"),
    (SFT, "batch.micro_batch", 3, "batch.conversations_per_step", "8 is not a multiple of"),
    (PRETRAIN, "batch.micro_batch", "most", "batch.micro_batch", "0, or auto, not 'most'"),
    (PRETRAIN, "batch.micro_batch", 0, "batch.micro_batch", "above 0, or auto, not 0"),
    (PRETRAIN, "batch.micro_batch", 1.5, "batch.micro_batch", "above 0, or auto, not 1.5"),
    (SFT, "batch.micro_batch", True, "batch.micro_batch", "true is no value"),
    (PRETRAIN, "seed", True, "seed", "true is no value"),
    (PRETRAIN, "data.cache_gib", 0, "data.cache_gib", "greater than 0"),
    (SFT, "data.cache_gib", 1, "data.cache_gib", "not a known key"),
    (PRETRAIN, "checkpoint.local_every_steps", 0, "checkpoint.local_every_steps", "than 0"),
    (PRETRAIN, "checkpoint.local_every_steps", False, "checkpoint.local_every_steps", "false is"),
    (PRETRAIN, "checkpoint.local_keep", 0, "checkpoint.local_keep", "greater than 0"),
    (SFT, "preemption.grace_s", -1, "preemption.grace_s", "greater than or equal to 0"),
    (SFT, "preemption.grace_s", float("inf"), "preemption.grace_s", "finite"),
    (PRETRAIN, "preemption.grace", 1, "preemption.grace", "not a known key"),
    (PRETRAIN, "stability.window", 3, "stability.window", "greater than or equal to 4"),
    (PRETRAIN, "stability.window", 5000, "stability.window", "less than or equal to 4096"),
    (PRETRAIN, "stability.sigma", 0, "stability.sigma", "greater than 0"),
    (SFT, "stability.max_skips", -1, "stability.max_skips", "greater than or equal to 0"),
    (SFT, "stability.rollbacks", -1, "stability.rollbacks", "greater than or equal to 0"),
    (PRETRAIN, "stability", True, "stability", "true is no value"),
    (PRETRAIN, "deterministic", "maybe", "deterministic", "'maybe'"),
    (PRETRAIN, "recompute", 2, "recompute", "not 2"),
    (PRETRAIN, "parallel", "tensor", "parallel", "'ddp' or 'fsdp'"),
    (PRETRAIN, "kernels", "fast", "kernels", "'fused' or 'torch'"),
    (PRETRAIN, "attention", "cudnn", "attention", "set kernels: fused too, or leave attention at"),
    (PRETRAIN, "float8", {"gradients": "e4m3"}, "float8", "set precision: fp8, or float8: null"),
    (_FP8, "float8.gradients", "e5m3", "float8.gradients", "'e5m2' or 'e4m3'"),
    (_FP8, "float8.weights", "random", "float8.weights", "'nearest' or 'stochastic'"),
    (_FP8, "float8.sums", "slow", "float8.sums", "'fast', 'weights' or 'exact'"),
    (_FP8, "float8.keep_first", -1, "float8.keep_first", "greater than or equal to 0"),
    (_FP8, "float8.keep_last", True, "float8.keep_last", "true is no value"),
    (_FP8, "float8", {"keep_first": 1, "keep_last": 1}, "float8", "no block of 2 is left"),
    (_FP8, "float8", "e4m3", "float8", "a section of keys and values"),
    (PRETRAIN, "parallel", False, "parallel", "false is no value"),
    (PRETRAIN, "tokens", ..., "tokens", "a cosine needs the tokens of the whole run"),
    (PRETRAIN, "budget_usd", 5, "budget_usd", "set schedule to {name: linear_decay"),
    (PRETRAIN, "budget_usd", 0, "budget_usd", "greater than 0"),
    (PRETRAIN, "budget_usd", -3, "budget_usd", "greater than 0"),
    (PRETRAIN, "budget_usd", float("nan"), "budget_usd", "finite"),
    (PRETRAIN, "budget_usd", float("inf"), "budget_usd", "finite"),
    (PRETRAIN, "budget_usd", "cheap", "budget_usd", "'cheap'"),
    (PRETRAIN, "budget_usd", True, "budget_usd", "true is no value"),
    (PRETRAIN, "budget_reserve_usd", 0, "budget_reserve_usd", "greater than 0"),
    (SFT, "budget_usd", 5, "budget_usd", "not a known key"),
    (PRETRAIN, "price", {"usd_per_hour": 1, "usd_per_gb_up": -1}, "price.usd_per_gb_up", "to 0"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "key", "value", "named", "says"), _REFUSED)
def test_what_is_wrong_in_a_file_is_named_with_the_file(
    tmp_path: Path, data: dict[str, Any], key: str, value: Any, named: str, says: str
) -> None:
    path = write(tmp_path / "wrong.yaml", changed(data, key, value))
    text = refusal(path)
    assert text.startswith(f"{path}: {named}"), text
    assert says in text


@pytest.mark.parametrize(("data", "key", "value", "named", "says"), _REFUSED)
def test_what_is_wrong_in_the_parent_is_named_with_the_parent(
    tmp_path: Path, data: dict[str, Any], key: str, value: Any, named: str, says: str
) -> None:
    parent = write(tmp_path / "shared" / "parent.yaml", changed(data, key, value))
    child: dict[str, Any] = {
        "extends": "shared/parent.yaml", "name": "child", "checkpoint": {"keep": 3},
    }  # fmt: skip
    if key == "name":
        del child["name"]
    path = write(tmp_path / "child.yaml", child)
    text = refusal(path)
    assert says in text
    # A missing key may be added anywhere: the file that holds its section is named, and for a
    # missing section the file that was asked for.
    expected = path if value is ... and "." not in key else parent
    assert re.match(rf"{re.escape(os.path.normpath(expected))}: {re.escape(named)}", text), text


@pytest.mark.parametrize(
    ("child", "named"),
    [
        ({"batch": {"micro_batch": 3}}, "batch.micro_batch"),
        ({"data": {"sequence": 20}}, "data.sequence"),
        ({"model": {"d_model": 63}}, "model.d_model"),
        ({"model": {"context": 16}}, "model.context"),
        ({"batch": {"tokens_per_step": 192}}, "batch.tokens_per_step"),
        ({"schedule": {"name": "linear_decay"}}, "schedule.warmup_steps"),
    ],
)
def test_keys_that_stop_fitting_are_blamed_on_the_file_that_changed_one(
    tmp_path: Path, child: dict[str, Any], named: str
) -> None:
    parent = changed(PRETRAIN, "data.sequence", 32) if "model" in child else PRETRAIN
    write(tmp_path / "parent.yaml", parent)
    path = write(tmp_path / "child.yaml", {"extends": "parent.yaml", **child})
    assert refusal(path).startswith(f"{path}: {named}")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("batch.micro_batch=3", "batch.micro_batch"),
        ("model.laiers=3", "model.laiers"),
        ("kind=dpo", "kind"),
        ("schedule.name=linear_decay", "schedule.warmup_steps"),
        ("model=", "model"),
        ("tokens=a lot", "tokens"),
        ("name.x=1", "name"),
        ("extends=other.yaml", "extends"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(
    tmp_path: Path, override: str, named: str
) -> None:
    path = write(tmp_path / "a.yaml", PRETRAIN)
    assert refusal(path, "seed=2", override).startswith(f"--set {override}: {named}")


@pytest.mark.parametrize("override", ["tokens", "=3", " =3", "tokens=[1", "tokens='"])
def test_an_override_that_is_none_is_refused(tmp_path: Path, override: str) -> None:
    path = write(tmp_path / "a.yaml", PRETRAIN)
    assert refusal(path, override).startswith("--set ")


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    data = changed(changed(PRETRAIN, "seed", "x"), "model.layers", "y")
    assert refusal(write(tmp_path / "a.yaml", data)).endswith("(1 more after this one).")


def test_bad_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "name: a\nseed: 1\nmodel: {layers: 2\ntokens: 3\n")
    assert refusal(path).startswith(f"{path} line 4: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "expected keys and values"),
        ("- a\n- b\n", "expected keys and values"),
        ("extends: [a.yaml]\n", "extends is not a path"),
        ("name: !!python/name:os.system\n", "line 1"),
        ("name: \x00\n", "correct the YAML"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = write(tmp_path / "a.yaml", content)
    assert str(path) in refusal(path)
    assert says in refusal(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'} does not exist")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    assert "UTF-8" in refusal(tmp_path / "binary.yaml")


def test_a_missing_parent_is_named_with_the_file_that_extends_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {"extends": "none.yaml"})
    text = refusal(path)
    assert text.startswith(f"{path}: extends names {tmp_path / 'none.yaml'}")
    assert "does not exist" in text


def test_a_circle_of_parents_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "sub/../a.yaml"})
    assert "extends itself through b.yaml" in refusal(tmp_path / "a.yaml")
    write(tmp_path / "self.yaml", {"extends": "self.yaml"})
    assert "extends itself" in refusal(tmp_path / "self.yaml")
