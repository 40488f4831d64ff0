"""What this machine remembers of a root, so that a thousand runs are not read a second time.

A SQLite file in the cache folder, one for each root. Nothing in it is a record: it can be deleted
at any moment and is made again, and one that is damaged or of another version is. Where the cache
folder cannot be written it lives in memory and is forgotten at the end.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tessera.storage import Root, cache_folder, sha256_bytes

FORMAT = 2
"""Raise it when the figures that are remembered, or how they are made, change."""
READERS = 16  # object stores answer slowly but many at once
_BUSY_S = 5.0
_TABLES = """
    CREATE TABLE IF NOT EXISTS runs
        (run_id TEXT PRIMARY KEY, stamp TEXT NOT NULL, verified REAL NOT NULL, body TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS objects
        (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, body BLOB NOT NULL);
"""
T = TypeVar("T")
Row = tuple[str, str, float, str]
"""Of ``runs``: run id, stamp, when that was last looked at (seconds since the epoch), body."""


class Memory:
    """One root's file; may be used by several threads at once, and by several processes."""

    def __init__(self, root: Root) -> None:
        self._lock = threading.Lock()
        self._connection = _open(_path(root))

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def runs(self) -> dict[str, Row]:
        """All rows of runs, by run id."""
        rows = self._ask(lambda c: c.execute("SELECT * FROM runs").fetchall())
        return {row[0]: row for row in rows or ()}

    def keep_runs(self, rows: Iterable[Row], gone: Iterable[str] = ()) -> None:
        """Write rows of runs, and forget those that are ``gone``."""
        kept, lost = list(rows), [(run_id,) for run_id in gone]
        if not kept and not lost:
            return

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", kept)
            connection.executemany("DELETE FROM runs WHERE run_id = ?", lost)

        self._ask(write)

    def object(self, path: str, stamp: str) -> bytes | None:
        """What was kept of the object ``path`` as it was when its stamp was ``stamp``."""
        query = "SELECT body FROM objects WHERE path = ? AND stamp = ?"
        rows = self._ask(lambda c: c.execute(query, (path, stamp)).fetchall())
        return bytes(rows[0][0]) if rows else None

    def objects(self, prefix: str) -> dict[str, tuple[str, bytes]]:
        """Stamp and bytes of everything kept below the folder ``prefix``, by path."""
        query = "SELECT path, stamp, body FROM objects WHERE path >= ? AND path < ?"
        bounds = (f"{prefix}/", f"{prefix}0")  # "0" is what follows "/"
        rows = self._ask(lambda c: c.execute(query, bounds).fetchall())
        return {path: (stamp, bytes(body)) for path, stamp, body in rows or ()}

    def keep_objects(
        self, rows: Sequence[tuple[str, str, bytes]], gone: Iterable[str] = ()
    ) -> None:
        """Keep paths, stamps and bytes, and forget what is ``gone``."""
        lost = [(path,) for path in gone]
        if not rows and not lost:
            return

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", rows)
            connection.executemany("DELETE FROM objects WHERE path = ?", lost)

        self._ask(write)

    def forget(self, prefix: str) -> None:
        """Forget every object below the folder ``prefix``."""
        bounds = (f"{prefix}/", f"{prefix}0")
        self._ask(lambda c: c.execute("DELETE FROM objects WHERE path >= ? AND path < ?", bounds))

    def contents(self, root: Root, folder: str) -> dict[str, bytes]:
        """Path and bytes of every object below ``folder``, of which only new ones are read."""
        stamps, known = root.stamps(folder), self.objects(folder)
        found = {
            path: known[path][1] for path in stamps if known.get(path, ("",))[0] == stamps[path]
        }
        fresh = [path for path in stamps if path not in found]
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(root.read_bytes, fresh))
        rows = [(path, stamps[path], data) for path, data in zip(fresh, read, strict=True)]
        self.keep_objects(rows, gone=known.keys() - stamps.keys())
        return found | dict(zip(fresh, read, strict=True))

    def _ask(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """The answer, or None where the file gives none: it only saves time."""
        with self._lock, suppress(sqlite3.Error), self._connection:
            return work(self._connection)
        return None


@contextmanager
def remembered(root: Root) -> Iterator[Memory]:
    """This machine's memory of ``root``, open for a while."""
    memory = Memory(root)
    try:
        yield memory
    finally:
        memory.close()


def forget(root: Root) -> None:
    """Delete what this machine remembers of ``root``."""
    for path in _path(root).parent.glob(f"{_path(root).name}*"):
        path.unlink(missing_ok=True)


def _path(root: Root) -> Path:
    where = root.url if root.is_local else f"{os.environ.get('AWS_ENDPOINT_URL', '')} {root.url}"
    # Of another format is another file, so that an older process cannot write into a newer's.
    name = f"{sha256_bytes(where.encode())[:24]}-{FORMAT}.sqlite"
    return cache_folder() / "index" / name


def _open(path: Path) -> sqlite3.Connection:
    for last in (False, True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
            try:
                return _prepared(connection)
            except sqlite3.OperationalError:  # busy, or nothing can be written
                connection.close()
                break
            except sqlite3.DatabaseError:
                connection.close()
                if last:
                    break
                path.unlink(missing_ok=True)
        except (OSError, sqlite3.Error):
            break
    return _prepared(sqlite3.connect(":memory:", check_same_thread=False))


def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
    with connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != FORMAT:
            for table in ("runs", "objects"):
                connection.execute(f"DROP TABLE IF EXISTS {table}")
        connection.execute("PRAGMA synchronous = OFF")
        connection.executescript(_TABLES)
        if version != FORMAT:
            connection.execute(f"PRAGMA user_version = {FORMAT}")
    return connection
