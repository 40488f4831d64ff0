"""The journal: an append-only list of typed records that the training loop never waits for.

A record costs the loop one ``json.dumps`` and one write to a local file. A thread uploads the
open segment under its own key every ``upload_every_s`` (which is the attempt's heartbeat too) and
closes it at 4 MB; each upload replaces the whole segment, so a torn or repeated one cannot exist.
``flush`` blocks until everything written so far is in the root: a checkpoint calls it before
``COMPLETE``, so what a complete checkpoint covers is always recorded.

In a store the open segment has a twin, and uploads go to the two in turn. A store that does not
look at Content-MD5 takes bytes that were damaged on their way; that is noticed by the ETag and
mended at once, but not by a process that is killed in between: then the upload before is there.

Nothing here raises into the loop. If the local disk is full the segment lives in memory; if the
root does not answer, the records wait and the next upload carries them. A process that is killed
leaves its local segments behind, and the next attempt of the run on that machine uploads them
(``adopt``), so even the last half minute is not lost there.

The records and how they are read back: ``tessera.tracking.records``.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from tessera.errors import InputError, TesseraError
from tessera.runs import Run
from tessera.storage import Root, cache_folder, sha256_bytes
from tessera.tracking.records import Kind, segment_path

HEARTBEAT = "heartbeat"
SEGMENT_BYTES = 4 << 20
UPLOAD_EVERY_S = 30.0
HEARTBEAT_VARIABLE = "TESSERA_HEARTBEAT_S"


def heartbeat_s(environ: Mapping[str, str] = os.environ) -> float:
    """Seconds between uploads of the open segment: ``TESSERA_HEARTBEAT_S``, else 30."""
    text = environ.get(HEARTBEAT_VARIABLE)
    if not text:
        return UPLOAD_EVERY_S
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.05 <= value <= 3600:
        raise InputError(
            f"{HEARTBEAT_VARIABLE} is {text!r}; expected seconds between two uploads of the "
            "journal, from 0.05 to 3600."
        )
    return value


def _spool_folder(root: Root, run_id: str) -> Path:
    # Two roots may hold runs of the same id; the spool of one must not be adopted by the other.
    place = sha256_bytes(root.url.encode())[:16]
    return cache_folder() / "journal" / place / run_id


class Journal:
    """The writer of one attempt. Use ``flush`` before a publication and ``close`` at the end."""

    def __init__(self, run: Run, attempt: str, *, upload_every_s: float | None = None) -> None:
        """``upload_every_s``: seconds between uploads, else ``TESSERA_HEARTBEAT_S``, else 30."""
        self._run, self.attempt = run, attempt
        self._seq = 0
        self._segment = 0
        self._lines: list[bytes] = []
        self._size = 0
        self._uploaded = 0
        self._to_twin = self._has_twin = False
        self._closed_segments: list[tuple[int, bytes]] = []
        self._last_time = 0.0
        self.last_error: str | None = None
        self._append_lock = threading.Lock()
        self._upload_lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._upload_every_s = upload_every_s or heartbeat_s()
        self._spool = _spool_folder(run.root, run.id) / attempt
        self._lock_file = self._claim_spool()
        self._file: IO[bytes] | None = None
        self._open_spool_file()
        self._thread = threading.Thread(target=self._keep_uploading, name="journal", daemon=True)
        self._thread.start()

    @property
    def written(self) -> int:
        """How many records were written so far (the ``seq`` of the last one)."""
        with self._append_lock:
            return self._seq

    # -- the loop's side: microseconds, no exception -----------------------------------------------

    def metric(self, key: str, value: float, step: int) -> None:
        """A number over steps."""
        self._append("metric", key, _spell(float(value)), step)

    def param(self, key: str, value: str) -> None:
        """A setting that never changes within the run."""
        self._append("param", key, value, 0)

    def tag(self, key: str, value: str, step: int = 0) -> None:
        """A fact that may differ between attempts; the latest one counts."""
        self._append("tag", key, value, step)

    def event(self, key: str, step: int, **details: Any) -> None:
        """Something that happened."""
        self._append("event", key, details, step)

    def span(self, category: str, seconds: float, step: int) -> None:
        """Seconds of the ledger's ``category`` spent up to ``step``."""
        self._append("span", category, _spell(float(seconds)), step)

    def _append(self, kind: Kind, key: str, value: Any, step: int) -> None:
        now = time.time()
        with self._append_lock:
            self._seq += 1
            self._last_time = now
            line = {"kind": kind, "key": key, "value": value, "step": int(step)}
            line |= {"time": round(now, 4), "attempt": self.attempt, "seq": self._seq}
            try:
                text = json.dumps(line, separators=(",", ":"), allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                # An event's odd detail is worth less than the loop.
                line["value"] = _plain(value)
                text = json.dumps(line, separators=(",", ":"), allow_nan=False)
            data = text.encode() + b"\n"
            self._lines.append(data)
            self._size += len(data)
            if self._file is not None:
                try:
                    self._file.write(data)
                    self._file.flush()
                except OSError as error:
                    self.last_error = f"the local journal cannot be written ({error})"
                    self._drop_spool_file()  # the lines stay in memory until they are in the root
            if self._size >= SEGMENT_BYTES:
                self._closed_segments.append((self._segment, b"".join(self._lines)))
                self._segment += 1
                self._lines, self._size, self._uploaded = [], 0, 0
                if self._file is not None:  # behind a gap, what `adopt` finds would be damage
                    self._open_spool_file()

    # -- the root's side -------------------------------------------------------------------------

    def flush(self) -> None:
        """Block until every record written so far is in the root; raises ``StoreError`` if not."""
        self._upload()

    def flush_within(self, seconds: float) -> bool:
        """``flush``, but no longer than that; whether it got there. A failing root is no error."""
        done = threading.Event()

        def upload() -> None:
            try:
                self._upload()
                done.set()
            except Exception as error:
                self.last_error = str(error)

        thread = threading.Thread(target=upload, name="journal-flush", daemon=True)
        thread.start()
        thread.join(seconds)
        return done.is_set()

    def close(self, *, quiet: bool = False) -> None:
        """Upload what is left and stop. With ``quiet`` a failing root is not an error."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        try:
            self._upload(final=True)
        except TesseraError:
            if not quiet:
                raise
            return  # the spool stays for the next attempt on this machine
        finally:
            with self._append_lock:  # a record that comes after this stays in memory
                self._drop_spool_file()
            if self._lock_file is not None:
                self._lock_file.close()
        _remove_spool(self._spool)

    def _keep_uploading(self) -> None:
        while not self._wake.wait(self._upload_every_s):
            if self._stopping:
                return
            if time.time() - self._last_time > self._upload_every_s / 2:
                self._append("event", HEARTBEAT, {}, -1)
            try:
                self._upload()
                self.last_error = None
            except Exception as error:
                self.last_error = str(error)

    def _upload(self, *, final: bool = False) -> None:
        """Publish closed segments and the open one; the lock makes uploads one at a time."""
        with self._upload_lock:
            while True:
                with self._append_lock:
                    if not self._closed_segments:
                        number, data, closed = self._segment, b"".join(self._lines), final
                        fresh = len(data) > self._uploaded or (final and self._has_twin)
                    else:
                        (number, data), closed, fresh = self._closed_segments[0], True, True
                if fresh:
                    self._publish(number, data, closed)
                with self._append_lock:
                    if not self._closed_segments:
                        if number == self._segment:
                            self._uploaded = len(data)
                        return
                    if closed and self._closed_segments[0][0] == number:
                        self._closed_segments.pop(0)

    def _publish(self, number: int, data: bytes, closed: bool) -> None:
        """A closed segment ends under its own key alone; of an open one a store has two copies.

        The newest good copy is never the one that is written over: uploads take turns, and what
        closes a segment goes to the twin first if its own key holds the newest.
        """
        root = self._run.root
        own, twin = (segment_path(self._run, self.attempt, number, twin=t) for t in (False, True))
        if root.is_local:
            root.publish(own, data)
        elif not closed and self._has_twin:
            root.publish(twin if self._to_twin else own, data)
            self._to_twin = not self._to_twin
        elif not closed:
            root.publish(own, data)
            root.publish(twin, data)
            self._has_twin = True
        else:
            if self._to_twin:
                root.publish(twin, data)
                self._to_twin = False
            root.publish(own, data)
            if self._has_twin:
                with suppress(TesseraError):  # it says nothing that the segment does not say
                    root.delete(twin)
                self._has_twin = False

    def _claim_spool(self) -> IO[bytes] | None:
        try:
            self._spool.mkdir(parents=True, exist_ok=True)
            return _lock(self._spool, "wb")
        except OSError as error:
            self.last_error = f"the local journal cannot be written ({error})"
            return None

    def _drop_spool_file(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:
            pass  # what it could not write it cannot write now either

    def _open_spool_file(self) -> None:
        self._drop_spool_file()
        if self._lock_file is None:
            return
        try:
            self._file = (self._spool / f"{self._segment:06d}.jsonl").open("wb")
        except OSError as error:
            self.last_error = f"the local journal cannot be written ({error})"


def adopt(run: Run) -> list[str]:
    """Upload what dead attempts of ``run`` left on this machine; returns their ids.

    An attempt that is alive holds a lock on its folder and is passed over.
    """
    folder = _spool_folder(run.root, run.id)
    adopted = []
    for spool in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            lock = _lock(spool, "rb+")
        except OSError:
            continue
        with lock:
            for file in sorted(spool.glob("*.jsonl")):
                data = file.read_bytes()
                data = data[: data.rfind(b"\n") + 1]  # the last line may be torn
                paths = [
                    segment_path(run, spool.name, int(file.stem), twin=twin)
                    for twin in (False, True)
                ]
                there = [run.root.read_bytes(path) for path in paths if run.root.exists(path)]
                longest = max((len(known) for known in there), default=0)
                if data and data not in there and len(data) >= longest:
                    run.root.publish(paths[0], data)
        _remove_spool(spool)
        adopted.append(spool.name)
    return adopted


def alive_here(run: Run) -> list[str]:
    """Attempts of ``run`` whose process lives on this machine: they hold their spool's lock."""
    folder = _spool_folder(run.root, run.id)
    living = []
    for spool in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            _lock(spool, "rb+").close()
        except BlockingIOError:
            living.append(spool.name)
        except OSError:
            pass  # never locked, or gone in the meantime
    return living


def _lock(spool: Path, mode: Literal["wb", "rb+"]) -> IO[bytes]:
    """The lock of an attempt's folder, held while it is open; ``OSError`` if another holds it."""
    file = (spool / "lock").open(mode)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _remove_spool(spool: Path) -> None:
    for file in spool.glob("*"):
        file.unlink(missing_ok=True)
    try:
        spool.rmdir()
    except OSError:
        pass


def _spell(number: float) -> float | str:
    if math.isfinite(number):
        return number
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def _plain(value: Any, depth: int = 8) -> Any:
    """What JSON can say of ``value``: numbers that are not finite by name, the rest by ``repr``."""
    if isinstance(value, float):
        return _spell(value)
    if value is None or isinstance(value, str | int):
        return value
    if depth and isinstance(value, dict):
        return {str(key): _plain(part, depth - 1) for key, part in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_plain(part, depth - 1) for part in value]
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
