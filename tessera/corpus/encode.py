"""One split of the spool into local token shards, in blocks that keep every core busy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tessera.corpus.clean import Split
from tessera.corpus.shards import ShardFile, Tokens, pack_ids, write_shard
from tessera.corpus.sources import Consumed
from tessera.corpus.spool import Record, Spool
from tessera.corpus.tokenizer import Tokenizer

# An encoding holds some hundred bytes a token until its ids are copied out; 4 MB of text is about a
# million tokens of that, and enough documents to spread over the cores.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class EncodedShard:
    """A local shard and the UTF-8 bytes of the text in it."""

    file: ShardFile
    text_bytes: int


@dataclass(frozen=True)
class EncodedSplit:
    """The local shards of one split and how often each token occurs in them."""

    shards: list[EncodedShard]
    counts: npt.NDArray[np.int64]
    """Shape ``(vocab_size,)``; end-of-text included."""


class SplitEncoder:
    """Cuts a stream of encoded documents into shards of at most ``limit`` tokens."""

    def __init__(self, split: Split, tokenizer: Tokenizer, folder: Path, limit: int) -> None:
        self._split = split
        self._tokenizer = tokenizer
        self._folder = folder
        self._limit = limit
        self._documents: list[Tokens] = []
        self._tokens = 0
        self._text_bytes = 0
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._shards: list[EncodedShard] = []

    def add(self, ids: Tokens, text_bytes: int) -> None:
        """One document, without its end-of-text."""
        length = len(ids) + 1
        if self._documents and self._tokens + length > self._limit:
            self._close()
        self._documents.append(ids)
        self._tokens += length
        self._text_bytes += text_bytes
        self._counts += np.bincount(ids, minlength=len(self._counts))
        self._counts[self._tokenizer.end_of_text_id] += 1

    def finish(self) -> EncodedSplit:
        """Close the last shard."""
        if self._documents:
            self._close()
        return EncodedSplit(self._shards, self._counts)

    def _close(self) -> None:
        tokenizer = self._tokenizer
        file = write_shard(
            self._folder / f"{self._split}-{len(self._shards):05d}.safetensors",
            self._documents,
            end_of_text_id=tokenizer.end_of_text_id,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
        )
        self._shards.append(EncodedShard(file, self._text_bytes))
        self._documents, self._tokens, self._text_bytes = [], 0, 0


def encode_split(
    spool: Spool,
    split: Split,
    tokenizer: Tokenizer,
    *,
    folder: Path,
    limit: int,
    document_tokens: npt.NDArray[np.int64],
    consumed: Consumed,
) -> EncodedSplit:
    """Encode every document of ``split`` and write its shards into ``folder``.

    ``document_tokens[number]`` receives the tokens of each document, its end-of-text included.
    """
    encoder = SplitEncoder(split, tokenizer, folder, limit)
    for block in _blocks(spool.records(split)):
        encoded = tokenizer.encode_batch([record.text.decode() for record in block])
        for record, ids in zip(block, encoded, strict=True):
            document_tokens[record.number] = len(ids) + 1
            encoder.add(pack_ids(ids, vocab_size=tokenizer.vocab_size), len(record.text))
        consumed(sum(len(record.text) for record in block))
    return encoder.finish()


def _blocks(records: Iterator[Record]) -> Iterator[list[Record]]:
    block: list[Record] = []
    size = 0
    for record in records:
        block.append(record)
        size += len(record.text)
        if size >= _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
