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
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

WINDOW = 4
_ROUNDS = 6
_MASK = (1 << 64) - 1


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
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ key, round_) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int, round_: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    value = (value + (round_ + 1) * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


@dataclass(frozen=True)
class Place:
    """Sample ``index`` of shard ``shard``."""

    shard: int
    index: int


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

    def __getitem__(self, number: int) -> Place:
        """Where global sample ``number`` (0, 1, ... over all epochs) lies."""
        epoch, place = divmod(number, self.per_epoch)
        starts, windows = self._epoch(epoch)
        window = bisect_right(starts, place) - 1
        shards = windows[window]
        size = sum(self._sizes[shard] for shard in shards)
        key = derive_key(self._seed, self._fingerprint, epoch, window)
        index = permute(place - starts[window], size, key)
        for shard in shards:
            if index < self._sizes[shard]:
                return Place(shard, index)
            index -= self._sizes[shard]
        raise AssertionError("unreachable: the window holds as many samples as were counted")

    def _plan(self, epoch: int) -> tuple[list[int], list[list[int]]]:
        """Where each window of ``epoch`` starts, and the shards in it."""
        key = derive_key(self._seed, self._fingerprint, epoch, "shards")
        shards = [permute(i, len(self._sizes), key) for i in range(len(self._sizes))]
        windows = [shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW)]
        starts, total = [], 0
        for window in windows:
            starts.append(total)
            total += sum(self._sizes[shard] for shard in window)
        return starts, windows
