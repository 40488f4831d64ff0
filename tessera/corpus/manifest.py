"""The manifest: what a corpus is made of, and the fingerprint that is its identity.

It lies at ``corpora/<name>/<fingerprint>/manifest.json`` in the root and is written last: a folder
without one is what an interrupted build left, and nothing reads it. All paths in it are relative to
the root, so a copy committed beside the recipe describes the corpus just as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tessera.corpus.recipe import NormaliseRecipe, SourceFormat, recipe_for, validation_sentence
from tessera.errors import InputError
from tessera.storage import Root, canonical_json, sha256_bytes

FOLDER = "corpora"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12  # digits of a fingerprint in a sentence

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerEntry(_Part):
    """The ``tokenizer.json`` in the root."""

    path: str
    sha256: Digest
    vocab_size: Count
    bytes: Count


class ShardEntry(_Part):
    """One shard in the root."""

    path: str
    tokens: Count
    documents: Count
    bytes: Count
    """Size of the file."""
    text_bytes: Count
    """UTF-8 bytes of the text in it."""
    sha256: Digest


class SplitEntry(_Part):
    """One split: its shards in order, their sums, and a floor to compare losses with."""

    shards: tuple[ShardEntry, ...]
    tokens: Count
    documents: Count
    text_bytes: Count
    unigram_entropy_nats: Annotated[float, Field(ge=0)]
    """Entropy of the token frequencies: the loss of the best model that ignores all context."""

    @model_validator(mode="after")
    def _sums(self) -> SplitEntry:
        for name in ("tokens", "documents", "text_bytes"):
            total = sum(getattr(shard, name) for shard in self.shards)
            if total != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, its shards add up to {total}")
        return self


class StepEntry(_Part):
    """What one step let through.

    Tokens are those of the final tokenizer, with one end-of-text a document; null before
    normalisation, because that text is never tokenised.
    """

    name: Literal["normalise", "exact_dedup", "holdout"]
    documents_in: Count
    documents_out: Count
    bytes_in: Count
    bytes_out: Count
    tokens_in: Count | None
    tokens_out: Count


class SourceEntry(_Part):
    """One source: where it is from, under which licence, and what became of it, step by step."""

    name: str
    format: SourceFormat
    licence: str
    url: str | None
    language: str
    synthetic: bool
    note: str | None
    files: Count
    digest: Digest
    """Digest of the input as read."""
    steps: tuple[StepEntry, ...]
    """In order; the last, ``holdout``, lets the training documents through."""

    def step(self, name: str) -> StepEntry:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)


class DedupEntry(_Part):
    """What exact deduplication removed, over all sources; zeros if the recipe turned it off."""

    method: Literal["sha256 of the normalised text", "none"]
    documents: Count
    text_bytes: Count


class HoldoutEntry(_Part):
    """How the evaluation split was chosen, and what it came to."""

    method: Literal["sha256 of salt and text"] = "sha256 of salt and text"
    fraction: float
    salt: str
    documents: Count
    text_bytes: Count


class Manifest(_Part):
    """One built corpus. ``fingerprint`` is checked against the digests whenever one is read."""

    format: Literal["tessera-manifest-1"] = "tessera-manifest-1"
    name: str
    description: str
    fingerprint: Digest
    built_at: str
    """UTC, ISO 8601."""
    code_commit: str | None
    """Commit of Tessera, ``-dirty`` appended if files were changed; null outside a checkout."""
    build_key: Digest
    """Digest of recipe and inputs; the same key is the same build."""
    versions: dict[str, str]
    """Of Python and the libraries that decide the bytes."""
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    sources: tuple[SourceEntry, ...]
    normalise: NormaliseRecipe
    dedup: DedupEntry
    decontamination: None = None
    """No step compares the corpus with public benchmarks yet."""
    holdout: HoldoutEntry

    @model_validator(mode="after")
    def _fingerprint_fits(self) -> Manifest:
        found = fingerprint(self.tokenizer.sha256, self.shard_digests())
        if found != self.fingerprint:
            raise ValueError(
                f"its fingerprint is {self.fingerprint[:_SHOWN]}, its digests make {found[:_SHOWN]}"
            )
        return self

    def shard_digests(self) -> dict[str, list[str]]:
        """Split -> digests of its shards, in order."""
        return {name: [s.sha256 for s in split.shards] for name, split in self.splits.items()}

    @property
    def folder(self) -> str:
        """The corpus's folder in the root."""
        return corpus_folder(self.name, self.fingerprint)

    @property
    def path(self) -> str:
        """The manifest's own path in the root."""
        return f"{self.folder}/manifest.json"


