"""Documents out of files: text, JSON Lines, Parquet, and Python's own documentation strings.

Every reader is a stream in a fixed order (files sorted by name, then as they stand in the file),
and never holds more than one document and one read buffer, or one Parquet batch. What cannot be
read is one sentence with the file and, where there is one, the line.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import OpenFile, get_compression

from tessera.corpus import stdlib
from tessera.corpus.recipe import SourceRecipe, expand_variables
from tessera.errors import InputError, StoreError
from tessera.storage import CHUNK, canonical_json, sha256_bytes

Consumed = Callable[[int], None]
"""Told how many bytes of input were read since the last call; drives a progress bar."""

_PARQUET_ROWS = 256
_NETWORK = frozenset({"httpx", "httpcore", "aiohttp", "requests", "urllib3", "huggingface_hub"})
_FORMATS = frozenset({"pyarrow", "zlib", "_lzma", "lzma"})


@dataclass(frozen=True)
class Document:
    """One text with the name it has in its source."""

    id: str
    text: str
    source: str


class Source:
    """One entry of a recipe, with its files found.

    ``size`` is the bytes of input, as stored. Raises ``InputError`` if nothing matches the path.
    """

    def __init__(self, recipe: SourceRecipe, folder: Path) -> None:
        """``folder`` is the recipe's own: relative paths start there."""
        self.recipe = recipe
        if recipe.format == "docstrings":
            self.fs: Any = fsspec.filesystem("file")
            self._library = stdlib.library_folder()
            self.files = [str(path) for path in stdlib.library_files(self._library)]
        else:
            self.fs, self.files = find_files(
                recipe.path or "", folder, where=f"The path of source {recipe.name}"
            )
        with _readable(self.files[0]):
            self.sizes = [int(self.fs.size(name) or 0) for name in self.files]
        self.size = sum(self.sizes)

    def digest(self, consumed: Consumed = lambda _: None) -> str:
        """Hex digest of what would be read: equal digests mean equal documents.

        Local files by the sha256 of their content; elsewhere the store's own checksum stands in, so
        that a corpus is not downloaded only to find that it is built already.
        """
        return sha256_bytes(
            canonical_json([file_digest(self.fs, name, consumed) for name in self.files])
        )

    def documents(self, consumed: Consumed = lambda _: None) -> Iterator[Document]:
        """Every document, in order."""
        read = {
            "text": self._text,
            "jsonl": self._jsonl,
            "parquet": self._parquet,
            "docstrings": self._docstrings,
        }[self.recipe.format]
        for name, size in zip(self.files, self.sizes, strict=True):
            with _readable(name):
                for identity, text in read(name, size, consumed):
                    yield Document(identity, text, self.recipe.name)

    # -- formats: each yields (id, text) ---------------------------------------------------------

    def _text(self, name: str, size: int, consumed: Consumed) -> Iterator[tuple[str, str]]:
        with self._open(name) as file:
            data = file.read()
        consumed(size)
        yield name.rsplit("/", 1)[-1], data.decode("utf-8-sig")

    def _jsonl(self, name: str, size: int, consumed: Consumed) -> Iterator[tuple[str, str]]:
        opened = self._open(name)
        with opened as file:
            stored, before = opened.fobjects[0], 0  # below the decompression, if there is one
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._record(name, number, line)
                if (now := stored.tell()) != before:
                    consumed(now - before)
                    before = now

    def _record(self, name: str, number: int, line: bytes) -> tuple[str, str]:
        recipe = self.recipe
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{name}, line {number}: not valid JSON ({error}); every line must be one JSON "
                "object: correct or remove the line."
            ) from error
        text = record.get(recipe.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(
                f"{name}, line {number}: expected an object with a string in "
                f"{recipe.text_field!r} (text_field of source {recipe.name}); correct the line or "
                "the recipe."
            )
        return str(record.get(recipe.id_field, number)), text

    def _parquet(self, name: str, size: int, consumed: Consumed) -> Iterator[tuple[str, str]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        recipe = self.recipe
        with self.fs.open(name, "rb") as file, pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if recipe.text_field not in schema.names:
                raise InputError(
                    f"{name} has no column {recipe.text_field!r} (text_field of source "
                    f"{recipe.name}); its columns are {', '.join(schema.names)}."
                )
            kind = schema.field(recipe.text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(
                    f"Column {recipe.text_field!r} of {name} holds {kind}, expected strings; name "
                    f"another text_field for source {recipe.name}."
                )
            columns = [n for n in (recipe.text_field, recipe.id_field) if n in schema.names]
            rows, total, reported = 0, max(table.metadata.num_rows, 1), 0
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(
                    _PARQUET_ROWS, row_groups=[group], columns=columns, use_threads=False
                ):
                    for row in batch.to_pylist():
                        text = row[recipe.text_field]
                        yield str(row.get(recipe.id_field, rows)), "" if text is None else text
                        rows += 1
                    consumed(size * rows // total - reported)
                    reported = size * rows // total

    def _docstrings(self, name: str, size: int, consumed: Consumed) -> Iterator[tuple[str, str]]:
        yield from stdlib.file_texts(Path(name), self._library)
        consumed(size)

    def _open(self, name: str) -> OpenFile:
        return OpenFile(self.fs, name, mode="rb", compression=get_compression(name, "infer"))


def find_files(path: str, folder: Path, *, where: str) -> tuple[Any, list[str]]:
    """The file system of ``path`` and the files that match it, sorted; at least one.

    ``where`` names the key for the ``InputError``.
    """
    expanded = expand_variables(path, where=where)
    # Joining keeps an absolute path; a recipe's own folder may hold glob characters of its own.
    local = str(Path(glob.escape(str(folder.absolute())), expanded))
    url = expanded if "://" in expanded else local
    with _readable(expanded):
        try:
            fs, target = fsspec.core.url_to_fs(url)
            matches = fs.glob(target, detail=True)
            found = sorted(name for name, info in matches.items() if info["type"] == "file")
        except (ValueError, ImportError) as error:
            raise InputError(f"{where} cannot be opened ({error}): {expanded}.") from error
    if not found:
        raise InputError(
            f"{where} matches no file: {expanded}; paths are relative to the recipe's folder, "
            f"{folder}."
        )
    return fs, found


def file_digest(fs: Any, name: str, consumed: Consumed = lambda _: None) -> str:
    """Digest of one file: sha256 of a local one, the store's checksum and size of another."""
    with _readable(name):
        protocol = fs.protocol
        if "file" in ({protocol} if isinstance(protocol, str) else set(protocol)):
            digest = hashlib.sha256()
            with fs.open(name, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    consumed(len(chunk))
            return digest.hexdigest()
        info = fs.info(name)
        known = [info.get(key) for key in ("ETag", "etag", "md5Hash", "sha256", "checksum")]
        stamp = next((str(value) for value in known if value), None) or str(fs.ukey(name))
        return f"{info.get('size')}:{stamp}"


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what a reader raises into one sentence about ``name``."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}); convert it."
        ) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(
            f"{name} cannot be read ({type(error).__name__}); check the path and its permissions."
        ) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is not a whole compressed file ({error}); restore it.") from error
    except OSError as error:
        raise StoreError(f"{name} cannot be read ({error}); try again or restore it.") from error
    except Exception as error:
        # The libraries' own types, without importing any of them for a text file.
        library = type(error).__module__.split(".")[0]
        reason = " ".join(str(error).split()) or type(error).__name__
        if library in _NETWORK:
            raise StoreError(
                f"{name} cannot be reached ({reason}); check the network and the path, then try "
                "again."
            ) from error
        if library not in _FORMATS:
            raise
        raise InputError(f"{name} is damaged or of another format ({reason}).") from error
