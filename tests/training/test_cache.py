"""The cache of shards: one download among processes, a limit that is kept, deaths and damage."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tessera.corpus.manifest import ShardEntry
from tessera.errors import DamagedError, InputError, StoreError, TesseraError
from tessera.storage import Root, sha256_file
from tessera.training import cache as cache_module
from tessera.training.cache import GIB, Held, NoRoomError, ShardCache

SIZE = 100_000

CHILD = """
import sys, threading
from pathlib import Path
from tessera.corpus.manifest import ShardEntry
from tessera.storage import Root
from tessera.training.cache import ShardCache

url, folder, limit, threads, entry = sys.argv[1:]
entry = ShardEntry.model_validate_json(entry)
cache, root = ShardCache(Path(folder), int(limit) or None), Root(url)
print("ready", flush=True)
sys.stdin.readline()
held = []
crowd = [threading.Thread(target=lambda: held.append(cache.fetch(root, entry)))
         for _ in range(int(threads))]
for thread in crowd: thread.start()
for thread in crowd: thread.join()
print(*(h.path.stat().st_ino for h in held), flush=True)
sys.stdin.readline()
"""


class Shop:
    """An HTTP server of shards in memory that counts, waits, and spoils what it sends."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.gets: list[str] = []
        self.half_way: Callable[[], None] = lambda: None
        self.spoil: Callable[[bytes], bytes] = lambda body: body
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/root"
        self.root = Root(self.url, attempts=2, longest_wait_s=0.05)

    def _handler(shop) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(b"")

            def do_GET(self) -> None:
                shop.gets.append(self.path.removeprefix("/root/"))
                body = shop.bodies[shop.gets[-1]]
                self.answer(shop.spoil(body))

            def answer(self, sent: bytes) -> None:
                length = len(shop.bodies[self.path.removeprefix("/root/")])
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                try:
                    self.wfile.write(sent[: length // 2])
                    self.wfile.flush()
                    shop.half_way()
                    self.wfile.write(sent[length // 2 :])
                except OSError:
                    pass  # whoever asked was killed

        return Handler

    def shard(self, name: str, size: int = SIZE) -> ShardEntry:
        """Put bytes on the shelf; the cache does not care what is in them."""
        body = random.Random(name).randbytes(size)
        path = f"corpora/c/{name}.safetensors"
        self.bodies[path] = body
        return entry_of(path, body)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def entry_of(path: str, body: bytes) -> ShardEntry:
    digest = hashlib.sha256(body).hexdigest()
    return ShardEntry(
        path=path, tokens=0, documents=0, bytes=len(body), text_bytes=0, sha256=digest
    )


@pytest.fixture
def shop() -> Iterator[Shop]:
    found = Shop()
    yield found
    found.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.safetensors")}


def on_disk(folder: Path) -> int:
    """Bytes of shards, whole or in part, while other threads come and go."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in (name for name in files if ".safetensors" in name):
            with suppress(FileNotFoundError):
                total += os.stat(f"{where}/{name}").st_size
    return total


def child(
    shop: Shop, folder: Path, entry: ShardEntry, *, limit: int = 0, threads: int = 1
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, shop.url, str(folder), str(limit), str(threads)]
    command.append(entry.model_dump_json())
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def sentence(error: pytest.ExceptionInfo[TesseraError]) -> str:
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- one download ----------------------------------------------------------------------------------


def test_processes_and_threads_share_one_download(shop: Shop, folder: Path) -> None:
    entry = shop.shard("a")
    shop.half_way = lambda: time.sleep(0.2)
    crowd = [child(shop, folder, entry, threads=3) for _ in range(2)]
    for process in crowd:
        assert line(process) == "ready"
    for process in crowd:
        go(process)
    inodes = {inode for process in crowd for inode in line(process).split()}
    assert inodes == {str((folder / f"{entry.sha256}.safetensors").stat().st_ino)}
    assert len(shop.gets) == 1
    for process in crowd:
        go(process)
        assert process.wait(10) == 0
    with ShardCache(folder).fetch(shop.root, entry) as held:  # a restart: everything is there
        assert held.path.read_bytes() == shop.bodies[entry.path]
    assert len(shop.gets) == 1
    assert os.listdir(folder / "incoming") == []


def test_a_lock_counts_only_while_its_file_has_the_name(shop: Shop, folder: Path) -> None:
    """Whoever ends a download removes its lock; who waited for that one waits for the next."""
    entry = shop.shard("a")
    name = folder / "incoming" / f"{entry.sha256}.lock"
    name.parent.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with name.open("w") as first:
            fcntl.flock(first, fcntl.LOCK_EX)
            waiting = pool.submit(ShardCache(folder).fetch, shop.root, entry)
            time.sleep(0.1)
            name.unlink()
            second = name.open("w")
            fcntl.flock(second, fcntl.LOCK_EX)
        time.sleep(0.2)
        assert shop.gets == []
        second.close()
        waiting.result(10).close()
    assert len(shop.gets) == 1


@pytest.mark.parametrize("next_is_the_same", [True, False])
def test_a_process_killed_in_a_download_leaves_nothing_in_the_way(
    shop: Shop, folder: Path, next_is_the_same: bool
) -> None:
    entry, other = shop.shard("a"), shop.shard("b")
    stuck = threading.Event()

    def wait() -> None:
        stuck.set()
        time.sleep(1.0)

    shop.half_way = wait
    process = child(shop, folder, entry, limit=SIZE)
    line(process)
    go(process)
    assert stuck.wait(10)
    until(lambda: any((folder / "incoming" / entry.sha256).iterdir()))
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert (folder / "incoming" / f"{entry.sha256}.lock").read_text() == str(SIZE)
    shop.half_way = lambda: None
    wanted = entry if next_is_the_same else other
    with ShardCache(folder, SIZE).fetch(shop.root, wanted, patience_s=0) as held:
        assert held.path.read_bytes() == shop.bodies[wanted.path]
    assert os.listdir(folder / "incoming") == []
    assert names(folder) == {wanted.sha256}


# -- the limit -------------------------------------------------------------------------------------


def test_the_least_recently_used_make_way_before_the_download(shop: Shop, folder: Path) -> None:
    a, b, c, d = (shop.shard(name) for name in "abcd")
    cache = ShardCache(folder, 3 * SIZE)
    seen: list[int] = []
    shop.half_way = lambda: seen.append(on_disk(folder))
    for entry in (a, b, c):
        cache.fetch(shop.root, entry).close()
    cache.fetch(shop.root, a).close()  # used again, and not read: its digest is known
    cache.fetch(shop.root, d).close()
    assert names(folder) == {a.sha256, c.sha256, d.sha256}
    cache.fetch(shop.root, b).close()
    assert names(folder) == {a.sha256, b.sha256, d.sha256}
    assert max(seen) <= 3 * SIZE
    ShardCache(folder, SIZE).fetch(shop.root, shop.shard("e")).close()
    assert len(names(folder)) == 1, "a lower limit takes effect with the next download"


def test_downloads_under_way_count(shop: Shop, folder: Path) -> None:
    """Eight shards at the same time through a cache of three: all arrive, none goes over."""
    entries = [shop.shard(str(number)) for number in range(8)]
    seen: list[int] = []

    def look() -> None:
        time.sleep(0.02)
        seen.append(on_disk(folder))

    shop.half_way = look

    def fetch(entry: ShardEntry) -> None:
        with ShardCache(folder, 3 * SIZE).fetch(shop.root, entry) as held:
            assert held.path.read_bytes() == shop.bodies[entry.path]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch, entries))
    assert len(shop.gets) == 8
    assert max(seen) <= 3 * SIZE
    assert len(names(folder)) <= 3


def test_what_a_process_holds_stays(shop: Shop, folder: Path) -> None:
    a, b = shop.shard("a"), shop.shard("b")
    holder = child(shop, folder, a, limit=SIZE)
    line(holder)
    go(holder)
    assert line(holder)
    cache = ShardCache(folder, SIZE)
    with pytest.raises(NoRoomError) as error:
        cache.fetch(shop.root, b, patience_s=0.2)
    text = sentence(error)
    assert "data.cache_gib" in text
    assert b.path in text
    assert shop.url in text
    assert names(folder) == {a.sha256}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.fetch, shop.root, b)
        time.sleep(0.1)
        assert not waiting.done()
        go(holder)  # it ends, and so does its hold
        waiting.result(10).close()
    assert names(folder) == {b.sha256}
    holder.wait(10)


def test_too_small_a_limit_is_said_before_anything_is_fetched(shop: Shop, folder: Path) -> None:
    entries = [shop.shard(name, size) for name, size in zip("abc", (1000, 3000, 2000), strict=True)]
    ShardCache(folder, 5000).require_room(entries, 2)
    ShardCache(folder, None).require_room(entries, 2)
    with pytest.raises(InputError, match=r"^data\.cache_gib is 4.66e-06, but .* at least 0.01"):
        ShardCache(folder, 4999).require_room(entries, 2)
    with pytest.raises(InputError, match=r"data\.cache_gib") as error:
        ShardCache(folder, 2999).fetch(shop.root, entries[1])
    sentence(error)
    assert shop.gets == []
    assert not folder.exists()
    assert GIB == 1 << 30


# -- damage ----------------------------------------------------------------------------------------


def test_a_damaged_shard_is_fetched_again_and_a_whole_one_is_read_once(
    shop: Shop, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = shop.shard("a"), shop.shard("b")
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(cache_module, "sha256_file", digest)
    cache = ShardCache(folder)
    for _ in range(2):
        for entry in (a, b):
            cache.fetch(shop.root, entry).close()
    assert read == [], "its digest was checked on arrival"
    path = folder / f"{a.sha256}.safetensors"
    body = bytearray(path.read_bytes())
    body[SIZE // 2] ^= 1
    path.write_bytes(body)
    later = ShardCache(folder)
    for _ in range(2):
        for entry in (a, b):
            with later.fetch(shop.root, entry) as held:
                assert held.path.read_bytes() == shop.bodies[entry.path]
    assert shop.gets == [a.path, b.path, a.path]
    assert [file.stem for file in read].count(b.sha256) == 1


def corrupt(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:]


@pytest.mark.parametrize(
    ("spoil", "kind"), [(corrupt, DamagedError), (lambda body: body[: SIZE // 2], StoreError)]
)
def test_a_store_that_stays_bad_is_one_sentence(
    shop: Shop, folder: Path, spoil: Callable[[bytes], bytes], kind: type[StoreError]
) -> None:
    entry = shop.shard("a")
    shop.spoil = spoil
    with pytest.raises(kind) as error:
        ShardCache(folder).fetch(shop.root, entry)
    text = sentence(error)
    assert entry.path in text
    assert shop.url in text
    assert names(folder) == set()
    assert os.listdir(folder / "incoming") == []


def test_a_folder_that_cannot_be_one_is_a_sentence(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="TESSERA_CACHE") as error:
        ShardCache(tmp_path / "file" / "shards").fetch(shop.root, shop.shard("a"))
    assert str(tmp_path / "file") in sentence(error)


# -- a full disk -----------------------------------------------------------------------------------


class FullRoot(Root):
    """Downloads to a disk of 300 kB, where this machine lets nobody mount one."""

    def get_file(self, path: str, local: Path, *, sha256: str | None = None) -> None:
        disk = local.parents[2].parent
        used = sum(file.stat().st_size for file in disk.rglob("*") if file.is_file())
        if used + SIZE > 300_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().get_file(path, local, sha256=sha256)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, type[Root]]]:
    """A disk of 300 kB, and what to download to it with."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tessera-test", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        yield disk, FullRoot
        return
    yield disk, Root
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_others_make_way_whatever_the_limit_says(
    shop: Shop, small_disk: tuple[Path, type[Root]]
) -> None:
    a, b, c = (shop.shard(name) for name in "abc")
    disk, root = small_disk[0], small_disk[1](shop.url)
    cache = ShardCache(disk / "shards", GIB)
    for entry in (a, b, c, a):
        with cache.fetch(root, entry) as held:
            assert held.path.read_bytes() == shop.bodies[entry.path]
    assert a.sha256 in names(disk / "shards")
    both = [cache.fetch(root, entry) for entry in (a, b)]
    (disk / "ballast").write_bytes(b"x" * 60_000)
    with pytest.raises(StoreError, match="No space is left") as error:
        cache.fetch(root, c)
    text = sentence(error)
    assert c.path in text
    assert shop.url in text
    assert {one.path.stem for one in both} <= names(disk / "shards")
    for one in both:
        one.close()


def test_where_no_large_file_can_be_written_the_sentence_says_so(shop: Shop, folder: Path) -> None:
    """The limit on a file's size stands in for a quota; nothing else can make way for that."""
    entry = shop.shard("a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))
    try:
        with pytest.raises(StoreError, match="No space is left") as error:
            ShardCache(folder).fetch(shop.root, entry)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entry.path in sentence(error)
    assert os.listdir(folder / "incoming") == []


def test_a_hold_ends_with_its_context(shop: Shop, folder: Path) -> None:
    held = ShardCache(folder).fetch(shop.root, shop.shard("a"))
    assert isinstance(held, Held)
    with held:
        assert not held.file.closed
    assert held.file.closed
