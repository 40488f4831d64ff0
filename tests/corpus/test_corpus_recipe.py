from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.corpus.recipe import expand_variables, load_recipe
from tessera.errors import InputError

Write = Callable[..., Path]
REPOSITORY = Path(__file__).parents[2]


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


def test_a_recipe_is_read_and_frozen(write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe())
    assert [source.name for source in recipe.sources] == ["en", "ja"]
    assert recipe.normalise.unicode == "NFC"
    assert recipe.dedup.exact
    for key in ("name", "sources"):
        with pytest.raises(ValueError, match="frozen"):
            setattr(recipe, key, "other")


RECIPES = sorted(path.name for path in (REPOSITORY / "data_manifests").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_the_repository_are_valid(name: str) -> None:
    assert load_recipe(REPOSITORY / "data_manifests" / name).sources


def test_there_is_a_recipe_for_every_corpus_that_an_experiment_names() -> None:
    files = (REPOSITORY / "experiments").glob("*.yaml")
    read = [yaml.safe_load(path.read_text("utf-8")) for path in files]
    named = {e["data"]["corpus"] for e in read if "corpus" in e.get("data", {})}
    known = {load_recipe(REPOSITORY / "data_manifests" / name).name for name in RECIPES}
    assert "web-books-academic" in named <= known


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"holdot": 1}, ["holdot", "not a known key"]),
        ({"name": "Two Words"}, ["name", "Two Words"]),
        ({"holdout": {"salt": "s"}}, ["holdout.fraction", "missing"]),
        ({"holdout": {"fraction": 1.5, "salt": "s"}}, ["holdout.fraction", "less than 1", "1.5"]),
        ({"sources": []}, ["sources"]),
        ({"tokenizer": {}}, ["tokenizer", "exactly one of `train` and `reuse`"]),
        ({"tokenizer": {"train": {"vocab_size": 65537}}}, ["vocab_size", "65536"]),
        ({"shards": {"tokens": "many"}}, ["shards.tokens", "many"]),
        ({"normalise": {"unicode": "NFD"}}, ["normalise.unicode", "NFD"]),
    ],
)
def test_a_wrong_key_is_named(write_recipe: Write, changes: Any, words: list[str]) -> None:
    sentence = refused(write_recipe(**changes))
    assert all(word in sentence for word in words), sentence


def test_a_source_must_fit_its_format(write_recipe: Write, make_source: Callable[..., Any]) -> None:
    assert "takes no `path`" in refused(
        write_recipe(sources=[make_source("x", format="docstrings")])
    )
    assert "needs a `path`" in refused(write_recipe(sources=[make_source("x", path=None)]))
    wrong = refused(write_recipe(sources=[make_source("x", format="csv", licence="")]))
    assert "sources.0.format" in wrong
    assert "1 more problem after this one" in wrong


def test_two_sources_of_one_name_are_refused(
    write_recipe: Write, make_source: Callable[..., Any]
) -> None:
    assert "two sources are named 'en'" in refused(
        write_recipe(sources=[make_source("en"), make_source("en")])
    )


@pytest.mark.parametrize("text", ["a: [", "just words", "", "- a list", "\ud800"])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(path)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.yaml")


def test_variables_are_expanded_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTS", "/data")
    assert expand_variables("${TEXTS}/a.parquet", where="it") == "/data/a.parquet"
    monkeypatch.delenv("TEXTS")
    with pytest.raises(InputError, match="environment variable TEXTS is not set"):
        expand_variables("${TEXTS}/a.parquet", where="it")
