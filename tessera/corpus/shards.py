"""Token shards: safetensors files of uint16 ids that are read in place, never loaded.

    document_starts  int64   (documents,)   where each document begins in `tokens`
    tokens           uint16  (tokens,)      every document followed by end-of-text

The header is written here and not by the safetensors library for one reason: the library writes the
metadata in the order of a hash map, so equal shards would have different digests from one process
to the next, and the digest of the shards *is* the identity of a corpus. Any safetensors reader can
open the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tessera.errors import InputError
from tessera.storage import sha256_file

FORMAT = "tessera-shard-1"
TOKEN_DTYPE = np.dtype("<u2")
_START_DTYPE = np.dtype("<i8")
_SPELLED: dict[str, tuple[str, np.dtype[Any]]] = {
    "document_starts": ("I64", _START_DTYPE),
    "tokens": ("U16", TOKEN_DTYPE),
}
_LONGEST_HEADER = 1 << 20

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class ShardFile:
    """A shard that was just written: counts, size in bytes, hex sha256."""

    path: Path
    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """An open shard; both arrays are views of the mapped file, read as they are touched."""

    path: Path
    tokens: Tokens
    """Shape ``(tokens,)``, read-only."""
    document_starts: npt.NDArray[np.int64]
    """Shape ``(documents,)``, ascending from 0, read-only."""
    tokenizer_sha256: str


def pack_ids(ids: Iterable[int] | npt.NDArray[Any], *, vocab_size: int) -> Tokens:
    """``ids`` as uint16, refused with ``InputError`` unless all are in ``[0, vocab_size)``."""
    wide = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
    limit = min(vocab_size, 1 << 16)
    if wide.size and (wide.min() < 0 or wide.max() >= limit):
        worst = int(wide.max() if wide.max() >= limit else wide.min())
        raise InputError(
            f"Token id {worst} does not fit: expected ids from 0 to {limit - 1}; the text was "
            "encoded with another tokenizer."
        )
    return wide.astype(TOKEN_DTYPE)


def write_shard(
    path: Path,
    documents: Sequence[Tokens | Sequence[int]],
    *,
    end_of_text_id: int,
    vocab_size: int,
    tokenizer_sha256: str,
) -> ShardFile:
    """Write one local shard; end-of-text is appended to every document here.

    The bytes are a pure function of the arguments. Raises ``InputError`` if an id does not fit.
    """
    packed = [pack_ids(document, vocab_size=vocab_size) for document in documents]
    end = pack_ids([end_of_text_id], vocab_size=vocab_size).tobytes()
    lengths = np.array([len(document) + 1 for document in packed], dtype=np.int64)
    starts = (np.cumsum(lengths) - lengths).astype(_START_DTYPE)
    total = int(lengths.sum())
    with path.open("wb") as file:
        file.write(_header(total, len(packed), tokenizer_sha256))
        file.write(starts.tobytes())
        for document in packed:
            file.write(document.tobytes())
            file.write(end)
    return ShardFile(path, total, len(packed), path.stat().st_size, sha256_file(path))


def open_shard(path: Path) -> Shard:
    """Map a local shard.

    Raises ``InputError`` that names the file and what is wrong: not a shard, another format, or cut
    off. The digest is not checked here (see ``tessera.corpus.verify``).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _LONGEST_HEADER else b""
    except OSError as error:
        raise InputError(f"The shard {path} cannot be read ({error.strerror}).") from error
    try:
        header = json.loads(text)
        metadata, spans = header["__metadata__"], {}
        for name, (kind, dtype) in _SPELLED.items():
            entry = header[name]
            begin, end = entry["data_offsets"]
            if entry["dtype"] != kind or entry["shape"] != [(end - begin) // dtype.itemsize]:
                raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}")
            spans[name] = (8 + length + begin, 8 + length + end)
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}")
        tokenizer_sha256 = str(metadata["tokenizer_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a {FORMAT} file ({error}); it is damaged or something else: fetch it "
            "again or build the corpus again."
        ) from error
    expected = max(end for _, end in spans.values())
    if size != expected:
        raise InputError(
            f"The shard {path} has {size} bytes, its header says {expected}; it was cut off or "
            "added to: fetch it again or build the corpus again."
        )
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    arrays = {
        name: np.asarray(mapped[begin:end]).view(_SPELLED[name][1])
        for name, (begin, end) in spans.items()
    }
    return Shard(path, arrays["tokens"], arrays["document_starts"], tokenizer_sha256)


def _header(tokens: int, documents: int, tokenizer_sha256: str) -> bytes:
    """The safetensors header, 8-byte aligned; int64 comes first so that both arrays are aligned."""
    first = documents * _START_DTYPE.itemsize
    last = first + tokens * TOKEN_DTYPE.itemsize
    header = {
        "__metadata__": {"format": FORMAT, "tokenizer_sha256": tokenizer_sha256},
        "document_starts": {"dtype": "I64", "shape": [documents], "data_offsets": [0, first]},
        "tokens": {"dtype": "U16", "shape": [tokens], "data_offsets": [first, last]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    return len(text).to_bytes(8, "little") + text
