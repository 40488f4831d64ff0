"""Check a built corpus against its manifest, object by object.

Everything that the manifest states about the data is measured again: digests, sizes, counts, the
bytes of text (from the tokens alone), and the entropies. Each problem is one sentence naming the
object. One shard at a time is copied to a local temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tessera.corpus.manifest import Manifest, ShardEntry, SplitEntry, load_manifest
from tessera.corpus.report import unigram_entropy
from tessera.corpus.shards import Shard, open_shard
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import InputError, NotFoundError
from tessera.storage import Root, sha256_bytes, sha256_file

_REPAIR = "remove its manifest.json and build the corpus again"


def verify(root: Root, manifest_path: str) -> list[str]:
    """Problems of the corpus whose manifest is at ``manifest_path`` in ``root``; empty if sound.

    A missing or unreadable manifest is a problem like any other. ``StoreError`` is raised only if
    the store itself fails.
    """
    try:
        manifest = load_manifest(root, manifest_path)
    except (InputError, NotFoundError) as error:
        return [str(error)]
    return verify_manifest(root, manifest)


def verify_manifest(root: Root, manifest: Manifest) -> list[str]:
    """Problems of the objects in ``root`` that ``manifest`` (from anywhere) names."""
    try:
        tokenizer = _tokenizer(root, manifest)
    except (InputError, NotFoundError) as error:
        # Without the vocabulary the shards' tokens mean nothing, but their digests still do.
        return [str(error), *_shard_problems(root, manifest, None)]
    return list(_shard_problems(root, manifest, tokenizer))


def _tokenizer(root: Root, manifest: Manifest) -> Tokenizer:
    entry = manifest.tokenizer
    data = root.read_bytes(entry.path)
    if (found := sha256_bytes(data)) != entry.sha256:
        raise InputError(
            f"{entry.path} has sha256 {found[:12]}, the manifest says {entry.sha256[:12]}; it is "
            f"damaged: {_REPAIR}."
        )
    tokenizer = Tokenizer(data, origin=entry.path)
    if tokenizer.vocab_size != entry.vocab_size or len(data) != entry.bytes:
        raise InputError(
            f"{entry.path} has {tokenizer.vocab_size} entries in {len(data)} bytes, the manifest "
            f"says {entry.vocab_size} in {entry.bytes}; the manifest was changed: {_REPAIR}."
        )
    return tokenizer


def _shard_problems(root: Root, manifest: Manifest, tokenizer: Tokenizer | None) -> Iterator[str]:
    vocab_size = manifest.tokenizer.vocab_size
    for name, split in manifest.splits.items():
        counts: npt.NDArray[np.int64] | None = np.zeros(vocab_size, dtype=np.int64)
        for entry in split.shards:
            with tempfile.TemporaryDirectory(prefix="tessera-verify-") as folder:
                try:
                    shard = _fetch(root, entry, Path(folder) / "shard.safetensors")
                except (InputError, NotFoundError) as error:
                    counts = None
                    yield str(error)
                    continue
                found = np.bincount(shard.tokens, minlength=vocab_size).astype(np.int64)
                problems = list(_content_problems(shard, entry, manifest, tokenizer, found))
                counts = None if problems or counts is None else counts + found
                yield from problems
        if counts is not None:
            yield from _entropy_problems(name, split, counts)


def _fetch(root: Root, entry: ShardEntry, local: Path) -> Shard:
    root.get_file(entry.path, local)
    size = local.stat().st_size
    if size != entry.bytes:
        raise InputError(
            f"{entry.path} has {size} bytes, the manifest says {entry.bytes}; it was cut off or "
            f"replaced: {_REPAIR}."
        )
    if (found := sha256_file(local)) != entry.sha256:
        raise InputError(
            f"{entry.path} has sha256 {found[:12]}, the manifest says {entry.sha256[:12]}; it is "
            f"damaged: {_REPAIR}."
        )
    try:
        return open_shard(local)
    except InputError as error:
        raise InputError(str(error).replace(str(local), entry.path)) from error


def _content_problems(
    shard: Shard,
    entry: ShardEntry,
    manifest: Manifest,
    tokenizer: Tokenizer | None,
    counts: npt.NDArray[np.int64],
) -> Iterator[str]:
    """Problems of an undamaged file; ``counts`` of every id has shape ``(>= vocab,)``."""
    path = entry.path
    tokens, starts = shard.tokens, shard.document_starts
    if shard.tokenizer_sha256 != manifest.tokenizer.sha256:
        yield (
            f"{path} was encoded with tokenizer {shard.tokenizer_sha256[:12]}, the manifest names "
            f"{manifest.tokenizer.sha256[:12]}; {_REPAIR}."
        )
    if len(tokens) != entry.tokens or len(starts) != entry.documents:
        yield (
            f"{path} has {len(tokens)} tokens in {len(starts)} documents, the manifest says "
            f"{entry.tokens} in {entry.documents}; {_REPAIR}."
        )
    if len(counts) > manifest.tokenizer.vocab_size:
        yield (
            f"{path} has the token id {len(counts) - 1}, the vocabulary ends at "
            f"{manifest.tokenizer.vocab_size - 1}; {_REPAIR}."
        )
        return
    if tokenizer is None:
        return
    ends = np.flatnonzero(np.asarray(tokens) == tokenizer.end_of_text_id) + 1
    if not np.array_equal(np.append(0, ends), np.append(starts, len(tokens))):
        yield (
            f"The documents of {path} do not each begin where document_starts says and end with "
            f"end-of-text; {_REPAIR}."
        )
    text_bytes = int(counts @ tokenizer.byte_lengths())
    if text_bytes != entry.text_bytes:
        yield (
            f"The tokens of {path} stand for {text_bytes} bytes of text, the manifest says "
            f"{entry.text_bytes}; {_REPAIR}."
        )


def _entropy_problems(name: str, split: SplitEntry, counts: npt.NDArray[np.int64]) -> Iterator[str]:
    found = unigram_entropy(counts)
    if abs(found - split.unigram_entropy_nats) > 1e-5:
        yield (
            f"The tokens of split {name} have a unigram entropy of {found:.6f} nats, the manifest "
            f"says {split.unigram_entropy_nats:.6f}; the manifest was changed: {_REPAIR}."
        )
