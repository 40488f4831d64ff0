"""Every read and write of the root: retried, atomic, exclusive where asked, checked by digest.

The root is a folder or any fsspec URL. Three choices carry the rest of the project:

* A write is *published*: readers see the old bytes or all of the new ones. Object stores do that
  for a single PUT; a folder gets a temporary file in the same directory, ``fsync`` and
  ``os.replace``.
* ``create`` is exclusive where the store honours it (a hard link on a folder, ``If-None-Match`` on
  S3). Some stores ignore the condition and let two writers both win, so nothing that must be safe
  rests on it: every attempt writes under keys of its own (see ``tessera.runs``).
* Listings are never cached: another machine may have written a second ago.

Only passing faults are retried (time-outs, resets, throttling, 5xx). A missing object, a refused
key or a full disk is said at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from tessera.errors import ConflictError, DamagedError, InputError, NotFoundError, StoreError

DEFAULT_ROOT = ".tessera"
ROOT_VARIABLE = "TESSERA_ROOT"
CHUNK = 8 << 20
_TEMPORARY = ".partial-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FINAL_ERRNO = _FULL | {
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip

T = TypeVar("T")


def cache_folder() -> Path:
    """Where this machine keeps what it can lose: ``TESSERA_CACHE``, else ``~/.cache/tessera``."""
    if named := os.environ.get("TESSERA_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "tessera"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"tessera-{os.getuid()}"


def require_writable(folder: Path) -> None:
    """Make ``folder`` and prove that it takes a file; ``InputError`` says why it does not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_TEMPORARY):
            pass
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be written ({error.strerror or error}); point "
            "TESSERA_CACHE at one that can."
        ) from error


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


