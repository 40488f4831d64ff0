"""Files of this machine: published atomically, created exclusively, linked where that saves a copy.

A reader sees the old bytes or all of the new ones, whatever dies: bytes go to a temporary file in
the same directory, ``fsync``, then ``os.replace``.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tessera.errors import InputError
from tessera.storage.digests import CHUNK

TEMPORARY = ".partial-"
_NO_LINK = {
    errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP,
    errno.ENOSYS, errno.EINVAL,
}  # fmt: skip


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
        with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY):
            pass
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be written ({error.strerror or error}); point "
            "TESSERA_CACHE at one that can."
        ) from error


class StandingFolder:
    """The folder of a root: its first write makes it, and once it was there no write does so again.

    A disk that is unmounted takes the folder away for a while. An empty one in its place would
    swallow what a run still writes, and be in the way when the disk comes back. Another process
    that finds nothing may begin a new root there: it has seen no other.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = os.path.isdir(path)

    def make(self, folder: Path) -> None:
        """Make ``folder``, in the root or the root itself; ``OSError`` if that was there once."""
        if not self._seen:
            folder.mkdir(parents=True, exist_ok=True)
            self._seen = True
        elif folder == self._path:
            self._require()
        else:
            try:
                folder.mkdir(exist_ok=True)
            except FileNotFoundError:
                self.make(folder.parent)  # ends at the root, which is not made: no look before
                folder.mkdir(exist_ok=True)  # that something could come between

    @contextmanager
    def standing(self) -> Iterator[None]:
        """What goes missing in this block because the root does is an ``OSError`` that may pass."""
        try:
            yield
        except FileNotFoundError:
            if self._seen:
                self._require()
            raise

    def _require(self) -> None:
        if not os.path.isdir(self._path):
            # Without an errno it is a fault like that of a store that is down: worth another try.
            raise OSError("the folder was there and is gone, as if its disk had been unmounted")


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name in the same directory that no listing shows; whatever is left there is removed."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def publish_local(path: Path, data: bytes, root: StandingFolder | None = None) -> None:
    """Write ``data`` to a local file so that a reader sees the old bytes or all of the new ones."""
    with _folder_for(path, root):
        with temporary_beside(path) as temporary:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync_directory(path.parent)


def create_local(path: Path, data: bytes, root: StandingFolder | None = None) -> bool:
    """Exclusive and atomic: a hard link of a finished temporary file fails if the name exists."""
    with _folder_for(path, root), temporary_beside(path) as temporary:
        publish_local(temporary, data, root)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        _sync_directory(path.parent)
    return True


def copy_local(
    source: Path,
    target: Path,
    *,
    link: bool,
    on_bytes: Callable[[int], None] | None = None,
    root: StandingFolder | None = None,
) -> None:
    """Publish a copy of ``source``; with ``link``, the same file under a second name if possible.

    ``on_bytes`` hears how many bytes each step added.
    """
    with _folder_for(target, root):
        with temporary_beside(target) as temporary:
            if link and _link(source, temporary):
                if on_bytes:
                    on_bytes(source.stat().st_size)
            else:
                _copy(source, temporary, on_bytes)
            # Of two names of one file, this removes none: the temporary one goes with its block.
            os.replace(temporary, target)
        _sync_directory(target.parent)


@contextmanager
def _folder_for(path: Path, root: StandingFolder | None) -> Iterator[None]:
    """A block that writes ``path``, its folder made; inside of ``root``, if that may be made."""
    if root is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    else:
        with root.standing():
            root.make(path.parent)
            yield


def _link(source: Path, target: Path) -> bool:
    """Give ``source`` a second name, its bytes safely on the disk; False if that cannot be."""
    try:
        os.link(source.resolve(strict=True), target)  # resolved: never a link to a symlink
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return True


def _copy(source: Path, target: Path, on_bytes: Callable[[int], None] | None) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            if on_bytes:
                on_bytes(len(chunk))
        writer.flush()
        os.fsync(writer.fileno())


def _sync_directory(path: Path) -> None:
    """Make a rename survive a power cut; some file systems refuse to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
