"""From a manifest to training samples: shards opened once, samples cut where the order says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.corpus.manifest import Manifest, ShardEntry
from tessera.corpus.shards import Shard, open_shard
from tessera.errors import DamagedError, InputError, NotFoundError
from tessera.storage import Root, cache_folder, sha256_file
from tessera.training.order import SampleOrder

OPEN_SHARDS = 8


class ShardStore:
    """Shards of one corpus on this machine: read in place from a folder, else from a cache.

    Each shard's digest is checked when it is opened, so training never runs on damaged data.
    """

    def __init__(self, root: Root, manifest: Manifest) -> None:
        self._root, self._manifest = root, manifest
        self.open = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def split(self, name: str) -> tuple[ShardEntry, ...]:
        """The shards of a split, in the manifest's order."""
        if name not in self._manifest.splits:
            raise InputError(
                f"Corpus {self._manifest.name} has no split {name!r}; it has "
                f"{', '.join(self._manifest.splits)}."
            )
        return self._manifest.splits[name].shards

    def check_sizes(self, entries: Sequence[ShardEntry]) -> None:
        """Raise ``DamagedError`` for the first shard that is missing or cut off.

        Cheap on every store, and before anything is paid for; digests are checked on opening.
        """
        for entry in entries:
            try:
                size = self._root.size(entry.path)
            except NotFoundError:
                size = None
            if size != entry.bytes:
                raise self._damaged(entry)

    def _damaged(self, entry: ShardEntry) -> DamagedError:
        return DamagedError(
            f"The shard {entry.path} in {self._root.url} is missing or differs from the "
            f"manifest; see `tessera corpus verify {self._manifest.path}`, then build or copy it "
            "again."
        )

    def _open(self, entry: ShardEntry) -> Shard:
        path = self._root.local_path(entry.path)
        if path is None:
            path = cache_folder() / "shards" / f"{entry.sha256}.safetensors"
            if not _intact(path, entry):
                self._root.get_file(entry.path, path, sha256=entry.sha256)
        elif not _intact(path, entry):
            raise self._damaged(entry)
        return open_shard(path)


def _intact(path: Path, entry: ShardEntry) -> bool:
    return path.exists() and sha256_file(path) == entry.sha256


class SampleLoader:
    """Samples of the training split by global number."""

    def __init__(self, store: ShardStore, sequence: int, seed: int, fingerprint: str) -> None:
        self._store, self._entries = store, store.split("train")
        store.check_sizes(self._entries)
        self._sequence = sequence
        counts = [max(0, entry.tokens - 1) // sequence for entry in self._entries]
        if not sum(counts):
            raise InputError(
                f"No training shard holds {sequence + 1} tokens; shorten data.sequence or build a "
                "larger corpus."
            )
        self.order = SampleOrder(counts, seed, fingerprint)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples ``first`` ... ``first + count - 1``: inputs, targets, (count, T) int64."""
        rows = np.stack([self._sample(number) for number in range(first, first + count)])
        window = torch.from_numpy(rows.astype(np.int64))
        return window[:, :-1], window[:, 1:]

    def _sample(self, number: int) -> npt.NDArray[np.uint16]:
        place = self.order[number]
        start = place.index * self._sequence
        tokens = self._store.open(self._entries[place.shard]).tokens
        return tokens[start : start + self._sequence + 1]


def evaluation_tokens(store: ShardStore) -> Sequence[npt.NDArray[np.uint16]]:
    """Tokens of the frozen evaluation split, shard by shard."""
    return [store.open(entry).tokens for entry in store.split("eval")]