def publish_local(path: Path, data: bytes) -> None:
    """Write ``data`` to a local file so that a reader sees the old bytes or all of the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make a rename survive a power cut; some file systems refuse to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _FINAL_ERRNO
    name = type(error).__name__
    return name in {
        "ClientError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "EndpointConnectionError",
        "ConnectionClosedError",
        "ResponseParserError",
        "FSTimeoutError",
        "ClientConnectionError",
        "ServerDisconnectedError",
        "ClientPayloadError",
        "IncompleteRead",
    }


def _is_of_the_store(error: BaseException) -> bool:
    """Whether the libraries below raised it (no keys, a bucket's name that cannot be)."""
    return type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp"}


class Root:
    """The place where everything that must last is a record.

    Paths are relative to the root, with ``/`` between parts. Every method raises ``StoreError`` (or
    its child ``NotFoundError``) with a sentence that names the object and the store.
    """

    def __init__(self, url: str, *, attempts: int = 6, longest_wait_s: float = 20.0) -> None:
        """Open ``url``: a folder, ``s3://bucket/prefix``, or any other fsspec URL.

        ``attempts`` and ``longest_wait_s`` bound the retries of one call (exponential backoff with
        full jitter).
        """
        if url.startswith(("s3://", "s3a://")):
            # Some stores answer a ranged read with the whole object's checksum.
            os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        options: dict[str, Any] = {"use_listings_cache": False} if "://" in url else {}
        try:
            self.fs, base = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError, OSError) as error:
            raise InputError(
                f"The root {url!r} cannot be opened ({error}); give a folder or a URL such as "
                "s3://bucket/prefix in --root or TESSERA_ROOT."
            ) from error
        self.is_local = "file" in _protocols(self.fs)
        self.base = str(Path(base).absolute()) if self.is_local else base.rstrip("/")
        self.url = self.base if self.is_local else url.rstrip("/")
        if self.is_local and os.path.exists(self.base) and not os.path.isdir(self.base):
            raise InputError(
                f"The root {url!r} is a file; give a folder in --root or TESSERA_ROOT."
            )
        self._attempts = attempts
        self._longest_wait_s = longest_wait_s

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    # -- reading ---------------------------------------------------------------------------------

    def read_bytes(self, path: str) -> bytes:
        """The whole object."""
        data: bytes = self._call(path, lambda: self.fs.cat_file(self._full(path)))
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

        def look() -> bool:
            # Not fs.exists: for many stores it answers False to any error, a passing one included.
            try:
                self.fs.info(self._full(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

        return self._call(path, look)

    def files(self, prefix: str) -> list[str]:
        """All objects at or below the folder ``prefix``, sorted; empty if there is none."""

        def look() -> list[str]:
            try:
                if self.fs.async_impl:  # object stores list a whole prefix at once
                    return list(self.fs.find(self._full(prefix), withdirs=False))
                return list(self._walk(self._full(prefix)))
            except FileNotFoundError:
                return []

        found = (self._relative(name) for name in self._call(prefix, look))
        return sorted(name for name in found if _TEMPORARY not in name)

    def _walk(self, folder: str) -> Iterator[str]:
        """All files below ``folder``; fsspec's own walk takes a folder it cannot read for empty."""
        for info in self.fs.ls(folder, detail=True):
            if info["type"] != "directory":
                yield info["name"]
            elif info["name"] != folder:
                try:
                    yield from self._walk(info["name"])
                except FileNotFoundError:
                    pass  # removed since it was listed

    def children(self, prefix: str) -> list[str]:
        """Names of the direct children of the folder ``prefix``, sorted; empty if there is none."""

        def look() -> list[str]:
            try:
                return list(self.fs.ls(self._full(prefix), detail=False))
            except (FileNotFoundError, NotADirectoryError):
                return []

        names = (name.rstrip("/").rsplit("/", 1)[-1] for name in self._call(prefix, look))
        return sorted({name for name in names if name and not name.startswith(_TEMPORARY)})

    def local_path(self, path: str) -> Path | None:
        """Where an object lies if the root is a folder, so that it can be read in place."""
        return Path(self._full(path)) if self.is_local else None

    def size(self, path: str) -> int:
        """Bytes of an object."""
        return int(self._call(path, lambda: self.fs.info(self._full(path))["size"]))

    def get_file(self, path: str, local: Path, *, sha256: str | None = None) -> None:
        """Download ``path`` to ``local`` atomically, checking its digest if one is given."""
        require_writable(local.parent)
        temporary = local.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{local.name}")
        try:
            fetch = lambda: self.fs.get_file(self._full(path), str(temporary))  # noqa: E731
            self._call(path, fetch, written_to=str(local.parent))
            if sha256 is not None and (found := sha256_file(temporary)) != sha256:
                raise DamagedError(
                    f"{path} in {self.url} has sha256 {found[:12]}, expected {sha256[:12]}; the "
                    "object is damaged: restore it or build it again."
                )
            os.replace(temporary, local)
        finally:
            temporary.unlink(missing_ok=True)

    # -- writing ---------------------------------------------------------------------------------

    def publish(self, path: str, data: bytes) -> None:
        """Write or replace an object; a reader sees the old bytes or all of the new ones."""
        full = self._full(path)
        if self.is_local:
            self._call(path, lambda: publish_local(Path(full), data))
        else:
            self._call(path, lambda: self.fs.pipe_file(full, data))

    def publish_json(self, path: str, value: Any) -> None:
        """``publish`` of readable JSON (NaN and infinities are refused: they are not JSON)."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.publish(path, text.encode() + b"\n")

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist yet; False if it already did."""
        full = self._full(path)
        if self.is_local:
            return self._call(path, lambda: _create_local(Path(full), data))
        if self.exists(path):  # for the stores that ignore the condition below
            return False
        try:
            self._call(path, lambda: self.fs.pipe_file(full, data, mode="create"))
        except StoreError as error:
            if isinstance(error.__cause__, FileExistsError):
                # A retry of our own write that had arrived looks the same: compare the bytes.
                return self.read_bytes(path) == data
            raise
        return True

    def create_json(self, path: str, value: Any) -> bool:
        """``create`` of readable JSON."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return self.create(path, text.encode() + b"\n")

    def put_file(self, local: Path, path: str) -> None:
        """Upload a local file so that it appears whole or not at all."""
        full = self._full(path)
        if self.is_local:
            self._call(path, lambda: _copy_local(local, Path(full)))
        else:
            self._call(path, lambda: self.fs.put_file(str(local), full))

    def delete(self, path: str) -> None:
        """Remove one object; one that is gone already is no error."""

        def remove() -> None:
            try:
                self.fs.rm_file(self._full(path))
            except FileNotFoundError:
                pass

        self._call(path, remove)

    def delete_tree(self, prefix: str) -> None:
        """Remove every object below a folder, and on a local root the empty folder too."""
        for path in self.files(prefix):
            self.delete(path)

        def remove() -> None:
            try:
                shutil.rmtree(self._full(prefix))
            except FileNotFoundError:
                pass

        if self.is_local:
            self._call(prefix, remove)

    # -- inside ----------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise ConflictError(f"{path!r} is not a path below the root; give a relative one.")
        return f"{self.base}/{path}" if path else self.base

    def _relative(self, full: str) -> str:
        return full[len(self.base) :].lstrip("/") if full.startswith(self.base) else full

    def _call(self, path: str, action: Callable[[], T], *, written_to: str | None = None) -> T:
        """Run ``action`` with retries; turn what is left over into one sentence.

        ``written_to`` is where bytes go if not to the root.
        """
        try:
            for attempt in Retrying(
                stop=stop_after_attempt(self._attempts),
                wait=wait_random_exponential(multiplier=0.2, max=self._longest_wait_s),
                retry=retry_if_exception(_is_passing),
                reraise=True,
            ):
                with attempt:
                    return action()
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{path} is not in {self.url}; expected it there: check --root or TESSERA_ROOT."
            ) from error
        except PermissionError as error:
            raise StoreError(
                f"{self.url} refused access to {path} ({error}); check the keys and the bucket's "
                "permissions."
            ) from error
        except OSError as error:
            if error.errno in _FULL:
                raise StoreError(
                    f"No space is left for {path} in {written_to or self.url}; free some space and "
                    "start again."
                ) from error
            advice = "try again later" if _is_passing(error) else "use another folder or path"
            raise StoreError(f"{self.url} failed on {path}: {error}; {advice}.") from error
        except Exception as error:
            if not _is_passing(error) and not _is_of_the_store(error):
                raise
            text = " ".join(str(error).split())
            raise StoreError(
                f"{self.url} failed on {path}: {text}; check the keys and the bucket, or try again "
                "later."
            ) from error
        raise AssertionError("unreachable: a retry loop ends by returning or raising")


def _protocols(fs: Any) -> set[str]:
    protocol = fs.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


def _create_local(path: Path, data: bytes) -> bool:
    """Exclusive and atomic: a hard link of a finished temporary file fails if the name exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        publish_local(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync_directory(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _copy_local(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{target.name}")
    try:
        with source.open("rb") as reader, temporary.open("wb") as writer:
            for chunk in _chunks(reader):
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(target.parent)


def _chunks(reader: Any) -> Iterator[bytes]:
    while chunk := reader.read(CHUNK):
        yield chunk


def open_root(url: str | None = None) -> Root:
    """The root named by ``url``, else by ``TESSERA_ROOT``, else the folder ``.tessera``."""
    return Root(url or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)
