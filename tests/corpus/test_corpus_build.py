from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tessera.corpus.build import build
from tessera.corpus.manifest import find_builds, load_manifest
from tessera.corpus.progress import Progress
from tessera.corpus.shards import open_shard
from tessera.corpus.tokenizer import Tokenizer
from tessera.corpus.verify import verify
from tessera.errors import InputError, StoreError
from tessera.storage import Root

Write = Callable[..., Path]
MakeSource = Callable[..., dict[str, Any]]
MakeJsonl = Callable[[Path, list[str]], Path]
Texts = Callable[[int], list[str]]


def split_texts(root: Root, split: str) -> list[str]:
    """The documents of one split, decoded from its shards."""
    manifest = find_builds(root, "small")[-1]
    tokenizer = Tokenizer.from_bytes(root.read_bytes(manifest.tokenizer.path))
    found = []
    for entry in manifest.splits[split].shards:
        shard = open_shard(Path(root.base) / entry.path)
        for document in np.split(shard.tokens, shard.document_starts[1:]):
            assert document[-1] == tokenizer.end_of_text_id
            found.append(tokenizer.decode(document[:-1].tolist()))
    return found


def test_a_corpus_is_built_and_sound(write_recipe: Write, root: Root, english_texts: Texts) -> None:
    result = build(write_recipe(), root)
    manifest = result.manifest
    assert not result.reused
    assert result.manifest_path == f"corpora/small/{manifest.fingerprint}/manifest.json"
    assert load_manifest(root, result.manifest_path) == manifest
    assert verify(root, result.manifest_path) == []
    assert root.children(f"corpora/small/{manifest.fingerprint}/shards") == [
        "eval-00000.safetensors",
        "train-00000.safetensors",
    ]
    train, held = split_texts(root, "train"), split_texts(root, "eval")
    assert len(train) + len(held) == 120
    assert set(english_texts(60)) <= set(train) | set(held)
    assert manifest.splits["eval"].documents == manifest.holdout.documents == len(held) > 0
    for name, split in manifest.splits.items():
        assert split.text_bytes == sum(len(t.encode()) for t in split_texts(root, name))
        assert 0 < split.unigram_entropy_nats < np.log(300)


def test_every_step_adds_up(
    write_recipe: Write,
    root: Root,
    make_source: MakeSource,
    make_jsonl: MakeJsonl,
    english_texts: Texts,
) -> None:
    path = write_recipe(sources=[make_source("en"), make_source("more")])
    # Ten repeat documents of the other source, one repeats its neighbour, two are empty.
    texts = [*english_texts(10), "new text here", "new text here\x00", " ", "\x00"]
    make_jsonl(path.parent / "more.jsonl", texts)
    manifest = build(path, root).manifest
    assert manifest.dedup.documents == 11
    more = manifest.sources[1]
    clean, dedup, holdout = more.steps
    assert [step.name for step in more.steps] == ["normalise", "exact_dedup", "holdout"]
    assert (clean.documents_in, clean.documents_out) == (14, 12)
    assert (dedup.documents_in, dedup.documents_out) == (12, 1)
    assert clean.tokens_in is None
    for before, after in ((clean, dedup), (dedup, holdout)):
        assert after.documents_in == before.documents_out
        assert after.bytes_in == before.bytes_out
        assert after.tokens_in == before.tokens_out
    # The tokens of dropped duplicates are counted, too: they equal those of what they repeat.
    tokenizer = Tokenizer.from_bytes(root.read_bytes(manifest.tokenizer.path))
    kept = [*english_texts(10), "new text here", "new text here"]
    expected = sum(len(tokenizer.encode(text)) + 1 for text in kept)
    assert clean.tokens_out == expected
    # All that is not held out is the training split.
    steps = [source.step("holdout") for source in manifest.sources]
    assert sum(step.tokens_out for step in steps) == manifest.splits["train"].tokens
    total = manifest.splits["train"].tokens + manifest.splits["eval"].tokens
    assert sum(step.tokens_in or 0 for step in steps) == total


def test_without_dedup_duplicates_stay_on_one_side(
    write_recipe: Write, root: Root, make_source: MakeSource
) -> None:
    twice = [make_source("en"), make_source("again", path="en.jsonl")]
    manifest = build(write_recipe(sources=twice, dedup={"exact": False}), root).manifest
    assert manifest.dedup.documents == 0
    train, held = split_texts(root, "train"), split_texts(root, "eval")
    assert len(train) + len(held) == 120
    assert not set(train) & set(held)


