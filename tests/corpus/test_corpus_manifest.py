from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.corpus.build import build
from tessera.corpus.manifest import (
    Manifest,
    find_builds,
    fingerprint,
    load_manifest,
    read_local_manifest,
    resolve,
)
from tessera.corpus.recipe import recipe_for
from tessera.corpus.report import unigram_entropy
from tessera.corpus.shards import open_shard, write_shard
from tessera.corpus.verify import verify, verify_manifest
from tessera.errors import InputError, NotFoundError
from tessera.storage import Root, sha256_bytes

Write = Callable[..., Path]
STEADY = settings(max_examples=60, derandomize=True, deadline=None)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


@pytest.fixture
def manifest(write_recipe: Write, root: Root) -> Manifest:
    return build(write_recipe(), root).manifest


@STEADY
@given(DIGESTS, st.lists(DIGESTS, min_size=2, max_size=4, unique=True), DIGESTS)
def test_the_fingerprint_is_of_digests_and_their_order(
    tokenizer: str, shards: list[str], held: str
) -> None:
    one = fingerprint(tokenizer, {"train": shards, "eval": [held]})
    assert len(one) == 64
    assert one == fingerprint(tokenizer, {"eval": (held,), "train": tuple(shards)})
    assert one != fingerprint(tokenizer, {"train": shards[::-1], "eval": [held]})
    assert one != fingerprint(tokenizer, {"train": [*shards, held]})
    assert one != fingerprint(held[::-1] + "x", {"train": shards, "eval": [held]})


def test_the_fingerprint_is_pinned() -> None:
    """Runs and checkpoints refer to it: it must never be computed otherwise."""
    assert fingerprint("a" * 64, {"train": ["b" * 64], "eval": ["c" * 64]}) == PINNED


PINNED = "d0b7b6a78417413698b4a61748926827152a8d6bf2f0334248f7e51a675daf0c"


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([5, 5, 5, 5])) == pytest.approx(np.log(4))
    assert unigram_entropy(np.array([7, 0])) == 0
    assert unigram_entropy(np.zeros(3, dtype=np.int64)) == 0


def test_builds_are_resolved_by_prefix(manifest: Manifest, write_recipe: Write, root: Root) -> None:
    assert resolve(root, "small") == manifest
    other = build(write_recipe(holdout={"fraction": 0.3, "salt": "s"}), root).manifest
    assert {b.fingerprint for b in find_builds(root, "small")} == {
        manifest.fingerprint,
        other.fingerprint,
    }
    assert resolve(root, "small", other.fingerprint[:10]) == other
    with pytest.raises(InputError, match=r"2 builds .* pin one as data\.fingerprint") as caught:
        resolve(root, "small")
    assert manifest.fingerprint[:12] in str(caught.value)
    assert other.fingerprint[:12] in str(caught.value)
    with pytest.raises(InputError, match="begins with zz; there is"):
        resolve(root, "small", "zz")


def test_nothing_built_says_what_to_run(root: Root) -> None:
    with pytest.raises(InputError, match=r"tessera corpus build RECIPE --root"):
        resolve(root, "other")
    assert find_builds(root, "other") == []


def test_the_recipe_of_a_corpus_is_found_by_its_name_not_its_file_s(
    tmp_path: Path, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data_manifests"
    folder.mkdir()
    (folder / "a_damaged.yaml").write_text("name: [")
    (folder / "novels_ja_en.yaml").write_text("name: novels-ja-en\n")
    assert recipe_for("novels-ja-en", folder) == (folder / "novels_ja_en.yaml").as_posix()
    assert recipe_for("novels", folder) == "RECIPE"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"build data_manifests/novels_ja_en\.yaml --root"):
        resolve(root, "novels-ja-en")


