"""Digests of bytes and files, and what an object store's ETag says about them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

CHUNK = 8 << 20
"""Bytes that are read, hashed, sent or fetched at once."""
_MOST_PARTS = 10_000  # of one multi-part upload, in every S3 store
_OTHER_PART_SIZES = (50 << 20,)
"""Part sizes of other writers whose multi-part ETags can be computed too (s3fs: 50 MiB)."""


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a local file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken of: sorted keys, no spaces, UTF-8."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


class Content(Protocol):
    """Bytes that can be read in slices: in memory or in a local file."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on, fewer only at the end."""


class Target(Content, Protocol):
    """Content that is filled in slices, by several threads at once."""

    def resize(self, size: int) -> None:
        """Make room for ``size`` bytes; what was there is lost."""

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""


class Memory:
    """Content in memory."""

    def __init__(self, data: bytes = b"") -> None:
        self._data: bytes | bytearray = data

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on, fewer only at the end."""
        return bytes(self._data[offset : offset + length])

    def resize(self, size: int) -> None:
        """Make room for ``size`` bytes; what was there is lost."""
        self._data = bytearray(size)

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""
        assert isinstance(self._data, bytearray)
        self._data[offset : offset + len(data)] = data


class LocalFile:
    """Content of a local file. Opened by name for each slice, so that a thread that outlives its
    call can never write into a file that was opened later under the same descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self.path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on, fewer only at the end."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def resize(self, size: int) -> None:
        """Make room for ``size`` bytes; what was there is lost."""
        with self.path.open("wb") as file:
            file.truncate(size)

    def write(self, offset: int, data: bytes) -> None:
        """Put ``data`` at ``offset``."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)


def part_size(size: int) -> int:
    """Bytes of each part but the last when ``size`` bytes go up in parts: whole ``CHUNK``s."""
    return CHUNK * max(1, -(-size // (CHUNK * _MOST_PARTS)))


def md5(data: bytes) -> bytes:
    """MD5 of ``data``: against accidents on the way, not against an enemy."""
    return hashlib.md5(data, usedforsecurity=False).digest()


def md5_of(content: Content) -> bytes:
    """MD5 of all of ``content``, read in chunks."""
    digest = hashlib.md5(usedforsecurity=False)
    for offset in range(0, content.size, CHUNK):
        digest.update(content.read(offset, CHUNK))
    return digest.digest()


def bare(etag: str) -> str:
    """An ETag without its quotes."""
    return etag.removeprefix("W/").strip('"').lower()


def parts_etag(md5s: Iterable[bytes]) -> str:
    """The ETag, without quotes, that S3 gives to an object made of parts with these MD5s."""
    digests = list(md5s)
    return f"{md5(b''.join(digests)).hex()}-{len(digests)}"


def etag_proves(etag: str, content: Content) -> bool:
    """Whether ``etag`` is a digest of ``content``.

    False says nothing about the content: many stores and some ways to encrypt give ETags that are
    no digests, and those of uploads in parts of an unknown size cannot be computed.
    """
    text = bare(etag)
    if re.fullmatch("[0-9a-f]{32}", text):
        return md5_of(content).hex() == text
    if not re.fullmatch(r"[0-9a-f]{32}-\d{1,5}", text):
        return False
    size = content.size
    for length in {part_size(size), *_OTHER_PART_SIZES}:
        offsets = range(0, size, length)
        if len(offsets) == int(text.partition("-")[2]):
            md5s = (_md5_of_part(content, offset, length) for offset in offsets)
            if parts_etag(md5s) == text:
                return True
    return False


def _md5_of_part(content: Content, offset: int, length: int) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    for start in range(offset, offset + length, CHUNK):
        digest.update(content.read(start, min(CHUNK, offset + length - start)))
    return digest.digest()
