"""``extends``, ``--set`` and paths: what a file comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.experiment import Pretrain, Sft, load_experiment, parse_experiment
from tests.experiment.conftest import PRETRAIN, SFT, changed, refusal, write


def test_a_child_changes_what_it_names_and_keeps_the_rest(tmp_path: Path) -> None:
    write(tmp_path / "grand.yaml", PRETRAIN)
    write(tmp_path / "parent.yaml", {"extends": "grand.yaml", "model": {"layers": 3}, "seed": 5})
    path = write(tmp_path / "a.yaml", {"extends": "parent.yaml", "model": {"heads": 8}})
    expected = changed(changed(changed(PRETRAIN, "model.layers", 3), "model.heads", 8), "seed", 5)
    assert load_experiment(path) == parse_experiment(expected)


def test_a_section_of_another_name_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "parent.yaml", PRETRAIN)
    schedule = {"name": "linear_decay", "warmup_steps": 7}
    path = write(tmp_path / "a.yaml", {"extends": "parent.yaml", "schedule": schedule})
    assert load_experiment(path) == parse_experiment(changed(PRETRAIN, "schedule", schedule))
    same = {"name": "cosine", "warmup_steps": 7}
    path = write(tmp_path / "b.yaml", {"extends": "parent.yaml", "schedule": same})
    assert load_experiment(path).schedule.final_lr == 1e-5


def test_overrides_are_laid_on_last_and_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", PRETRAIN)
    experiment = load_experiment(
        path, ["model.layers=5", "model.layers=6", "optimizer={lr: 2e-4}", "compile=off"]
    )
    assert isinstance(experiment, Pretrain)
    assert experiment.model.layers == 6
    assert experiment.optimizer.lr == 2e-4
    assert experiment.compile == "off"


@pytest.mark.parametrize(("text", "value"), [("on", "on"), ("off", "off"), ("auto", "auto")])
def test_compile_is_written_as_its_comment_says(tmp_path: Path, text: str, value: str) -> None:
    content = yaml.safe_dump(PRETRAIN) + f"compile: {text}\n"
    assert load_experiment(write(tmp_path / "a.yaml", content)).compile == value


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("off", False), ("true", True)])
@pytest.mark.parametrize("key", ["deterministic", "recompute"])
def test_a_switch_is_written_as_yaml_writes_one(
    tmp_path: Path, key: str, text: str, value: bool
) -> None:
    content = yaml.safe_dump(PRETRAIN) + f"{key}: {text}\n"
    assert getattr(load_experiment(write(tmp_path / "a.yaml", content)), key) is value


@pytest.mark.parametrize("data", [PRETRAIN, SFT], ids=["pretrain", "sft"])
def test_a_micro_batch_is_a_number_or_left_to_the_machine(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.yaml", data)
    for text, value in [("auto", "auto"), ("1", 1)]:
        assert load_experiment(path, [f"batch.micro_batch={text}"]).batch.micro_batch == value
    # What no size can divide is refused although none was chosen.
    if data is PRETRAIN:
        wrong = changed(changed(data, "batch.micro_batch", "auto"), "batch.tokens_per_step", 100)
        text = refusal(write(tmp_path / "b.yaml", wrong))
        assert "100 is not a multiple of sequence 32; " in text


def test_checkpoints_on_the_own_disk_may_be_rarer_than_those_in_the_root(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", PRETRAIN)
    assert load_experiment(path).checkpoint.local_every_steps is None
    rare = load_experiment(path, ["checkpoint.local_every_steps=50"])
    assert rare.checkpoint.every_steps == 5
    assert rare.checkpoint.local_every_steps == 50


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path / "a.yaml", PRETRAIN), ["optimizer.lr=3e-4"])
    assert experiment.optimizer.lr == 3e-4  # to YAML, 3e-4 is a string
    assert refusal(tmp_path / "a.yaml", "tokens=1280.5").startswith("--set tokens=1280.5: tokens")


def test_paths_resolve_against_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "shared" / "parent.yaml", changed(SFT, "data.holdout", 0.2))
    inherits = write(tmp_path / "one" / "a.yaml", {"extends": "../shared/parent.yaml"})
    own = {"extends": "../shared/parent.yaml", "data": {"conversations": ["c.jsonl", "/d.jsonl"]}}
    names = write(tmp_path / "two" / "b.yaml", own)

    def paths(path: Path, *overrides: str) -> tuple[str, ...]:
        experiment = load_experiment(path, overrides)
        assert isinstance(experiment, Sft)
        assert experiment.data.holdout == 0.2
        return experiment.data.conversations

    shared = str(tmp_path / "shared")
    assert paths(inherits) == (f"{shared}/a.jsonl", f"{shared}/b.jsonl")
    assert paths(names) == (str(tmp_path / "two" / "c.jsonl"), "/d.jsonl")
    assert paths(names, "data.conversations=[e.jsonl]") == ("e.jsonl",)
    monkeypatch.chdir(tmp_path / "one")
    assert paths(Path("a.yaml")) == ("../shared/a.jsonl", "../shared/b.jsonl")
