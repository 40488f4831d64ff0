"""The files in ``experiments/``: each loads, shows every setting, and says what each is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.experiment import Pretrain, Sft, dump, load_experiment, parse_experiment
from tests.experiment.conftest import leaves

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHIPPED = sorted(path.name for path in EXPERIMENTS.glob("*.yaml") if path.name != "interview.yaml")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_experiment_loads_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment(EXPERIMENTS / name)
    if isinstance(experiment, Sft):
        assert all(Path(file).is_file() for file in experiment.data.conversations)
    assert parse_experiment(dump(experiment)) == experiment


def test_names_of_shipped_experiments_differ() -> None:
    names = [load_experiment(EXPERIMENTS / name).name for name in SHIPPED]
    assert len(SHIPPED) >= 5
    assert len(set(names)) == len(names)


def _keys_and_comments(text: str) -> Iterator[tuple[str, str]]:
    """Every key of a YAML file of ours with the comment on its line."""
    for line in text.splitlines():
        if match := re.match(r"\s*([a-z0-9_]+):(?:\s|$)", line):
            comment = re.search(r"\s#\s*(\S.*)$", line)
            yield match[1], comment[1] if comment else ""


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_experiment_is_explained(name: str) -> None:
    text = (EXPERIMENTS / name).read_text()
    keys = list(_keys_and_comments(text))

    def count(value: Any) -> int:
        return sum(1 + count(v) for v in value.values()) if isinstance(value, dict) else 0

    assert len(keys) == count(yaml.safe_load(text)), "the test reads one key a line"
    assert [key for key, comment in keys if len(comment) < 5] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_that_builds_on_no_other_shows_every_setting(name: str) -> None:
    data = yaml.safe_load((EXPERIMENTS / name).read_text())
    if "extends" in data:
        assert len(data) > 1, "what differs is all that stands there"
        return
    assert set(leaves(data)) == set(leaves(dump(load_experiment(EXPERIMENTS / name))))


def test_the_reference_saves_to_the_root_about_every_half_hour() -> None:
    experiment = load_experiment(EXPERIMENTS / "tessera_1b.yaml")
    assert isinstance(experiment, Pretrain)
    tokens = experiment.checkpoint.every_steps * experiment.batch.tokens_per_step
    assert 25 < tokens / 70_000 / 60 < 35
    assert experiment.checkpoint.local_every_steps == 500
    assert experiment.batch.micro_batch == 4


def test_the_reference_marks_what_was_never_published() -> None:
    comments = dict(_keys_and_comments((EXPERIMENTS / "tessera_1b.yaml").read_text()))
    for key in ("gelu", "init_std", "betas", "eps", "clip_norm"):
        assert "our assumption" in comments[key], key
    for key in ("layers", "d_model", "heads", "context", "vocab_size", "lr", "tokens_per_step"):
        assert "assumption" not in comments[key], key


def test_the_reference_is_what_was_published() -> None:
    experiment = load_experiment(EXPERIMENTS / "tessera_1b.yaml")
    assert isinstance(experiment, Pretrain)
    model = experiment.model
    assert (model.layers, model.d_model, model.heads) == (32, 1536, 16)
    assert (model.context, model.vocab_size, experiment.sequence) == (4096, 65536, 4096)
    assert experiment.optimizer.lr == 2e-4
    assert experiment.schedule.final_lr == 1e-5
    assert experiment.schedule.warmup_steps == 200
    assert (experiment.batch.tokens_per_step, experiment.tokens) == (65536, 24_504_827_904)
    assert experiment.steps == 373_914
