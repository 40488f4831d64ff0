"""Which sample comes when: a pure function, so that resuming is arithmetic.

Within an epoch every sample comes once. The order is (seed, fingerprint, epoch) -> permutation:

1. the shards are shuffled;
2. they are taken in windows of ``WINDOW`` shards, so that few are open at a time;
3. the samples of a window are shuffled together.

The third shuffle must answer "which sample is number n?" without a table of billions, and no
library's generator promises the same permutation in its next version. So both shuffles are a
Feistel network (Luby & Rackoff 1988) on the smallest even number of bits that holds the window,
walked until it lands inside (cycle walking, Black & Rogaway 2002). No iterator state exists
anywhere; neither micro-batch, nor number of GPUs, nor restarts can change the order.

The functions on Python integers define the order. ``permute_all`` and ``SampleOrder.places`` say
the same for many numbers at once with numpy, whose unsigned 64-bit arithmetic wraps as the
definition's does; tests hold the two equal. docs/streaming.md draws how a number becomes a sample.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

WINDOW = 4
_ROUNDS = 6
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

_BLOCK = 1024  # samples worked out at once: numpy's price is per call

Numbers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def derive_key(*parts: object) -> int:
    """64 bits that depend on every part."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def permute(index: int, size: int, key: int) -> int:
    """The image of ``index`` under the permutation of range(``size``) that ``key`` names."""
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside of range({size})")
    if size == 1:
        return 0
    half = _half_bits(size)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ key, round_) & mask)
        index = left << half | right
        if index < size:
            return index


def _half_bits(size: int) -> int:
    """Half of the bits of the smallest Feistel network that covers range(``size``)."""
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _mix(value: int, round_: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    value = (value + (round_ + 1) * _STEP) & _MASK
    value = ((value ^ value >> 30) * _FIRST) & _MASK
    value = ((value ^ value >> 27) * _SECOND) & _MASK
    return value ^ value >> 31


def permute_all(indices: Numbers, size: int, key: int) -> Numbers:
    """``permute`` of every index, (n,) int64 to (n,) int64; ``size`` is below 2**62."""
    if np.any((indices < 0) | (indices >= size)):
        raise ValueError(f"an index is outside of range({size})")
    result = indices.astype(np.uint64)
    if size == 1:
        return np.zeros(len(indices), np.int64)
    half = _half_bits(size)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    outside = np.arange(len(indices))
    while len(outside):
        walking = result[outside]
        left, right = walking >> shift, walking & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix_all(right ^ np.uint64(key), round_) & mask)
        walking = left << shift | right
        result[outside] = walking
        outside = outside[walking >= np.uint64(size)]
    return result.astype(np.int64)


def _mix_all(values: Words, round_: int) -> Words:
    """``_mix`` of every value."""
    values = values + np.uint64((round_ + 1) * _STEP & _MASK)
    values = (values ^ values >> np.uint64(30)) * np.uint64(_FIRST)
    values = (values ^ values >> np.uint64(27)) * np.uint64(_SECOND)
    return values ^ values >> np.uint64(31)


@dataclass(frozen=True)
class Place:
    """Sample ``index`` of shard ``shard``."""

    shard: int
    index: int


@dataclass(frozen=True)
class Window:
    """The samples ``first`` ... ``stop`` - 1 (global numbers) come from ``shards`` and no other."""

    first: int
    stop: int
    shards: tuple[int, ...]
    """At most ``WINDOW``, in the epoch's order; those without a whole sample are left out."""
    key: int
    """Names the permutation of the window's samples."""


class SampleOrder:
    """The order of all samples of a split, epoch after epoch."""

    def __init__(self, samples_per_shard: Sequence[int], seed: int, fingerprint: str) -> None:
        """``samples_per_shard``: (tokens - 1) // T of each shard, in the manifest's order."""
        self._sizes = list(samples_per_shard)
        self.per_epoch = sum(self._sizes)
        self._seed, self._fingerprint = seed, fingerprint
        if self.per_epoch == 0:
            raise ValueError("no shard holds a whole sample")
        self._epoch = lru_cache(maxsize=2)(self._plan)
        self._block = lru_cache(maxsize=4)(self._work_out)

    def __getitem__(self, number: int) -> Place:
        """Where global sample ``number`` (0, 1, ... over all epochs) lies."""
        window = self.window(number)
        index = permute(number - window.first, window.stop - window.first, window.key)
        for shard in window.shards:
            if index < self._sizes[shard]:
                return Place(shard, index)
            index -= self._sizes[shard]
        raise AssertionError("unreachable: the window holds as many samples as were counted")

    def window(self, number: int) -> Window:
        """The window that global sample ``number`` lies in.

        The next one, in the next epoch after an epoch's last, is ``window(this.stop)``.
        """
        epoch, place = divmod(number, self.per_epoch)
        starts, windows = self._epoch(epoch)
        return windows[bisect_right(starts, place) - 1]

    def places(self, first: int, count: int) -> tuple[Numbers, Numbers]:
        """Shards and indices of samples ``first`` ... ``first + count - 1``, each (count,) int64.

        Equal to ``self[number]`` for each number.
        """
        shards, indices = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            window = self.window(first + done)
            block, skipped = divmod(first + done - window.first, _BLOCK)
            found = self._block(window, block)[:, skipped : skipped + count - done]
            stop = done + found.shape[1]
            shards[done:stop], indices[done:stop] = found
            done = stop
        return shards, indices

    def _work_out(self, window: Window, block: int) -> Numbers:
        """Shards and indices of ``window``'s ``block``-th run of ``_BLOCK`` samples, (2, n)."""
        size = window.stop - window.first
        numbers = np.arange(block * _BLOCK, min(size, (block + 1) * _BLOCK))
        mixed = permute_all(numbers, size, window.key)
        ends = np.cumsum([self._sizes[shard] for shard in window.shards])
        which = np.searchsorted(ends, mixed, side="right")
        return np.stack([np.array(window.shards)[which], mixed - np.append(0, ends)[which]])

    def _plan(self, epoch: int) -> tuple[list[int], list[Window]]:
        """Where each window of ``epoch`` starts within it, and the windows."""
        key = derive_key(self._seed, self._fingerprint, epoch, "shards")
        shards = [permute(i, len(self._sizes), key) for i in range(len(self._sizes))]
        starts, windows, total = [], [], 0
        for number, at in enumerate(range(0, len(shards), WINDOW)):
            used = tuple(shard for shard in shards[at : at + WINDOW] if self._sizes[shard])
            size = sum(self._sizes[shard] for shard in used)
            first = epoch * self.per_epoch + total
            window_key = derive_key(self._seed, self._fingerprint, epoch, number)
            starts.append(total)
            windows.append(Window(first, first + size, used, window_key))
            total += size
        return starts, windows
