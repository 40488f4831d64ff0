"""The root: a folder or any fsspec URL, and everything that may be done with it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from tessera.errors import ConflictError, DamagedError, InputError
from tessera.storage.digests import sha256_file
from tessera.storage.faults import MismatchError
from tessera.storage.local import TEMPORARY, require_writable, temporary_beside
from tessera.storage.retry import Caller, Limits, timeout_from_environment
from tessera.storage.s3 import S3Store
from tessera.storage.s3_requests import options
from tessera.storage.stores import FolderStore, FsspecStore, Store

DEFAULT_ROOT = ".tessera"
ROOT_VARIABLE = "TESSERA_ROOT"


class Root:
    """The place where everything that must last is a record.

    Paths are relative to the root, with ``/`` between parts. Every method raises ``StoreError`` (or
    its child ``NotFoundError``) with a sentence that names the object and the store. A root may be
    used by several threads at once.
    """

    def __init__(
        self,
        url: str,
        *,
        attempts: int = 10,
        longest_wait_s: float = 20.0,
        timeout_s: float | None = None,
    ) -> None:
        """Open ``url``: a folder, ``s3://bucket/prefix``, or any other fsspec URL.

        ``attempts`` and ``longest_wait_s`` bound the tries of one request (exponential backoff with
        full jitter). ``timeout_s`` of silence count as a stall (default ``TESSERA_STORE_TIMEOUT_S``
        or 30) and bound the rest: see ``tessera.storage.retry``.
        """
        limits = Limits(attempts, longest_wait_s, timeout_s or timeout_from_environment())
        is_s3 = url.startswith(("s3://", "s3a://"))
        if is_s3 and not url.split("/")[2]:
            raise InputError(
                f"The root {url!r} names no bucket; give s3://bucket/prefix in --root or "
                "TESSERA_ROOT."
            )
        settings: dict[str, Any] = {"use_listings_cache": False} if "://" in url else {}
        try:
            fs, base = fsspec.core.url_to_fs(url, **(options(limits) if is_s3 else settings))
        except (ValueError, ImportError, OSError) as error:
            raise InputError(
                f"The root {url!r} cannot be opened ({error}); give a folder or a URL such as "
                "s3://bucket/prefix in --root or TESSERA_ROOT."
            ) from error
        self.is_local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
        self.base = str(Path(base).absolute()) if self.is_local else base.rstrip("/")
        self.url = self.base if self.is_local else url.rstrip("/")
        if self.is_local and os.path.exists(self.base) and not os.path.isdir(self.base):
            raise InputError(
                f"The root {url!r} is a file; give a folder in --root or TESSERA_ROOT."
            )
        kind = FolderStore if self.is_local else S3Store if is_s3 else FsspecStore
        self.store: Store = kind(fs, self.base, Caller(self.url, limits))
        self._received = 0
        self._received_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    # -- reading ---------------------------------------------------------------------------------

    def read_bytes(self, path: str) -> bytes:
        """The whole object; from S3 never bytes that neither an ETag nor a second read confirms."""
        data = self.store.read(_checked(path))
        self._note_received(len(data))
        return data

    def read_json(self, path: str) -> Any:
        """The object, parsed; a torn or foreign file is an error that names it."""
        data = self.read_bytes(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise DamagedError(
                f"{path} in {self.url} is not valid JSON ({error}); it was damaged or written by "
                "something else: restore it or remove it."
            ) from error

    def exists(self, path: str) -> bool:
        """Whether there is an object (or a folder) at ``path``."""
        return self.store.exists(_checked(path))

    def files(self, prefix: str) -> list[str]:
        """All objects at or below the folder ``prefix``, sorted; empty if there is none."""
        found = self.store.files(_checked(prefix))
        return sorted(name for name in found if TEMPORARY not in name)

    def stamps(self, prefix: str) -> dict[str, str]:
        """``files``, each with a text that is another one after the object was written again."""
        found = self.store.stamps(_checked(prefix))
        return {name: found[name] for name in sorted(found) if TEMPORARY not in name}

    def children(self, prefix: str) -> list[str]:
        """Names of the direct children of the folder ``prefix``, sorted; empty if there is none."""
        found = self.store.children(_checked(prefix))
        names = {name.rstrip("/").rsplit("/", 1)[-1] for name in found}
        return sorted(name for name in names if name and not name.startswith(TEMPORARY))

    def local_path(self, path: str) -> Path | None:
        """Where an object lies if the root is a folder, so that it can be read in place."""
        return Path(self.base, _checked(path)) if self.is_local else None

    def is_absent(self) -> bool:
        """Whether the root is a folder that does not exist; the first write makes it."""
        return self.is_local and not os.path.lexists(self.base)

    def size(self, path: str) -> int:
        """Bytes of an object."""
        return self.store.size(_checked(path))

    def get_file(self, path: str, local: Path, *, sha256: str | None = None) -> None:
        """Download ``path`` to ``local`` atomically.

        A file whose sha256 is not the given one is fetched again, since a byte may have flipped on
        its way; ``DamagedError`` if that never helps. Without a digest S3 is checked as in
        ``read_bytes``.
        """
        _checked(path)
        require_writable(local.parent)
        with temporary_beside(local) as temporary:

            def check() -> None:
                if (found := sha256_file(temporary)) != sha256:
                    raise MismatchError(
                        DamagedError(
                            f"{path} in {self.url} has sha256 {found[:12]}, expected "
                            f"{str(sha256)[:12]}; the object is damaged: restore it or build it "
                            "again."
                        )
                    )

            self.store.fetch(path, temporary, check if sha256 is not None else None)
            self._note_received(temporary.stat().st_size)
            os.replace(temporary, local)

    def take_received(self) -> int:
        """Bytes of the objects that came from a remote store since the last call; 0 of a folder.

        An object that had to be read again, or was broken off, counts once or not at all.
        """
        with self._received_lock:
            received, self._received = self._received, 0
        return received

    def _note_received(self, size: int) -> None:
        if not self.is_local:
            with self._received_lock:
                self._received += size

    # -- writing ---------------------------------------------------------------------------------

    def publish(self, path: str, data: bytes) -> None:
        """Write or replace an object; a reader sees the old bytes or all of the new ones.

        On a remote store it counts once the ETag or a read confirms what was stored.
        """
        self.store.publish(_checked(path), data)

    def publish_json(self, path: str, value: Any) -> None:
        """``publish`` of readable JSON (NaN and infinities are refused: they are not JSON)."""
        self.publish(path, _readable(value))

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist yet; False if it already did."""
        return self.store.create(_checked(path), data)

    def create_json(self, path: str, value: Any) -> bool:
        """``create`` of readable JSON."""
        return self.create(path, _readable(value))

    def put_file(
        self,
        local: Path,
        path: str,
        *,
        link: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """Upload a local file so that it appears whole or not at all, checked as by ``publish``.

        ``link`` is the promise that nobody changes ``local`` again: a root on the same file system
        then gets a second name of the file instead of a copy. ``on_bytes`` is called in this thread
        with the bytes of each step; those of a step that must be done again count again.
        """
        self.store.upload(local, _checked(path), link=link, on_bytes=on_bytes)

    def delete(self, path: str) -> None:
        """Remove one object; one that is gone already is no error."""
        self.store.delete(_checked(path))

    def delete_tree(self, prefix: str) -> None:
        """Remove every object below a folder, and on a local root the empty folder too."""
        for path in self.files(prefix):
            self.delete(path)
        self.store.delete_folder(prefix)


def _checked(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ConflictError(f"{path!r} is not a path below the root; give a relative one.")
    return path


def _readable(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def open_root(url: str | None = None) -> Root:
    """The root named by ``url``, else by ``TESSERA_ROOT``, else the folder ``.tessera``."""
    return Root(url or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)