def fingerprint(tokenizer_sha256: str, splits: Mapping[str, Sequence[str]]) -> str:
    """The data fingerprint: 64 hex digits of the tokenizer's digest and the ordered shard digests.

    ``splits`` maps a split's name to the sha256 of its shards. Nothing else counts, so a corrected
    licence, another machine or another day gives the same fingerprint.
    """
    shards = {name: list(digests) for name, digests in splits.items()}
    return sha256_bytes(canonical_json({"tokenizer": tokenizer_sha256, "splits": shards}))


def corpus_folder(name: str, fingerprint: str) -> str:
    """Path in the root of one build."""
    return f"{FOLDER}/{name}/{fingerprint}"


def require_fit(
    manifest: Manifest, *, vocab_size: int, sequence: int, origin: Callable[[str], str]
) -> None:
    """Raise ``InputError`` where nothing of that vocabulary and sequence can train on the corpus.

    ``origin`` says where a setting of the experiment was written. Reads nothing: a plan asks it
    before money is spent, and training again.
    """
    if vocab_size != manifest.tokenizer.vocab_size:
        raise InputError(
            f"{origin('model.vocab_size')}: model.vocab_size is {vocab_size}, the tokenizer of "
            f"corpus {manifest.name} has {manifest.tokenizer.vocab_size} entries; make them equal."
        )
    if not _holds_a_sample(manifest, "train", sequence):
        raise InputError(
            f"No training shard holds {sequence + 1} tokens; shorten data.sequence or build a "
            "larger corpus."
        )
    if not _holds_a_sample(manifest, "eval", sequence):
        raise InputError(
            f"Corpus {manifest.name} cannot be evaluated on: the evaluation split has no "
            f"{sequence + 1} tokens in one shard; raise holdout.fraction in its recipe or shorten "
            "data.sequence."
        )


def _holds_a_sample(manifest: Manifest, split: str, sequence: int) -> bool:
    found = manifest.splits.get(split)
    return found is not None and any(shard.tokens > sequence for shard in found.shards)


def load_manifest(root: Root, path: str) -> Manifest:
    """Read and check one manifest of the root; ``InputError`` says what is wrong with it."""
    return _parse(root.read_json(path), f"The manifest {path} in {root.url}")


def read_local_manifest(path: Path) -> Manifest:
    """Read and check a manifest outside the root, such as a published copy."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"The manifest {path} cannot be read ({error}); check the path."
        ) from error
    return _parse(data, f"The manifest {path}")


def _parse(data: Any, subject: str) -> Manifest:
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise InputError(validation_sentence(subject, error)) from error


def find_builds(root: Root, name: str) -> list[Manifest]:
    """Every finished build of corpus ``name``, oldest first."""
    folders = [c for c in root.children(f"{FOLDER}/{name}") if _FINGERPRINT.fullmatch(c)]
    paths = [f"{corpus_folder(name, found)}/manifest.json" for found in folders]
    builds = [load_manifest(root, path) for path in paths if root.exists(path)]
    return sorted(builds, key=lambda manifest: (manifest.built_at, manifest.fingerprint))


def resolve(root: Root, name: str, fingerprint_prefix: str | None = None) -> Manifest:
    """The one build of ``name`` whose fingerprint begins with ``fingerprint_prefix``.

    Raises ``InputError``: nothing built (with the command to run), none that fits, or several (with
    their fingerprints).
    """
    builds = find_builds(root, name)
    if not builds:
        raise InputError(
            f"Corpus {name!r} is not built in {root.url}; build it with `tessera corpus build "
            f"{recipe_for(name)} --root {root.url}`."
        )
    fitting = [b for b in builds if b.fingerprint.startswith(fingerprint_prefix or "")]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{b.fingerprint[:_SHOWN]} ({b.built_at})" for b in fitting or builds)
    if not fitting:
        raise InputError(
            f"No build of corpus {name!r} in {root.url} has a fingerprint that begins with "
            f"{fingerprint_prefix}; there is {listed}: pin one of these as data.fingerprint."
        )
    raise InputError(
        f"Corpus {name!r} has {len(fitting)} builds in {root.url}: {listed}; pin one as "
        "data.fingerprint."
    )