def test_a_changed_manifest_is_refused(manifest: Manifest, root: Root, tmp_path: Path) -> None:
    whole = json.loads(root.read_bytes(manifest.path))
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ("digests make", lambda m: m["tokenizer"].update(sha256="0" * 64)),
        ("digests make", lambda m: m["splits"].pop("eval")),
        ("add up to", lambda m: m["splits"]["train"].update(tokens=1)),
        ("not a known key", lambda m: m.update(extra=1)),
        ("is missing", lambda m: m.pop("holdout")),
    ]
    for words, change in changes:
        data = json.loads(json.dumps(whole))
        change(data)
        root.publish_json(manifest.path, data)
        with pytest.raises(InputError, match=words):
            load_manifest(root, manifest.path)
        assert words in verify(root, manifest.path)[0]
        local = tmp_path / "copy.json"
        local.write_text(json.dumps(data), "utf-8")
        with pytest.raises(InputError, match=words):
            read_local_manifest(local)
    with pytest.raises(NotFoundError):
        load_manifest(root, "corpora/none/manifest.json")
    assert "is not in" in verify(root, "corpora/none/manifest.json")[0]
    with pytest.raises(InputError, match="cannot be read"):
        read_local_manifest(tmp_path / "none.json")


def damage(root: Root, path: str, change: Callable[[bytes], bytes]) -> None:
    root.publish(path, change(root.read_bytes(path)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-2], "cut off or replaced"),
        (lambda data: data + b"\0", "cut off or replaced"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "has sha256"),
        (lambda data: b"", "has 0 bytes"),
    ],
)
def test_a_damaged_shard_is_named(
    manifest: Manifest, root: Root, change: Callable[[bytes], bytes], words: str
) -> None:
    path = manifest.splits["train"].shards[0].path
    damage(root, path, change)
    (problem,) = verify(root, manifest.path)
    assert problem.startswith(path)
    assert words in problem


def test_every_missing_object_is_named(manifest: Manifest, root: Root) -> None:
    shard = manifest.splits["eval"].shards[0].path
    root.delete(shard)
    root.delete(manifest.tokenizer.path)
    problems = verify(root, manifest.path)
    assert len(problems) == 2
    assert manifest.tokenizer.path in problems[0]
    assert shard in problems[1]


def test_a_damaged_tokenizer_is_named(manifest: Manifest, root: Root) -> None:
    damage(root, manifest.tokenizer.path, lambda data: data.replace(b"BPE", b"BPA"))
    (problem,) = verify(root, manifest.path)
    assert "tokenizer.json has sha256" in problem


def with_shard(manifest: Manifest, root: Root, local: Path, **changes: Any) -> Manifest:
    """The manifest with its eval shard replaced by ``local``, all digests made to fit."""
    data = local.read_bytes()
    raw = manifest.model_dump(mode="json")
    entry = raw["splits"]["eval"]["shards"][0]
    root.publish(entry["path"], data)
    entry.update(sha256=sha256_bytes(data), bytes=len(data), **changes)
    for key in ("tokens", "documents", "text_bytes"):
        raw["splits"]["eval"][key] = entry[key]
    digests = {n: [s["sha256"] for s in split["shards"]] for n, split in raw["splits"].items()}
    raw["fingerprint"] = fingerprint(raw["tokenizer"]["sha256"], digests)
    return Manifest.model_validate(raw)


def test_what_digests_cannot_see_is_measured(
    manifest: Manifest, root: Root, tmp_path: Path
) -> None:
    entry = manifest.splits["eval"].shards[0]
    shard = open_shard(Path(root.base) / entry.path)
    documents = [d[:-1].copy() for d in np.split(shard.tokens, shard.document_starts[1:])]
    path = tmp_path / "s.safetensors"

    def problems(documents: Any, tokenizer_sha256: str, **changes: Any) -> str:
        write_shard(
            path,
            documents,
            end_of_text_id=0,
            vocab_size=65_536,
            tokenizer_sha256=tokenizer_sha256,
        )
        return "\n".join(verify_manifest(root, with_shard(manifest, root, path, **changes)))

    sha = manifest.tokenizer.sha256
    assert problems(documents, sha) == ""
    assert "was encoded with tokenizer 0000" in problems(documents, "0" * 64)
    assert "the manifest says" in problems(documents, sha, tokens=entry.tokens + 1)
    assert "bytes of text" in problems(documents, sha, text_bytes=entry.text_bytes + 1)
    assert "the vocabulary ends at 299" in problems([np.array([300], dtype=np.uint16)], sha)
    documents[0][0] = 0
    assert "document_starts" in problems(documents, sha)


def test_a_wrong_entropy_is_named(manifest: Manifest, root: Root) -> None:
    raw = manifest.model_dump(mode="json")
    raw["splits"]["train"]["unigram_entropy_nats"] += 0.01
    (problem,) = verify_manifest(root, Manifest.model_validate(raw))
    assert "split train have a unigram entropy" in problem
