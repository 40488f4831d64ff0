"""From a manifest to training samples: shards fetched ahead, samples cut where the order says."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tessera.corpus.manifest import Manifest, ShardEntry
from tessera.corpus.shards import Shard, open_shard
from tessera.errors import DamagedError, InputError, NotFoundError
from tessera.storage import Root, cache_folder
from tessera.training.cache import PATIENCE_S, Checked, ShardCache
from tessera.training.order import WINDOW, SampleOrder, Window

_ASKED_AT_ONCE = 16  # sizes of shards; a request to a far store is mostly waiting
_AGAIN_S = 5.0  # after which a prefetch that failed is tried again


class ShardStore:
    """Shards of one corpus on this machine: read in place from a folder, else from a cache.

    Training never runs on damaged data: a shard's digest is checked when it arrives from a remote
    root, and otherwise at its first use in this process (see ``Checked``), in place or in the
    cache. It is not read for that again unless the file changed.

    A shard that is mapped is held in the cache for as long as any array of it lives.
    """

    def __init__(self, root: Root, manifest: Manifest, *, limit_bytes: int | None = None) -> None:
        """``limit_bytes`` bounds the machine's cache of shards (None: nothing does)."""
        self._root, self._manifest = root, manifest
        self._cache = ShardCache(cache_folder() / "shards", limit_bytes)
        self._checked = Checked()
        self._lock = threading.Lock()
        self._shards: dict[str, Shard] = {}
        self._ahead: dict[str, _Ahead] = {}

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

        Cheap on every store, and before anything is paid for; digests are checked later.
        """
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            for entry, size in zip(entries, pool.map(self._size, entries), strict=True):
                if size != entry.bytes:
                    raise self._damaged(entry)

    def check_room(self, entries: Sequence[ShardEntry], at_once: int) -> None:
        """Raise ``InputError`` unless the cache takes any ``at_once`` of ``entries`` together."""
        if not self._root.is_local:
            self._cache.require_room(entries, at_once)

    def open(self, entry: ShardEntry) -> Shard:
        """The shard, mapped; it stays open until ``keep_only`` leaves it out.

        Waits for a prefetch of it that is under way. Raises ``DamagedError`` for one that differs
        from the manifest, and what ``ShardCache.fetch`` raises.
        """
        with self._lock:
            if shard := self._shards.get(entry.sha256):
                return shard
            ahead = self._ahead.pop(entry.sha256, None)
        shard = (ahead and ahead.shard()) or self.map(entry)
        with self._lock:
            self._shards[entry.sha256] = shard
        return shard

    def prefetch(self, entries: Sequence[ShardEntry]) -> None:
        """Begin to fetch, check and map shards in background threads; returns at once.

        An error there is kept quiet: ``open`` tries itself and raises it. What the cache has no
        room for is left out, until it is asked for again some seconds later.
        """
        with self._lock:
            for entry in entries:
                begun = self._ahead.get(entry.sha256)
                if entry.sha256 not in self._shards and (begun is None or begun.is_due_again()):
                    self._ahead[entry.sha256] = _Ahead(partial(self.map, entry, patience_s=0))

    def keep_only(self, entries: Sequence[ShardEntry]) -> None:
        """Let go of all other shards, open or fetched ahead."""
        kept = {entry.sha256 for entry in entries}
        with self._lock:
            self._shards = {k: v for k, v in self._shards.items() if k in kept}
            self._ahead = {k: v for k, v in self._ahead.items() if k in kept}

    def close(self) -> None:
        """Let go of every shard. A download under way ends with the process, or on its own."""
        self.keep_only(())

    def map(self, entry: ShardEntry, *, patience_s: float = PATIENCE_S) -> Shard:
        """The shard, fetched if need be, checked and mapped; the store does not keep it open."""
        path = self._root.local_path(entry.path)
        if path is not None:
            if not self._checked.passes(path, entry.sha256):
                raise self._damaged(entry)
            return open_shard(path)
        held = self._cache.fetch(self._root, entry, patience_s=patience_s)
        try:
            shard = open_shard(held.path)
            mapping: Any = shard.tokens
            while isinstance(mapping, np.ndarray):
                mapping = mapping.base  # ends at the mmap, which dies with its last array
            weakref.finalize(mapping, held.close).atexit = False
        except BaseException:
            held.close()
            raise
        return shard

    def _size(self, entry: ShardEntry) -> int | None:
        try:
            return self._root.size(entry.path)
        except NotFoundError:
            return None

    def _damaged(self, entry: ShardEntry) -> DamagedError:
        return DamagedError(
            f"The shard {entry.path} in {self._root.url} is missing or differs from the "
            f"manifest; see `tessera corpus verify {self._manifest.path}`, then build or copy it "
            "again."
        )


@dataclass
class _Ahead:
    """A shard on its way, in a thread that does not keep the process from ending."""

    action: Callable[[], Shard]
    begun: float = field(default_factory=time.monotonic)
    future: Future[Shard] = field(default_factory=Future)

    def __post_init__(self) -> None:
        threading.Thread(target=self._run, name="shard", daemon=True).start()

    def _run(self) -> None:
        try:
            self.future.set_result(self.action())
        except BaseException as error:
            self.future.set_exception(error)

    def shard(self) -> Shard | None:
        """The shard once it is here; None if it could not be fetched."""
        return None if self.future.exception() else self.future.result()

    def is_due_again(self) -> bool:
        """Whether it failed, some time ago."""
        failed = self.future.done() and self.future.exception() is not None
        return failed and time.monotonic() - self.begun > _AGAIN_S


class SampleLoader:
    """Samples of the training split by global number."""

    def __init__(
        self,
        store: ShardStore,
        sequence: int,
        seed: int,
        fingerprint: str,
        *,
        samples: int | None = None,
    ) -> None:
        """``samples`` is how many training takes in all: nothing beyond them is fetched ahead.

        Raises ``InputError`` where no shard holds a sample or the cache is too small.
        """
        self._store, self._entries, self._samples = store, store.split("train"), samples
        store.check_sizes(self._entries)
        store.check_room(self._entries, WINDOW)
        self._sequence = sequence
        counts = [max(0, entry.tokens - 1) // sequence for entry in self._entries]
        if not sum(counts):
            raise InputError(
                f"No training shard holds {sequence + 1} tokens; shorten data.sequence or build a "
                "larger corpus."
            )
        self.order = SampleOrder(counts, seed, fingerprint)
        self._window: Window | None = None

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples ``first`` ... ``first + count - 1``: inputs, targets, (count, T) int64.

        Returns as soon as their shards are here; the next window's are fetched meanwhile.
        """
        rows = np.empty((count, self._sequence + 1), np.int64)
        done = 0
        while done < count:
            window = self.order.window(first + done)
            stop = min(count, window.stop - first)
            self._fill(rows[done:stop], first + done, window)
            done = stop
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def _fill(self, rows: npt.NDArray[np.int64], first: int, window: Window) -> None:
        """Put the samples from number ``first`` on into ``rows``; all are of ``window``.

        The window's shards are let go of on the way out, but for the store's hold on them: the next
        window may need their room.
        """
        shards = self._enter(window)
        which, indices = self.order.places(first, len(rows))
        starts = indices * self._sequence
        for row, shard, start in zip(rows, which.tolist(), starts.tolist(), strict=True):
            row[:] = shards[shard][start : start + self._sequence + 1]

    def _enter(self, window: Window) -> dict[int, npt.NDArray[np.uint16]]:
        """The tokens of the window's shards, all open; the next window's are on their way.

        A new window lets go of all that is not its own, and the next one is fetched once all of
        this one is here: so one window at a time always fits where one window fits. (Ranks that
        share a cache may be two steps apart: should a window be shorter, it must hold two.)
        """
        entries = [self._entries[shard] for shard in window.shards]
        if window != self._window:
            self._store.keep_only(entries)
            self._window = window
        self._store.prefetch(entries)
        opened = [self._store.open(entry).tokens for entry in entries]
        if self._samples is None or window.stop < self._samples:
            following = self.order.window(window.stop)
            self._store.prefetch([self._entries[shard] for shard in following.shards])
        return dict(zip(window.shards, opened, strict=True))


class _Tokens(Sequence[npt.NDArray[np.uint16]]):
    """Tokens of some shards, each mapped when it is looked at and no longer."""

    def __init__(self, store: ShardStore, entries: Sequence[ShardEntry]) -> None:
        self._store, self._entries = store, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        return self._store.map(self._entries[index]).tokens


def evaluation_tokens(store: ShardStore) -> Sequence[npt.NDArray[np.uint16]]:
    """Tokens of the frozen evaluation split, shard by shard; each is fetched when it is read."""
    return _Tokens(store, store.split("eval"))
