"""In which order the documents of several sources are read: one after the other, or side by side.

Training shuffles within windows of a few shards. Read one after the other, each window would hold a
single source, and a long run would meet its sources one by one; side by side, each shard holds the
whole mixture.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from tessera.corpus.sources import Consumed, Document, Source

Read = tuple[int, Document, int]
"""The number of the source, a document of it, and the UTF-8 bytes of its text as it was read."""


def in_order(sources: Sequence[Source], interleave: bool, consumed: Consumed) -> Iterator[Read]:
    """Every document of ``sources``, each source cut off at its ``max_bytes``.

    With ``interleave`` the next document comes from the source of which the smallest share was read
    so far, by bytes of text; of two equal shares from the first. The order depends on the texts
    alone, so equal inputs give equal shards.
    """
    readers = [_documents(number, source, consumed) for number, source in enumerate(sources)]
    if not interleave:
        for reader in readers:
            yield from reader
        return
    weights = [source.recipe.max_bytes or max(source.size, 1) for source in sources]
    waiting = [(0.0, number) for number in range(len(readers))]  # a heap already
    read = [0] * len(readers)
    while waiting:
        _, number = waiting[0]
        found = next(readers[number], None)
        if found is None:
            heapq.heappop(waiting)
            continue
        read[number] += found[2]
        heapq.heapreplace(waiting, (read[number] / weights[number], number))
        yield found


def _documents(number: int, source: Source, consumed: Consumed) -> Iterator[Read]:
    """One source up to its ``max_bytes``; what it leaves unread counts as consumed at the end."""
    limit, told, read = source.recipe.max_bytes, 0, 0

    def passing_on(count: int) -> None:
        nonlocal told
        told += count
        consumed(count)

    for document in source.documents(passing_on):
        size = len(document.text.encode("utf-8", "surrogatepass"))
        read += size
        yield number, document, size
        if limit is not None and read >= limit:
            consumed(source.size - told)
            return
