"""Shards of a remote root on this machine's disk: shared by its processes, within a limit.

    <digest>.safetensors      a whole shard, named by its sha256
    incoming/<digest>.lock    locked while one process fetches that shard; says how large it will be
    incoming/<digest>/        what that process has of it so far
    space.lock                locked for the moment in which room is counted and made

Every lock is an flock, which the kernel frees when its process ends, however it ends. So a killed
process leaves no lock behind, and the next one to count the room removes what it had fetched.

* One download a shard, among all threads and processes: the others wait for its lock.
* Whoever maps a shard *holds* it with a shared lock on the file itself. Room is made by removing
  the least recently used shards that nobody holds; it is made before a download begins and counts
  the downloads under way, so the limit is kept at every moment.
* "Used" is the time of the last access (atime), set by hand on every fetch, so that the time of
  change still tells whether the bytes are the ones that were checked.

A shard's digest is checked when it arrives, and once in each later process, at its first use: a
power cut or a failing disk may have damaged it since. A damaged one is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tessera.corpus.manifest import ShardEntry
from tessera.errors import InputError, StoreError, TesseraError
from tessera.storage import Root, require_writable, sha256_file

GIB = 1 << 30
PATIENCE_S = 60.0  # how long a shard that is needed waits for others to let go of theirs
_POLL_S = 0.1
_SUFFIX = ".safetensors"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NoRoomError(StoreError):
    """Everything in the cache is in use, so nothing can make way."""


@dataclass(frozen=True)
class Held:
    """A shard that stays where it is until ``close``; also a context manager."""

    path: Path
    file: BinaryIO
    """Carries the shared lock."""

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let it go."""
        self.file.close()


class Checked:
    """Remembers which files have the right digest, so that a process reads each once for it.

    A file is the same one while its inode, size and time of change are.
    """

    def __init__(self) -> None:
        self._right: set[tuple[object, ...]] = set()

    def passes(self, path: Path, sha256: str) -> bool:
        """Whether ``path`` can be read and has that digest."""
        try:
            key = self._key(path, sha256)
            if key not in self._right and sha256_file(path) == sha256:
                self._right.add(key)
        except OSError:
            return False
        return key in self._right

    def note(self, path: Path, sha256: str) -> None:
        """The digest of ``path`` was checked elsewhere."""
        self._right.add(self._key(path, sha256))

    @staticmethod
    def _key(path: Path, sha256: str) -> tuple[object, ...]:
        found = path.stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, sha256


