from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tessera.errors import StoreError
from tessera.storage import Root
from tests.storage.helpers import on_disk, sentence


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# -- whatever dies ---------------------------------------------------------------------------------

_PUBLISH_FOR_EVER = """
import sys, itertools
from pathlib import Path
from tessera.storage import Root
root, size = Root(sys.argv[1]), int(sys.argv[2])
local = Path(sys.argv[1] + ".upload")
print("started", flush=True)
for number in itertools.count():
    letter = b"ab"[number % 2:][:1]
    root.publish("published.bin", letter * size)
    local.write_bytes(letter * size)
    root.put_file(local, "put.bin")
    root.create(f"created/{number % 1000}", letter * 10_000)
"""


@pytest.mark.parametrize("round_", range(4))
def test_a_kill_leaves_old_or_new_bytes_and_nothing_partial(folder: Root, round_: int) -> None:
    size = 2_000_000
    folder.publish("published.bin", b"a" * size)
    folder.publish("put.bin", b"a" * size)
    process = python(_PUBLISH_FOR_EVER, folder.base, str(size))
    try:
        assert process.stdout is not None
        process.stdout.readline()
        until = time.monotonic() + random.Random(round_).uniform(0.05, 0.4)
        while time.monotonic() < until:  # a reader at the same time sees whole objects too
            data = folder.read_bytes(random.choice(["published.bin", "put.bin"]))
            assert len(data) == size
            assert len(set(data)) == 1
    finally:
        process.kill()
        process.communicate()
    for name in ("published.bin", "put.bin"):
        data = folder.read_bytes(name)
        assert len(data) == size
        assert len(set(data)) == 1
    created = folder.files("created")
    assert all(len(folder.read_bytes(path)) == 10_000 for path in created)
    assert folder.files("") == sorted([*created, "published.bin", "put.bin"])
    assert set(folder.children("")) <= {"created", "published.bin", "put.bin"}


def test_what_a_kill_left_behind_is_not_listed_and_goes_with_the_tree(folder: Root) -> None:
    folder.publish("checkpoints/step-1/a.bin", b"x")
    left = Path(folder.base) / "checkpoints" / "step-1" / ".partial-12345678-b.bin"
    left.write_bytes(b"half")
    assert folder.files("checkpoints") == ["checkpoints/step-1/a.bin"]
    assert folder.children("checkpoints/step-1") == ["a.bin"]
    folder.delete_tree("checkpoints/step-1")
    assert on_disk(folder) == []


_RACE = """
import sys
from tessera.storage import Root
root, me = Root(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
print(",".join(str(n) for n in range(40) if root.create(f"race/{n}.json", me.encode())))
"""


def test_of_eight_processes_that_create_exactly_one_wins(folder: Root) -> None:
    racers = [python(_RACE, folder.base, str(number)) for number in range(8)]
    for racer in racers:
        assert racer.stdout is not None
        racer.stdout.readline()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    winners: dict[str, list[str]] = {str(n): [] for n in range(40)}
    for number, racer in enumerate(racers):
        out, _ = racer.communicate(timeout=60)
        for won in filter(None, out.strip().split(",")):
            winners[won].append(str(number))
    assert all(len(names) == 1 for names in winners.values())
    for n, names in winners.items():
        assert folder.read_bytes(f"race/{n}.json").decode() == names[0]
    assert len(on_disk(folder)) == 40


# -- a full disk -----------------------------------------------------------------------------------


def _writes(root: Root, local: Path) -> dict[str, Callable[[], object]]:
    return {
        "publish": lambda: root.publish("a.bin", b"new" * 100_000),
        "put_file": lambda: root.put_file(local, "a.bin"),
        "create": lambda: root.create("b.bin", b"new" * 100_000),
    }


