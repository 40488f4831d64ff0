from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import InputError
from tessera.experiment import Pretrain, Sft, dump, load_experiment, parse_experiment

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SHIPPED = sorted(path.name for path in EXPERIMENTS.glob("*.yaml") if path.name != "interview.yaml")

PRETRAIN: dict[str, Any] = {
    "name": "base", "kind": "pretrain", "seed": 1,
    "model": {"layers": 2, "d_model": 64, "heads": 4, "context": 32, "vocab_size": 512},
    "data": {"corpus": "sample"},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 2, "final_lr": 1e-5},
    "batch": {"tokens_per_step": 128, "micro_batch": 2}, "tokens": 1280,
    "evaluation": {"every_steps": 5}, "checkpoint": {"every_steps": 5},
}  # fmt: skip
SFT: dict[str, Any] = {
    "name": "voice", "kind": "sft", "seed": 1, "base": "base",
    "data": {"conversations": ["a.jsonl", "b.jsonl"]},
    "optimizer": {"lr": 1e-3}, "schedule": {"name": "linear_decay", "warmup_steps": 2},
    "batch": {"conversations_per_step": 8, "micro_batch": 4}, "epochs": 2,
    "checkpoint": {"every_steps": 5},
}  # fmt: skip


def changed(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of ``data`` with another value under a dotted key; ``...`` removes it."""
    fresh = copy.deepcopy(data)
    section = fresh
    *parents, last = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return fresh


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data) if not isinstance(data, str) else data)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(InputError) as error:
        load_experiment(path, overrides)
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert error.value.exit_code == 2
    return text


# -- the shipped files -----------------------------------------------------------------------------


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
        if match := re.match(r"\s*([a-z_]+):(?:\s|$)", line):
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


# -- refused with one sentence ---------------------------------------------------------------------

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


# -- extending and overriding ----------------------------------------------------------------------


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


# -- identity --------------------------------------------------------------------------------------

_FREE: list[tuple[dict[str, Any], str, Any]] = [
    (PRETRAIN, "name", "other"),
    (PRETRAIN, "description", "words"),
    (PRETRAIN, "batch.micro_batch", 1),
    (PRETRAIN, "evaluation.every_steps", 1),
    (PRETRAIN, "checkpoint.every_steps", 1),
    (PRETRAIN, "checkpoint.keep", 9),
    (PRETRAIN, "log_every_steps", 1),
    (PRETRAIN, "compile", "on"),
    (PRETRAIN, "price", {"usd_per_hour": 9.0, "note": "much"}),
    (PRETRAIN, "data.fingerprint", "abcd"),
    (SFT, "base", "base-1234abcd"),
    (SFT, "batch.micro_batch", 1),
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


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("data", [PRETRAIN, SFT], ids=["pretrain", "sft"])
def test_every_setting_is_in_one_of_the_two_tables(data: dict[str, Any]) -> None:
    tables = {key for _, key, _ in _FREE + _LOSS_AFFECTING}
    known = {"kind", "optimizer.name", "schedule.name", "price"}
    assert set(_leaves(dump(parse_experiment(data)))) <= tables | known
    assert set(parse_experiment(data).identity) <= {k for _, k, _ in _LOSS_AFFECTING} | known


@given(
    layers=st.integers(1, 64),
    heads=st.sampled_from([1, 2, 4, 8]),
    lr=st.floats(1e-9, 1.0),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    steps=st.integers(1, 10**6),
    micro=st.sampled_from([1, 2, 4]),
    description=st.text(),
)
def test_an_experiment_survives_its_record(
    layers: int, heads: int, lr: float, betas: tuple[float, float], steps: int, micro: int,
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
