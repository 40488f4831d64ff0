"""Build one corpus: recipe in, shards and a manifest in the root out.

The fingerprint, and so the folder, is known only when every shard is: shards are made in a local
temporary folder and then published, tokenizer first, manifest last. Killed at any moment, a build
leaves either a whole corpus or a folder without a manifest, which nothing reads and the next build
of the same inputs fills again.

What was built from which inputs is remembered in ``corpora/<name>/builds/<key>.json``; the key is a
digest of the recipe and of everything it reads. A second build of equal inputs reads its inputs
once, to digest them, and stops there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tessera.corpus.clean import SPLITS
from tessera.corpus.encode import EncodedSplit, encode_split
from tessera.corpus.manifest import FOLDER, Manifest, load_manifest
from tessera.corpus.progress import Meter, ProgressCallback
from tessera.corpus.recipe import Recipe, ReuseTokenizer, TrainTokenizer, load_recipe
from tessera.corpus.report import STEPS_VERSION, Provenance, assemble
from tessera.corpus.sources import Source, find_files
from tessera.corpus.spool import Spool
from tessera.corpus.tokenizer import Tokenizer
from tessera.errors import DamagedError, InputError, NotFoundError
from tessera.source import code_commit
from tessera.storage import Root, canonical_json, publish_local, sha256_bytes


@dataclass(frozen=True)
class BuildResult:
    """A corpus in the root. ``reused``: it was there already, from equal inputs."""

    manifest: Manifest
    manifest_path: str
    """Relative to the root."""
    reused: bool


def build(
    recipe_path: Path | str,
    root: Root,
    *,
    publish_dir: Path | None = None,
    progress: ProgressCallback | None = None,
) -> BuildResult:
    """Build the corpus of ``recipe_path`` in ``root``, or find it there.

    ``publish_dir`` also receives a copy of the manifest, ``<name>.manifest.json``. ``progress`` is
    called often, in this thread. Raises ``InputError`` for anything wrong with the recipe or the
    text, ``StoreError`` if the root fails.
    """
    recipe_path = Path(recipe_path)
    recipe = load_recipe(recipe_path)
    folder = recipe_path.absolute().parent
    sources = [Source(source, folder) for source in recipe.sources]
    reused = _reused_tokenizer(recipe.tokenizer.reuse, folder)
    meter = Meter(progress, "digest the inputs", sum(source.size for source in sources))
    digests = [source.digest(meter) for source in sources]
    key = build_key(recipe, digests, reused)

    manifest = _find(root, recipe.name, key)
    found = manifest is not None
    if manifest is None:
        with tempfile.TemporaryDirectory(prefix="tessera-corpus-") as staging:
            manifest = _make(recipe, sources, digests, reused, key, root, Path(staging), progress)
    if publish_dir is not None:
        copy = root.read_bytes(manifest.path)
        publish_local(publish_dir / f"{manifest.name}.manifest.json", copy)
    return BuildResult(manifest, manifest.path, found)


def build_key(recipe: Recipe, digests: Sequence[str], tokenizer: Tokenizer | None) -> str:
    """Digest of everything that a build depends on: recipe, inputs, reused tokenizer, our steps."""
    value = {
        "steps": STEPS_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "inputs": list(digests),
        "tokenizer": tokenizer.sha256 if tokenizer else None,
    }
    return sha256_bytes(canonical_json(value))


def _find(root: Root, name: str, key: str) -> Manifest | None:
    """The finished build of these inputs, if all of its objects are still there, whole."""
    try:
        record = root.read_json(_record_path(name, key))
        if not isinstance(record, dict) or not isinstance(record.get("manifest"), str):
            return None
        manifest = load_manifest(root, record["manifest"])
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        sizes = {shard.path: shard.bytes for shard in shards}
        sizes[manifest.tokenizer.path] = manifest.tokenizer.bytes
        whole = all(root.size(path) == size for path, size in sizes.items())
    except (InputError, NotFoundError, DamagedError):
        return None  # built again, it is replaced
    return manifest if whole else None


def _make(
    recipe: Recipe,
    sources: Sequence[Source],
    digests: Sequence[str],
    reused: Tokenizer | None,
    key: str,
    root: Root,
    staging: Path,
    progress: ProgressCallback | None,
) -> Manifest:
    spool = Spool(staging, len(sources))
    size = sum(source.size for source in sources)
    spool.fill(recipe, sources, Meter(progress, "read and clean", size))
    tokenizer = reused or _train(recipe.tokenizer.train, spool, progress)

    document_tokens = np.zeros(spool.kept, dtype=np.int64)
    splits: dict[str, EncodedSplit] = {}
    for split in SPLITS:
        if spool.documents[split]:
            splits[split] = encode_split(
                spool,
                split,
                tokenizer,
                folder=staging,
                limit=recipe.shards.tokens,
                document_tokens=document_tokens,
                consumed=Meter(progress, f"tokenise {split}", spool.text_bytes[split]),
            )
    manifest = assemble(
        recipe,
        sources,
        digests,
        spool,
        document_tokens,
        tokenizer,
        splits,
        Provenance(key, code_commit()),
    )
    _publish(root, manifest, tokenizer, splits, progress)
    return manifest


def _publish(
    root: Root,
    manifest: Manifest,
    tokenizer: Tokenizer,
    splits: Mapping[str, EncodedSplit],
    progress: ProgressCallback | None,
) -> None:
    """Everything the manifest names, then the manifest, then the record that finds it."""
    files = {
        entry.path: encoded.file
        for name, split in splits.items()
        for entry, encoded in zip(manifest.splits[name].shards, split.shards, strict=True)
    }
    meter = Meter(progress, "publish", sum(file.bytes for file in files.values()))
    root.publish(manifest.tokenizer.path, tokenizer.to_bytes())
    for path, file in files.items():
        root.put_file(file.path, path)
        meter(file.bytes)
    root.publish_json(manifest.path, manifest.model_dump(mode="json"))
    record = {"manifest": manifest.path, "fingerprint": manifest.fingerprint}
    root.publish_json(_record_path(manifest.name, manifest.build_key), record)


def _train(
    train: TrainTokenizer | None, spool: Spool, progress: ProgressCallback | None
) -> Tokenizer:
    assert train is not None, "a recipe has exactly one of train and reuse"
    counted = Meter(progress, "count words", spool.text_bytes["train"])

    def texts() -> Iterator[str]:
        yield from spool.sample("train", train.train_bytes, counted)
        # What follows is one call into the library, which cannot tell how far it is.
        Meter(progress, "learn the vocabulary", None)

    return Tokenizer.train(texts(), vocab_size=train.vocab_size)


def _reused_tokenizer(reuse: ReuseTokenizer | None, folder: Path) -> Tokenizer | None:
    if reuse is None:
        return None
    fs, files = find_files(reuse.path, folder, where="tokenizer.reuse.path")
    try:
        data: bytes = fs.cat_file(files[0])
    except OSError as error:
        raise InputError(f"The tokenizer {files[0]} cannot be read ({error}).") from error
    tokenizer = Tokenizer(data, origin=files[0])
    if reuse.sha256 not in (None, tokenizer.sha256):
        raise InputError(
            f"The tokenizer {files[0]} has sha256 {tokenizer.sha256}, tokenizer.reuse.sha256 says "
            f"{reuse.sha256}; give the file that was meant, or correct the digest."
        )
    return tokenizer


def _record_path(name: str, key: str) -> str:
    return f"{FOLDER}/{name}/builds/{key}.json"