class ShardCache:
    """See the head of this module. Safe to share among threads; nothing is touched until a fetch.

    A lower limit than before takes effect with the next download.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        """``limit_bytes`` bounds the shards and the downloads under way together; None: nothing."""
        self.folder, self.limit_bytes = folder, limit_bytes
        self._incoming = folder / "incoming"
        self._checked = Checked()

    def require_room(self, entries: Sequence[ShardEntry], at_once: int) -> None:
        """Raise ``InputError`` unless any ``at_once`` of ``entries`` fit together."""
        needed = sum(sorted(entry.bytes for entry in entries)[-at_once:])
        if self.limit_bytes is not None and needed > self.limit_bytes:
            raise InputError(
                f"data.cache_gib is {self.limit_bytes / GIB:.3g}, but the shards that are read at "
                f"the same time (up to {at_once}) take {_gib_up(needed)} GiB; set it to at least "
                f"{_gib_up(needed)}, better {_gib_up(2 * needed)} so that the next ones can be "
                "fetched ahead."
            )

    def fetch(self, root: Root, entry: ShardEntry, *, patience_s: float = PATIENCE_S) -> Held:
        """The shard on this disk, downloaded if it is not there, and held until it is closed.

        Blocks while another process downloads it, and up to ``patience_s`` while everything else in
        the cache is in use. Raises ``InputError`` (the shard is larger than the limit, or the
        folder cannot be used), ``NoRoomError``, and what ``Root.get_file`` raises.
        """
        self.require_room([entry], 1)
        while True:
            try:
                return self._fetch(root, entry, patience_s)
            except (TesseraError, OSError) as error:
                if not _is_full(error):
                    raise
                # The disk is fuller than the limit assumes: others make way while there are any.
                if not self._evict(entry.bytes):
                    raise StoreError(
                        f"No space is left in {self.folder} for the shard {entry.path} of "
                        f"{root.url}; free some, or point TESSERA_CACHE at a larger disk."
                    ) from error

    def _fetch(self, root: Root, entry: ShardEntry, patience_s: float) -> Held:
        path = self.folder / f"{entry.sha256}{_SUFFIX}"
        if held := self._present(path, entry):
            return held
        require_writable(self._incoming)
        name = self._incoming / f"{entry.sha256}.lock"
        with _wait_for(name):
            try:
                name.write_text("")  # a killed process may have left its own figure
                # Another process may have fetched it while this one waited for the lock.
                return self._present(path, entry) or self._download(root, entry, path, patience_s)
            finally:
                name.unlink(missing_ok=True)

    def _present(self, path: Path, entry: ShardEntry) -> Held | None:
        """The shard if it is here and whole, marked as used just now."""
        if (file := _lock(path, fcntl.LOCK_SH)) is None:
            return None
        if not self._checked.passes(path, entry.sha256):
            file.close()
            return None
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except OSError:
            pass  # another user's file: it keeps its age
        return Held(path, file)

    def _download(self, root: Root, entry: ShardEntry, path: Path, patience_s: float) -> Held:
        """Fetch it; its download lock is held. The digest is checked by ``Root.get_file``."""
        path.unlink(missing_ok=True)  # it is damaged, or it would have been present
        folder = self._incoming / entry.sha256
        shutil.rmtree(folder, ignore_errors=True)
        deadline = time.monotonic() + patience_s
        while not self._reserve(entry):
            if time.monotonic() >= deadline:
                raise NoRoomError(
                    f"The shard cache {self.folder} has no room for {entry.path} of {root.url}, "
                    f"because all of its {(self.limit_bytes or 0) / GIB:.3g} GiB are in use; raise "
                    "data.cache_gib or wait for the other runs of this machine."
                )
            time.sleep(_POLL_S)
        arrived = folder / path.name
        try:
            root.get_file(entry.path, arrived, sha256=entry.sha256)
            # Locked before it gets its name: nobody can remove it in between.
            file = _lock(arrived, fcntl.LOCK_SH)
            assert file is not None, "only this process knows the file"
            with self._space():  # from here on it counts as a shard and no more as a download
                os.replace(arrived, path)
                self._note_download(entry, 0)
            self._checked.note(path, entry.sha256)
            return Held(path, file)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # -- room --------------------------------------------------------------------------------------

    def _reserve(self, entry: ShardEntry) -> bool:
        """Make room for ``entry`` and note it in its lock file; False if too much is in use."""
        with self._space():
            used = self._under_way() + sum(size for _, size in self._oldest_first())
            if self.limit_bytes is not None:
                surplus = used + entry.bytes - self.limit_bytes
                if surplus > 0 and self._drop_oldest(surplus) < surplus:
                    return False
            self._note_download(entry, entry.bytes)
        return True

    def _note_download(self, entry: ShardEntry, size: int) -> None:
        (self._incoming / f"{entry.sha256}.lock").write_text(str(size))

    def _evict(self, size: int) -> bool:
        """Remove shards of about ``size`` bytes; False if there was none to remove."""
        with self._space():
            return self._drop_oldest(size) > 0

    def _space(self) -> BinaryIO:
        return _wait_for(self.folder / "space.lock")

    def _under_way(self) -> int:
        """Bytes that downloads in progress will take; those of killed processes are removed."""
        total = 0
        for name in self._incoming.glob("*.lock"):
            dead = _lock(name, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if dead is None:
                total += _reserved(name)
                continue
            with dead:
                shutil.rmtree(name.with_suffix(""), ignore_errors=True)
                name.unlink(missing_ok=True)
        return total

    def _drop_oldest(self, size: int) -> int:
        """Remove the longest unused shards that nobody holds until ``size`` bytes are free."""
        freed = 0
        for path, found in self._oldest_first():
            if freed >= size:
                break
            if file := _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                with file:
                    path.unlink(missing_ok=True)
                freed += found
        return freed

    def _oldest_first(self) -> Iterator[tuple[Path, int]]:
        """Whole shards and their bytes, the least recently used first."""
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # found damaged by another process, which fetches it again
            found.append((status.st_atime_ns, path, status.st_size))
        return ((path, size) for _, path, size in sorted(found))


def _wait_for(path: Path) -> BinaryIO:
    """``path``, created if need be, once nobody else has it locked."""
    file = _lock(path, fcntl.LOCK_EX, create=True)
    assert file is not None, "a blocking lock on a file that is created if it is missing"
    return file


def _lock(path: Path, how: int, *, create: bool = False) -> BinaryIO | None:
    """``path``, opened and locked; None if it is missing, or, with ``LOCK_NB``, if it is locked.

    The lock belongs to the file that has the name now, not to one that was removed or replaced
    while this process waited.
    """
    flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    while True:
        file: BinaryIO | None = None
        try:
            file = os.fdopen(os.open(path, flags, 0o666), "rb")
            fcntl.flock(file, how)
            mine, named = os.fstat(file.fileno()), path.stat()
            if (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino):
                return file
        except BlockingIOError:
            _close(file)
            return None
        except FileNotFoundError:
            if file is None and not create:
                return None
        except OSError as error:
            _close(file)
            raise InputError(
                f"The folder {path.parent} cannot keep a cache of shards ({error.strerror or error}"
                "); point TESSERA_CACHE at a local disk that can be written."
            ) from error
        _close(file)


def _close(file: BinaryIO | None) -> None:
    if file is not None:
        file.close()


def _reserved(lock: Path) -> int:
    """The bytes noted in a lock file; 0 while its process has not got room yet, or no more."""
    try:
        return int(lock.read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def _is_full(error: BaseException | None) -> bool:
    """Whether a disk without space is what ``error`` is about, at any depth."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


def _gib_up(size: int) -> str:
    return f"{math.ceil(size / GIB * 100) / 100:g}"
