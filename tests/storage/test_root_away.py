"""A root in a folder whose disk goes away while it is in use, and comes back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.errors import StoreError
from tessera.storage import CHUNK, Root
from tests.storage.helpers import on_disk, sentence

Write = Callable[[Root, Path], object]
WRITES: dict[str, Write] = {
    "publish": lambda root, _: root.publish("runs/new/a.json", b"{}"),
    "publish at the top": lambda root, _: root.publish("a.json", b"{}"),
    "publish where a folder was": lambda root, _: root.publish("runs/r/a.json", b"{}"),
    "create": lambda root, _: root.create("runs/new/a.json", b"{}"),
    "put_file": lambda root, big: root.put_file(big, "runs/new/a.bin"),
    "put_file linked": lambda root, big: root.put_file(big, "runs/new/a.bin", link=True),
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "root"


def used(base: Path, **options: float) -> Root:
    """A root in which something lies; ``base`` is made by its first write."""
    root = Root(str(base), longest_wait_s=0.0, **options)  # type: ignore[arg-type]
    root.publish("runs/r/run.json", b"{}")
    return root


@every_write
def test_a_root_that_vanished_is_down_and_is_not_made_again(
    base: Path, big: Path, write: Write
) -> None:
    root = used(base, attempts=2)
    away = base.rename(base.with_name("away"))
    with pytest.raises(StoreError) as raised:
        write(root, big)
    said = sentence(raised)
    assert said.startswith(f"{base} failed on ")
    assert "the folder was there and is gone, as if its disk had been unmounted" in said
    assert said.endswith("; try again later.")
    assert raised.value.exit_code == 75
    assert not base.exists()
    away.rename(base)
    write(root, big)
    assert len(on_disk(root)) == 2


@pytest.mark.parametrize("parent", [False, True])
def test_neither_is_one_that_stood_when_it_was_opened(base: Path, parent: bool) -> None:
    used(base)
    root = Root(str(base), attempts=1)
    gone = base.parent if parent else base
    gone.rename(gone.with_name("away"))
    with pytest.raises(StoreError, match="the folder was there and is gone"):
        root.publish("runs/r/b.json", b"{}")
    assert not gone.exists()


@every_write
def test_a_write_waits_for_a_root_that_comes_back(
    base: Path, big: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = used(base, attempts=3)
    away = base.rename(base.with_name("away"))
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            away.rename(base)

    monkeypatch.setattr(time, "sleep", sleep)
    write(root, big)
    assert len(waits) == 2
    assert len(on_disk(root)) == 2


def test_a_root_that_vanishes_under_a_write_is_down_too(base: Path, big: Path) -> None:
    root = used(base, attempts=2)
    away = base.with_name("away")
    sent: list[int] = []

    def pull(step: int) -> None:
        sent.append(step)
        if sent == [CHUNK]:
            base.rename(away)

    with pytest.raises(StoreError, match="the folder was there and is gone"):
        root.put_file(big, "runs/r/a.bin", on_bytes=pull)
    assert not base.exists()


def test_a_file_that_is_missing_here_is_not_taken_for_a_root_that_is(base: Path) -> None:
    root = used(base, attempts=1)
    with pytest.raises(StoreError) as raised:
        root.put_file(base / "no-such-file", "runs/r/a.bin")
    assert "is gone" not in str(raised.value)


def test_another_process_may_begin_a_new_root_where_none_is(base: Path) -> None:
    """It has seen no other; this one, which has, then goes on in the new one or in its own."""
    root = used(base, attempts=1)
    away = base.rename(base.with_name("away"))
    with pytest.raises(StoreError):
        root.publish("a.json", b"{}")
    code = "import sys; from tessera.storage import Root; Root(sys.argv[1]).publish('n.json', b'')"
    subprocess.run([sys.executable, "-c", code, str(base)], check=True)
    assert on_disk(root) == ["n.json"]
    root.publish("a.json", b"{}")
    assert on_disk(root) == ["a.json", "n.json"]
    assert away.is_dir()


def test_folders_inside_of_a_root_are_still_made_and_removed(base: Path) -> None:
    root = used(base, attempts=1)
    for _ in range(2):
        root.publish("a/b/c/d.json", b"{}")
        root.delete_tree("a")
    assert on_disk(root) == ["runs/r/run.json"]
