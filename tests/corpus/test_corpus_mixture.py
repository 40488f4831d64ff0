"""In which order several sources are read, and where each is cut off."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera.corpus.build import build
from tessera.corpus.mixture import in_order
from tessera.corpus.recipe import SourceRecipe, load_recipe
from tessera.corpus.shards import open_shard
from tessera.corpus.sources import Source
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import InputError
from tessera.storage import Root

Write = Callable[..., Path]
MakeSource = Callable[..., dict[str, Any]]
Texts = Callable[[int], list[str]]


def quiet(count: int) -> None:
    pass


def source_of(folder: Path, name: str, lengths: list[int], **more: Any) -> Source:
    """A source of one-letter documents, as long as asked."""
    lines = [f'{{"id": "{n}", "text": "{name * length}"}}\n' for n, length in enumerate(lengths)]
    (folder / f"{name}.jsonl").write_text("".join(lines))
    recipe = SourceRecipe(
        name=name, format="jsonl", path=f"{name}.jsonl", language="en", licence="CC0-1.0", **more
    )
    return Source(recipe, folder)


def test_one_after_the_other_unless_asked(tmp_path: Path) -> None:
    sources = [source_of(tmp_path, name, [3, 3]) for name in "ab"]
    read = [(n, document.text, size) for n, document, size in in_order(sources, False, quiet)]
    assert read == [(0, "aaa", 3), (0, "aaa", 3), (1, "bbb", 3), (1, "bbb", 3)]


def test_side_by_side_in_the_stated_proportion(tmp_path: Path) -> None:
    big = source_of(tmp_path, "a", [10] * 300, max_bytes=3000)
    small = source_of(tmp_path, "b", [7] * 100, max_bytes=700)
    read = list(in_order([big, small], True, quiet))
    assert len(read) == 400
    taken = {n: list(accumulate(size * (s == n) for s, _, size in read)) for n in (0, 1)}
    for of_big, of_small in zip(taken[0], taken[1], strict=True):
        assert abs(of_big / 3000 - of_small / 700) <= 7 / 700  # never a document more than its turn


def test_a_source_that_ends_early_leaves_the_rest_to_the_others(tmp_path: Path) -> None:
    short = source_of(tmp_path, "a", [10], max_bytes=1_000_000)
    long = source_of(tmp_path, "b", [10] * 5)
    assert [n for n, _, _ in in_order([short, long], True, quiet)] == [0, 1, 1, 1, 1, 1]


def test_a_source_is_cut_off_by_the_document_that_reaches_its_bytes(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a", [40, 40, 40, 40], max_bytes=100)
    consumed: list[int] = []
    assert [size for _, _, size in in_order([source], False, consumed.append)] == [40, 40, 40]
    assert sum(consumed) == source.size  # the progress bar ends full


@pytest.mark.parametrize("value", [0, -1, "much"])
def test_bytes_that_are_no_number_above_zero_are_refused(
    write_recipe: Write, make_source: MakeSource, value: Any
) -> None:
    path = write_recipe(sources=[make_source("en", max_bytes=value)])
    with pytest.raises(InputError, match=r"sources\.0\.max_bytes"):
        load_recipe(path)


def test_interleaved_every_shard_holds_the_mixture(
    write_recipe: Write, make_source: MakeSource, root: Root, english_texts: Texts
) -> None:
    english = sum(len(text.encode()) for text in english_texts(60))
    japanese = 60 * len("駅から坂を上りきったところに、豆腐屋が10軒ある。店主の朝は早い。".encode())
    sources = [make_source("en", max_bytes=english), make_source("ja", max_bytes=japanese)]
    more: dict[str, Any] = {"sources": sources, "shards": {"tokens": 1024}}
    manifest = build(write_recipe(interleave=True, **more), root).manifest
    tokenizer = Tokenizer.from_bytes(root.read_bytes(manifest.tokenizer.path))
    assert len(manifest.splits["train"].shards) > 2
    for entry in manifest.splits["train"].shards:
        shard = open_shard(Path(root.base) / entry.path)
        text = tokenizer.decode(np.asarray(shard.tokens).tolist())
        assert "ferry" in text
        assert "豆腐屋" in text
    again = build(write_recipe(interleave=True, description="other", **more), root)
    assert again.manifest.fingerprint == manifest.fingerprint
    apart = build(write_recipe(**more), root).manifest
    assert apart.fingerprint != manifest.fingerprint
