"""A folder, and any store that fsspec knows, behind the methods that ``Root`` needs.

Paths are relative to the root. Every method raises the sentences of ``Caller.call``. S3 has a class
of its own (``tessera.storage.s3``), because only its own requests tell the ETag of what was moved.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from tessera.errors import StoreError
from tessera.storage.digests import CHUNK, sha256_bytes, sha256_file
from tessera.storage.faults import MismatchError, is_taken
from tessera.storage.local import StandingFolder, copy_local, create_local, publish_local
from tessera.storage.retry import Caller

DOWNLOADS = 3
"""How often a file is fetched that arrives damaged every time."""

_STAMP = (
    "size",
    "mtime",
    "ino",
    "created",
    "LastModified",
    "last_modified",
    "ETag",
    "etag",
    "md5Hash",
)
"""What fsspec's stores tell of an object that changes with it; each tells some of them."""

Progress = Callable[[int], None]


class Store(Protocol):
    """What ``Root`` asks of the place behind it."""

    def read(self, path: str) -> bytes:
        """The whole object."""

    def exists(self, path: str) -> bool:
        """Whether there is an object or a folder."""

    def size(self, path: str) -> int:
        """Bytes of an object."""

    def files(self, prefix: str) -> list[str]:
        """Paths of all objects at or below a folder, in any order; empty if there is none."""

    def children(self, prefix: str) -> list[str]:
        """Names or paths of the direct children of a folder; empty if there is none."""

    def stamps(self, prefix: str) -> dict[str, str]:
        """``files``, each with a text that is another one after the object was written again."""

    def fetch(self, path: str, local: Path, check: Callable[[], None] | None) -> None:
        """Download to ``local``; ``check`` raises ``MismatchError`` if it must be done again.

        Without a ``check`` the store itself proves what arrived as well as it can.
        """

    def publish(self, path: str, data: bytes) -> None:
        """Write or replace an object."""

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist; False if it does."""

    def upload(self, local: Path, path: str, *, link: bool, on_bytes: Progress | None) -> None:
        """Write or replace an object from a local file."""

    def delete(self, path: str) -> None:
        """Remove an object if it is there."""

    def delete_folder(self, prefix: str) -> None:
        """Remove a folder whose objects are gone, where folders are things of their own."""


def not_stored(path: str, url: str) -> MismatchError:
    """A write whose bytes are not what the store holds."""
    return MismatchError(
        StoreError(
            f"{url} did not keep {path} as it was sent, every time it was tried; try again later "
            "or use another store."
        )
    )


class FsspecStore:
    """Any store of fsspec; a write counts once it was read back and is the same."""

    def __init__(self, fs: Any, base: str, caller: Caller) -> None:
        self.fs, self._base, self._caller = fs, base, caller

    def read(self, path: str) -> bytes:
        """The whole object, from one read: these stores tell nothing to check it against."""
        data: bytes = self._caller.call(path, lambda: self.fs.cat_file(self._full(path)))
        return data

    def exists(self, path: str) -> bool:
        """Whether there is an object or a folder."""

        def look() -> bool:
            # Not fs.exists: for many stores it answers False to any error, a passing one included.
            try:
                self.fs.info(self._full(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

        return self._caller.call(path, look)

    def size(self, path: str) -> int:
        """Bytes of an object."""
        return int(self._caller.call(path, lambda: self.fs.info(self._full(path))["size"]))

    def files(self, prefix: str) -> list[str]:
        """Paths of all objects at or below a folder, in any order; empty if there is none."""
        return [self._relative(info["name"]) for info in self._infos(prefix)]

    def stamps(self, prefix: str) -> dict[str, str]:
        """``files``, each with its size, times and, where the store has one, its ETag."""
        found = self._infos(prefix)
        return {
            self._relative(i["name"]): ":".join(str(i.get(k, "")) for k in _STAMP) for i in found
        }

    def _infos(self, prefix: str) -> list[dict[str, Any]]:
        def look() -> list[dict[str, Any]]:
            try:
                if self.fs.async_impl:  # object stores list a whole prefix at once
                    found = self.fs.find(self._full(prefix), withdirs=False, detail=True)
                    return list(found.values())
                return list(self._walk(self._full(prefix)))
            except FileNotFoundError:
                return []

        return self._caller.call(prefix, look)

    def _walk(self, folder: str) -> Iterator[dict[str, Any]]:
        """All files below ``folder``; fsspec's own walk takes a folder it cannot read for empty."""
        for info in self.fs.ls(folder, detail=True):
            if info["type"] != "directory":
                yield info
            elif info["name"] != folder:
                try:
                    yield from self._walk(info["name"])
                except FileNotFoundError:
                    pass  # removed since it was listed

    def children(self, prefix: str) -> list[str]:
        """Paths of the direct children of a folder; empty if there is none."""

        def look() -> list[str]:
            try:
                return list(self.fs.ls(self._full(prefix), detail=False))
            except (FileNotFoundError, NotADirectoryError):
                return []

        return self._caller.call(prefix, look)

    def fetch(self, path: str, local: Path, check: Callable[[], None] | None) -> None:
        """Download to ``local``; ``check`` raises ``MismatchError`` if it must be done again."""

        def once() -> None:
            self.fs.get_file(self._full(path), str(local))

        def whole() -> None:
            self._caller.call(path, once, budget=budget, written_to=str(local.parent))
            if check:
                check()

        budget = self._caller.budget()
        self._caller.call(path, whole, budget=budget, attempts=DOWNLOADS)

    def publish(self, path: str, data: bytes) -> None:
        """Write or replace an object, read it back, and write it again if it is not the same."""

        def once() -> None:
            self.fs.pipe_file(self._full(path), data)
            self._read_back(path, sha256_bytes(data))

        self._caller.call(path, once)

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist; False if it does."""
        if self.exists(path):  # for the stores that ignore the mode below
            return False
        try:
            self._caller.call(
                path, lambda: self.fs.pipe_file(self._full(path), data, mode="create")
            )
        except StoreError as error:
            if is_taken(error.__cause__):
                # A retry of our own write that had arrived looks the same: compare the bytes.
                return self.read(path) == data
            raise
        try:
            self._read_back(path, sha256_bytes(data))
        except Exception:
            self.publish(path, data)  # it is ours, and arrived damaged or cannot be read yet
        return True

    def upload(self, local: Path, path: str, *, link: bool, on_bytes: Progress | None) -> None:
        """Write or replace an object from a local file, and read it back."""
        digest = sha256_file(local)

        def once() -> None:
            self.fs.put_file(str(local), self._full(path))
            self._read_back(path, digest)

        self._caller.call(path, once, budget=self._caller.budget(local.stat().st_size))
        if on_bytes:
            on_bytes(local.stat().st_size)

    def delete(self, path: str) -> None:
        """Remove an object if it is there."""

        def remove() -> None:
            try:
                self.fs.rm_file(self._full(path))
            except FileNotFoundError:
                pass

        self._caller.call(path, remove)

    def delete_folder(self, prefix: str) -> None:
        """Nothing: a folder of an object store is only a part of names."""

    def _read_back(self, path: str, sha256: str) -> None:
        digest = hashlib.sha256()
        with self.fs.open(self._full(path), "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise not_stored(path, self._caller.url)

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base

    def _relative(self, full: str) -> str:
        return full[len(self._base) :].lstrip("/") if full.startswith(self._base) else full


class FolderStore(FsspecStore):
    """A folder: a write is a temporary file, ``fsync`` and a rename; nothing is read back.

    One that was there and vanished is a store that is down: no write makes it again.
    """

    def __init__(self, fs: Any, base: str, caller: Caller) -> None:
        super().__init__(fs, base, caller)
        self._folder = StandingFolder(Path(base))

    def publish(self, path: str, data: bytes) -> None:
        """Write or replace an object."""
        target = Path(self._full(path))
        self._caller.call(path, lambda: publish_local(target, data, self._folder))

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist; False if it does."""
        target = Path(self._full(path))
        return self._caller.call(path, lambda: create_local(target, data, self._folder))

    def upload(self, local: Path, path: str, *, link: bool, on_bytes: Progress | None) -> None:
        """Copy a local file, or link it."""
        target = Path(self._full(path))

        def once() -> None:
            copy_local(local, target, link=link, on_bytes=on_bytes, root=self._folder)

        self._caller.call(path, once)

    def delete_folder(self, prefix: str) -> None:
        """Remove the folder and what a killed process left in it."""

        def remove() -> None:
            try:
                shutil.rmtree(self._full(prefix))
            except FileNotFoundError:
                pass

        self._caller.call(prefix, remove)
