"""From what a build counted to the manifest that states it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tessera.corpus.clean import SPLITS
from tessera.corpus.encode import EncodedSplit
from tessera.corpus.manifest import (
    DedupEntry,
    HoldoutEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    StepEntry,
    TokenizerEntry,
    corpus_folder,
    fingerprint,
)
from tessera.corpus.recipe import Recipe
from tessera.corpus.sources import Source
from tessera.corpus.spool import Spool
from tessera.corpus.tokenizer import Tokenizer

STEPS_VERSION = 1
"""Part of every build key: raised when a step changes what it does to the same input."""


class Provenance(NamedTuple):
    """Where a build comes from: the digest of its inputs, and the code that ran."""

    build_key: str
    code_commit: str | None


def unigram_entropy(counts: npt.NDArray[np.int64]) -> float:
    """Entropy in nats of token frequencies, ``-sum(p ln p)``; ``counts`` has shape ``(vocab,)``."""
    seen = counts[counts > 0] / max(int(counts.sum()), 1)
    return max(float(-(seen * np.log(seen)).sum()), 0.0)


def assemble(
    recipe: Recipe,
    sources: Sequence[Source],
    digests: Sequence[str],
    spool: Spool,
    document_tokens: npt.NDArray[np.int64],
    tokenizer: Tokenizer,
    splits: Mapping[str, EncodedSplit],
    provenance: Provenance,
) -> Manifest:
    """The manifest of a build; ``document_tokens[n]`` are the tokens of kept document ``n``."""
    shard_digests = {n: [s.file.sha256 for s in split.shards] for n, split in splits.items()}
    identity = fingerprint(tokenizer.sha256, shard_digests)
    folder = corpus_folder(recipe.name, identity)
    steps = _steps(spool, document_tokens)
    return Manifest(
        name=recipe.name,
        description=recipe.description,
        fingerprint=identity,
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        code_commit=provenance.code_commit,
        build_key=provenance.build_key,
        versions={
            "python": platform.python_version(),
            "tessera_steps": str(STEPS_VERSION),
            "tokenizers": version("tokenizers"),
        },
        tokenizer=TokenizerEntry(
            path=f"{folder}/tokenizer.json",
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bytes=len(tokenizer.to_bytes()),
        ),
        splits={name: _split_entry(folder, split) for name, split in splits.items()},
        sources=tuple(map(_source_entry, sources, digests, steps)),
        normalise=recipe.normalise,
        dedup=DedupEntry(
            method="sha256 of the normalised text" if recipe.dedup.exact else "none",
            documents=sum(c.duplicate_documents for c in spool.counts),
            text_bytes=sum(c.duplicate_bytes for c in spool.counts),
        ),
        holdout=HoldoutEntry(
            fraction=recipe.holdout.fraction,
            salt=recipe.holdout.salt,
            documents=spool.documents["eval"],
            text_bytes=spool.text_bytes["eval"],
        ),
    )


def _split_entry(folder: str, split: EncodedSplit) -> SplitEntry:
    shards = tuple(
        ShardEntry(
            path=f"{folder}/shards/{shard.file.path.name}",
            tokens=shard.file.tokens,
            documents=shard.file.documents,
            bytes=shard.file.bytes,
            text_bytes=shard.text_bytes,
            sha256=shard.file.sha256,
        )
        for shard in split.shards
    )
    return SplitEntry(
        shards=shards,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        unigram_entropy_nats=round(unigram_entropy(split.counts), 6),
    )


def _source_entry(source: Source, digest: str, steps: tuple[StepEntry, ...]) -> SourceEntry:
    recipe = source.recipe
    return SourceEntry(
        name=recipe.name,
        format=recipe.format,
        licence=recipe.licence,
        url=recipe.url,
        language=recipe.language,
        synthetic=recipe.synthetic,
        note=recipe.note,
        files=len(source.files),
        digest=digest,
        steps=steps,
    )


class _Amount(NamedTuple):
    documents: int
    text_bytes: int
    tokens: int | None


def _step(
    name: Literal["normalise", "exact_dedup", "holdout"], before: _Amount, after: _Amount
) -> StepEntry:
    assert after.tokens is not None, "only the first step begins before tokenisation"
    return StepEntry(
        name=name,
        documents_in=before.documents,
        documents_out=after.documents,
        bytes_in=before.text_bytes,
        bytes_out=after.text_bytes,
        tokens_in=before.tokens,
        tokens_out=after.tokens,
    )


def _steps(spool: Spool, document_tokens: npt.NDArray[np.int64]) -> list[tuple[StepEntry, ...]]:
    """The steps of every source, in the order of the recipe."""
    sources = len(spool.counts)
    # Per source: documents, bytes, tokens of what was kept in each split.
    kept = {split: np.zeros((sources, 3), dtype=np.int64) for split in SPLITS}
    for split in SPLITS:
        for record in spool.records(split):
            row = (1, len(record.text), document_tokens[record.number])
            kept[split][record.source] += row
    duplicate_tokens = np.zeros(sources, dtype=np.int64)
    for source, original in zip(spool.duplicate_source, spool.duplicate_of, strict=True):
        duplicate_tokens[source] += document_tokens[original]

    kept_tokens = kept["train"][:, 2] + kept["eval"][:, 2]
    steps: list[tuple[StepEntry, ...]] = []
    for index, counts in enumerate(spool.counts):
        train = _Amount(*map(int, kept["train"][index]))
        unique = _Amount(*map(int, kept["train"][index] + kept["eval"][index]))
        tokens = int(kept_tokens[index] + duplicate_tokens[index])
        clean = _Amount(counts.clean_documents, counts.clean_bytes, tokens)
        # Text before normalisation is never tokenised, so nobody knows its tokens.
        read = _Amount(counts.read_documents, counts.read_bytes, None)
        steps.append(
            (
                _step("normalise", read, clean),
                _step("exact_dedup", clean, unique),
                _step("holdout", unique, train),
            )
        )
    return steps
