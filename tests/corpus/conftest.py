"""A small bilingual corpus on disk, a tokenizer trained on it, and recipes that use them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera.corpus.tokenizer import Tokenizer
from tessera.storage import Root

ENGLISH = "The ferry to island {0} leaves at {0} past seven, and returns when the cup is empty."
JAPANESE = "駅から坂を上りきったところに、豆腐屋が{0}軒ある。店主の朝は早い。"

Recipe = dict[str, Any]
WriteRecipe = Callable[..., Path]


def english(count: int) -> list[str]:
    return [ENGLISH.format(number) for number in range(count)]


def japanese(count: int) -> list[str]:
    return [JAPANESE.format(number) for number in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    rows = ({"id": f"{path.stem}-{n}", "text": text} for n, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(english(60) + japanese(60), vocab_size=330)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "root"), attempts=1)


@pytest.fixture
def write_recipe(tmp_path: Path) -> WriteRecipe:
    """Writes the two sources and a recipe over them; keyword arguments replace its keys."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    write_jsonl(folder / "en.jsonl", english(60))
    write_jsonl(folder / "ja.jsonl", japanese(60))

    def write(**changes: Any) -> Path:
        recipe: Recipe = {
            "name": "small",
            "sources": [source("en"), source("ja")],
            "holdout": {"fraction": 0.2, "salt": "s"},
            "tokenizer": {"train": {"vocab_size": 300}},
        }
        recipe.update(changes)
        path = folder / f"{recipe['name']}.yaml"
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
        return path

    return write


def source(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "format": "jsonl",
        "path": f"{name}.jsonl",
        "language": name[:2],
        "licence": "CC0-1.0",
        **changes,
    }


@pytest.fixture
def make_source() -> Callable[..., dict[str, Any]]:
    return source


@pytest.fixture
def make_jsonl() -> Callable[[Path, list[str]], Path]:
    return write_jsonl


@pytest.fixture
def english_texts() -> Callable[[int], list[str]]:
    return english