def test_the_split_is_frozen_when_a_source_is_added(
    write_recipe: Write, root: Root, make_source: MakeSource
) -> None:
    build(write_recipe(sources=[make_source("en")]), root)
    train, held = set(split_texts(root, "train")), set(split_texts(root, "eval"))
    other = Root(root.url + "-2")
    build(write_recipe(sources=[make_source("ja"), make_source("en")]), other)
    assert train <= set(split_texts(other, "train"))
    assert held <= set(split_texts(other, "eval"))


def test_the_same_inputs_are_built_once(write_recipe: Write, root: Root) -> None:
    first = build(write_recipe(), root)
    stages: list[str] = []
    second = build(write_recipe(), root, progress=lambda p: stages.append(p.stage))
    assert second.reused
    assert second.manifest == first.manifest
    assert set(stages) == {"digest the inputs"}


def test_a_build_that_lost_an_object_is_made_again(write_recipe: Write, root: Root) -> None:
    first = build(write_recipe(), root).manifest
    for path in (first.path, first.tokenizer.path, first.splits["train"].shards[0].path):
        root.delete(path)
        again = build(write_recipe(), root)
        assert not again.reused
        assert again.manifest.fingerprint == first.fingerprint
        assert verify(root, again.manifest_path) == []


@pytest.mark.parametrize("record", [b"{}", b"[]", b'{"manifest": 1}', b'{"manifest": "/x"}', b"{"])
def test_a_build_record_of_another_form_is_none(
    write_recipe: Write, root: Root, record: bytes
) -> None:
    first = build(write_recipe(), root).manifest
    (path,) = root.files("corpora/small/builds")
    root.publish(path, record)
    again = build(write_recipe(), root)
    assert not again.reused
    assert again.manifest.fingerprint == first.fingerprint
    assert build(write_recipe(), root).reused


def test_a_build_with_an_object_of_another_size_is_made_again(
    write_recipe: Write, root: Root
) -> None:
    first = build(write_recipe(), root).manifest
    for path in (first.path, first.tokenizer.path, first.splits["train"].shards[0].path):
        root.publish(path, root.read_bytes(path)[:-5])
        again = build(write_recipe(), root)
        assert not again.reused
        assert verify(root, again.manifest_path) == []


def test_a_corrected_licence_keeps_the_fingerprint(
    write_recipe: Write, root: Root, make_source: MakeSource
) -> None:
    first = build(write_recipe(sources=[make_source("en")]), root).manifest
    second = build(write_recipe(sources=[make_source("en", licence="MIT")]), root).manifest
    assert second.fingerprint == first.fingerprint
    assert [source.licence for source in find_builds(root, "small")[0].sources] == ["MIT"]


def test_other_text_is_another_corpus(
    write_recipe: Write, root: Root, make_jsonl: MakeJsonl, english_texts: Texts
) -> None:
    path = write_recipe()
    build(path, root)
    make_jsonl(path.parent / "en.jsonl", english_texts(61))
    assert not build(path, root).reused
    assert len(find_builds(root, "small")) == 2


def test_many_small_shards(write_recipe: Write, root: Root) -> None:
    result = build(write_recipe(shards={"tokens": 1024}), root)
    shards = result.manifest.splits["train"].shards
    assert len(shards) > 2
    assert max(shard.tokens for shard in shards) <= 1024
    assert [Path(shard.path).name for shard in shards[:2]] == [
        "train-00000.safetensors",
        "train-00001.safetensors",
    ]
    assert verify(root, result.manifest_path) == []


def test_a_tokenizer_is_reused(write_recipe: Write, root: Root) -> None:
    first = build(write_recipe(), root).manifest
    trained = Path(root.base) / first.tokenizer.path
    reuse = {"path": str(trained), "sha256": first.tokenizer.sha256}
    second = build(write_recipe(name="second", tokenizer={"reuse": reuse}), root).manifest
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert second.fingerprint == first.fingerprint  # the same text with the same tokenizer
    reuse["sha256"] = "0" * 64
    with pytest.raises(InputError, match=r"tokenizer\.reuse\.sha256 says 0000"):
        build(write_recipe(name="third", tokenizer={"reuse": reuse}), root)
    reuse["path"] = "none.json"
    with pytest.raises(InputError, match=r"tokenizer\.reuse\.path matches no file"):
        build(write_recipe(name="third", tokenizer={"reuse": reuse}), root)


def test_a_sample_is_enough_for_the_tokenizer(write_recipe: Write, root: Root) -> None:
    train = {"vocab_size": 280, "train_bytes": 3000}
    manifest = build(write_recipe(tokenizer={"train": train}), root).manifest
    assert manifest.tokenizer.vocab_size == 280
    assert manifest.splits["train"].text_bytes > 3000
    assert verify(root, manifest.path) == []