@pytest.mark.parametrize("write", ["publish", "put_file", "create"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence_and_keeps_the_old_bytes(
    folder: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, number: int
) -> None:
    folder.publish("a.bin", b"old")
    (tmp_path / "local.bin").write_bytes(b"new" * 100_000)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError) as error:
        _writes(folder, tmp_path / "local.bin")[write]()
    assert "No space is left" in sentence(error)
    assert folder.base in sentence(error)
    assert len(calls) == 1, "a full disk does not empty itself in a moment"
    assert folder.read_bytes("a.bin") == b"old"
    assert on_disk(folder) == ["a.bin"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses to let a file grow past 64 KiB, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", ["publish", "put_file", "create"])
def test_a_write_that_the_kernel_cuts_off_leaves_nothing(
    folder: Root, tmp_path: Path, request: pytest.FixtureRequest, write: str
) -> None:
    folder.publish("a.bin", b"old")
    (tmp_path / "local.bin").write_bytes(b"new" * 100_000)
    request.getfixturevalue("small_files")
    with pytest.raises(StoreError) as error:
        _writes(folder, tmp_path / "local.bin")[write]()
    assert "No space is left" in sentence(error)
    assert folder.read_bytes("a.bin") == b"old"
    assert on_disk(folder) == ["a.bin"]


def test_a_download_that_does_not_fit_names_the_local_folder(
    root: Root, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root.publish("a.bin", b"x" * 300_000)
    request.getfixturevalue("small_files")
    with pytest.raises(StoreError) as error:
        root.get_file("a.bin", tmp_path / "cache" / "a.bin")
    assert f"No space is left for a.bin in {tmp_path / 'cache'}" in sentence(error)
    assert os.listdir(tmp_path / "cache") == []


# -- links -----------------------------------------------------------------------------------------


def test_a_file_is_linked_where_that_was_promised_to_be_safe(folder: Root, tmp_path: Path) -> None:
    local, stored = tmp_path / "local.bin", Path(folder.base, "a", "b.bin")
    local.write_bytes(b"x" * 1000)
    heard: list[int] = []
    folder.put_file(local, "a/b.bin", link=True, on_bytes=heard.append)
    assert os.path.samefile(local, stored)
    assert heard == [1000]
    folder.put_file(local, "a/b.bin", link=True)  # of one file, under the name that it has
    assert on_disk(folder) == ["a/b.bin"]
    folder.put_file(local, "a/b.bin")
    assert not os.path.samefile(local, stored)
    folder.put_file(local, "a/b.bin", link=True)
    folder.publish("a/b.bin", b"new")  # replaces the name, not the bytes of the caller's file
    assert local.read_bytes() == b"x" * 1000
    assert on_disk(folder) == ["a/b.bin"]


def test_a_link_to_a_symlink_is_one_to_its_file(folder: Root, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "symlink").symlink_to("real")
    folder.put_file(tmp_path / "symlink", "a", link=True)
    assert not Path(folder.base, "a").is_symlink()
    assert folder.read_bytes("a") == b"x"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_no_link_can_be_the_file_is_copied(
    folder: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "local").write_bytes(b"x")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    folder.put_file(tmp_path / "local", "a", link=True)
    assert folder.read_bytes("a") == b"x"
    assert not os.path.samefile(tmp_path / "local", Path(folder.base, "a"))
    assert on_disk(folder) == ["a"]


def test_another_file_system_gets_a_copy(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        return  # a machine with one file system: the test above tells as much
    with tempfile.TemporaryDirectory(dir=shared) as other:
        (tmp_path / "local").write_bytes(b"x")
        root = Root(other)
        root.put_file(tmp_path / "local", "a", link=True)
        assert root.read_bytes("a") == b"x"


def test_a_file_that_is_missing_is_said(folder: Root, tmp_path: Path) -> None:
    for link in (True, False):
        with pytest.raises(StoreError):
            folder.put_file(tmp_path / "none", "a", link=link)
    assert on_disk(folder) == []


def test_progress_adds_up_to_the_file(folder: Root, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"x" * 1000)
    for root in (folder, Root(f"memory://{tmp_path.name}")):
        heard: list[int] = []
        root.put_file(tmp_path / "local", "a", on_bytes=heard.append)
        assert sum(heard) == 1000