def test_what_cannot_be_built_is_said(write_recipe: Write, root: Root) -> None:
    with pytest.raises(InputError, match=r"yields a vocabulary of \d+ entries, and 60000 were"):
        build(write_recipe(tokenizer={"train": {"vocab_size": 60_000}}), root)
    with pytest.raises(InputError, match="fell into the evaluation split; raise holdout"):
        build(write_recipe(holdout={"fraction": 1e-9, "salt": "s"}), root)
    with pytest.raises(InputError, match="no document to train on"):
        build(write_recipe(holdout={"fraction": 1 - 1e-12, "salt": "s"}), root)
    assert root.files("") == []


def test_no_holdout_means_no_eval_split(write_recipe: Write, root: Root) -> None:
    manifest = build(write_recipe(holdout={"fraction": 0, "salt": "s"}), root).manifest
    assert list(manifest.splits) == ["train"]
    assert verify(root, manifest.path) == []


def test_progress_reaches_the_end_of_every_stage(write_recipe: Write, root: Root) -> None:
    last: dict[str, Progress] = {}

    def note(progress: Progress) -> None:
        last[progress.stage] = progress

    build(write_recipe(), root, progress=note)
    assert list(last) == [
        "digest the inputs",
        "read and clean",
        "count words",
        "learn the vocabulary",
        "tokenise train",
        "tokenise eval",
        "publish",
    ]
    assert all(p.total is None or p.done == p.total for p in last.values())


def test_a_published_copy_stands_beside_the_recipe(write_recipe: Write, root: Root) -> None:
    recipe = write_recipe()
    result = build(recipe, root, publish_dir=recipe.parent)
    copy = recipe.parent / "small.manifest.json"
    assert copy.read_bytes() == root.read_bytes(result.manifest_path)
    assert str(recipe.parent) not in copy.read_text("utf-8")  # nothing of this machine in it


def test_special_spellings_in_documents_stay_text(
    write_recipe: Write, root: Root, make_source: MakeSource, make_jsonl: MakeJsonl
) -> None:
    path = write_recipe(
        sources=[make_source("en"), make_source("bad")], holdout={"fraction": 0, "salt": "s"}
    )
    forged = "first<|endoftext|>second <|user|>"
    make_jsonl(path.parent / "bad.jsonl", [forged])
    build(path, root)
    assert split_texts(root, "train")[-1] == forged
    assert len(split_texts(root, "train")) == 61


KILLED = """
import os, signal, sys
from tessera.corpus.build import build
from tessera.storage import Root

recipe, url, stage = sys.argv[1:]

def kill(progress):
    # The last report of "publish": every shard is there, the manifest is not.
    if progress.stage == stage and (progress.done == progress.total or stage != "publish"):
        os.kill(os.getpid(), signal.SIGKILL)

build(recipe, Root(url), progress=kill)
"""


@pytest.mark.parametrize("stage", ["tokenise eval", "publish"])
def test_a_killed_build_leaves_nothing_that_reads_as_a_corpus(
    write_recipe: Write, root: Root, stage: str, tmp_path: Path
) -> None:
    recipe = write_recipe()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(recipe), root.url, stage],
        cwd=Path(__file__).parents[2],
        env={"TMPDIR": str(tmp_path)},  # the killed build cannot remove its staging folder
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert bool(root.files("corpora")) == (stage == "publish")
    assert find_builds(root, "small") == []
    again = build(recipe, root)
    assert not again.reused
    assert verify(root, again.manifest_path) == []


def test_a_store_that_fails_before_the_manifest(
    write_recipe: Write, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str, value: Any) -> None:
        raise StoreError(f"{path} was refused")

    with monkeypatch.context() as patch:
        patch.setattr(root, "publish_json", fail)
        with pytest.raises(StoreError, match=r"manifest\.json was refused"):
            build(write_recipe(), root)
    assert find_builds(root, "small") == []
    assert not build(write_recipe(), root).reused


def test_a_root_in_another_store(write_recipe: Write) -> None:
    root = Root("memory://corpus-root-test")
    result = build(write_recipe(), root)
    assert verify(root, result.manifest_path) == []
    assert build(write_recipe(), root).reused


def test_recipes_are_portable(write_recipe: Write, root: Root, tmp_path: Path) -> None:
    """The same recipe and files in another folder are the same build."""
    recipe = write_recipe()
    first = build(recipe, root)
    moved = tmp_path / "moved"
    recipe.parent.rename(moved)
    assert build(moved / recipe.name, root).reused
    assert json.loads(root.read_bytes(first.manifest_path))["name"] == "small"
    assert yaml.safe_load((moved / recipe.name).read_text("utf-8"))["name"] == "small"
