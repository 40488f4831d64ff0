from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.errors import DamagedError, InputError, NotFoundError, StoreError
from tessera.storage import Root, sha256_bytes
from tessera.storage.retry import Caller, Limits, at_once
from tests.storage.helpers import (
    faulty,
    file_system,
    replace_file_system,
    sentence,
)

_CALLS: dict[str, tuple[str, Callable[[Root, Path], object], object]] = {
    "read": ("cat_file", lambda root, _: root.read_bytes("a/b.json"), b"{}"),
    "exists": ("info", lambda root, _: root.exists("a/b.json"), True),
    "files": ("ls", lambda root, _: root.files("a"), ["a/b.json"]),
    "children": ("ls", lambda root, _: root.children("a"), ["b.json"]),
    "publish": ("pipe_file", lambda root, _: root.publish("a/b.json", b"{}"), None),
    "create": ("pipe_file", lambda root, _: root.create("a/c.json", b"{}"), True),
    "get_file": ("get_file", lambda root, local: root.get_file("a/b.json", local), None),
    "put_file": ("put_file", lambda root, _: root.put_file(Path(__file__), "a/d"), None),
    "delete": ("rm_file", lambda root, _: root.delete("a/b.json"), None),
}


class FSTimeoutError(Exception):
    """By the name of the one that aiohttp-based stores raise."""


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize(
    "fault", [ConnectionResetError(104, "reset"), TimeoutError(), FSTimeoutError()], ids=repr
)
def test_passing_faults_are_tried_again(tmp_path: Path, call: str, fault: Exception) -> None:
    method, act, expected = _CALLS[call]
    root, store = faulty(method, fault, fault, fault)
    assert act(root, tmp_path / "local") == expected
    assert store.calls == 4


@pytest.mark.parametrize("call", _CALLS)
def test_a_store_that_stays_away_is_a_sentence(tmp_path: Path, call: str) -> None:
    method, act, _ = _CALLS[call]
    root, store = faulty(method, *[ConnectionResetError(104, "reset by peer")] * 4)
    with pytest.raises(StoreError) as error:
        act(root, tmp_path / "local")
    assert "reset by peer" in sentence(error)
    assert error.value.exit_code == 75
    assert store.calls == 4
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize(
    "fault",
    [
        PermissionError(errno.EACCES, "Forbidden"),
        OSError(errno.EROFS, "read-only"),
        OSError(errno.ENAMETOOLONG, "too long"),
    ],
    ids=repr,
)
def test_final_faults_are_told_at_once(tmp_path: Path, call: str, fault: Exception) -> None:
    method, act, _ = _CALLS[call]
    root, store = faulty(method, fault)
    with pytest.raises(StoreError) as error:
        act(root, tmp_path / "local")
    assert root.url in sentence(error)
    assert store.calls == 1
    assert "again later" not in sentence(error)


def test_a_missing_object_is_asked_for_once() -> None:
    root, store = faulty("cat_file")
    with pytest.raises(NotFoundError):
        root.read_bytes("a/none")
    assert store.calls == 1


def test_an_error_of_our_own_is_not_dressed_up_as_the_stores() -> None:
    root, store = faulty("cat_file", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        root.read_bytes("a/b.json")
    assert store.calls == 1


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    root = Root(str(tmp_path), attempts=1)
    root.publish("checkpoints/step-1/COMPLETE", b"")
    inner = file_system(root)

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def ls(self, path: str, **kwargs: Any) -> Any:
            if path.endswith("step-1"):
                raise OSError(errno.EIO, "Input/output error")
            return inner.ls(path, **kwargs)

    replace_file_system(root, Broken())
    with pytest.raises(StoreError) as error:
        root.files("checkpoints")
    assert "Input/output error" in sentence(error)


def test_a_create_that_arrived_before_its_answer_was_lost_has_won() -> None:
    root, _ = faulty("nothing")
    inner = file_system(root)
    failed: list[str] = []

    class Lossy:
        """Stores the bytes, then loses the connection before it says so."""

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
            inner.pipe_file(path, data, mode=mode)
            if not failed:
                failed.append(path)
                raise ConnectionResetError(104, "reset")

    replace_file_system(root, Lossy())
    assert root.create("a/mine.json", b"token 1")
    assert not root.create("a/mine.json", b"token 2")


def test_no_keys_for_a_bucket_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    root = Root("s3://bucket/prefix", attempts=1)
    with pytest.raises(StoreError) as error:
        root.exists("runs")
    assert "s3://bucket/prefix" in sentence(error)
    assert "credentials" in sentence(error)
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in sentence(error)
    assert error.value.exit_code == 2, "nothing finds keys by trying again"


def test_half_of_the_keys_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key-for-tests-only")
    with pytest.raises(StoreError) as error:
        Root("s3://bucket/prefix", attempts=1).exists("runs")
    assert "AWS_SECRET_ACCESS_KEY" in sentence(error)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("url", ["s3://", "s3:///", "s3:///prefix", "s3a://"])
def test_a_bucket_without_a_name_is_refused(url: str) -> None:
    with pytest.raises(InputError) as error:
        Root(url)
    assert f"{url!r} names no bucket" in sentence(error)


def test_a_bucket_that_cannot_be_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key-for-tests-only")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-for-tests-only")
    with pytest.raises(StoreError) as error:
        Root("s3://no bucket!/prefix", attempts=1).exists("runs")
    assert sentence(error).startswith("s3://no bucket!/prefix names no possible bucket; ")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("write", ["publish", "create", "put_file"])
def test_a_folder_that_cannot_be_written_is_bad_input(write: str) -> None:
    """Permissions do not bind whoever is root; the kernel's own folder binds everybody."""
    root = Root("/sys/tessera-test")
    assert root.is_absent()
    acts: dict[str, Callable[[], object]] = {
        "publish": lambda: root.publish("runs/a.json", b"{}"),
        "create": lambda: root.create("runs/a.json", b"{}"),
        "put_file": lambda: root.put_file(Path(__file__), "runs/a.json"),
    }
    with pytest.raises(StoreError) as error:
        acts[write]()
    assert sentence(error).startswith("/sys/tessera-test cannot be used for runs/a.json (")
    assert "--root or TESSERA_ROOT" in sentence(error)
    assert error.value.exit_code == 2


def test_a_full_disk_may_heal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tessera.storage.stores.publish_local", full)
    with pytest.raises(StoreError) as error:
        root.publish("a", b"")
    assert error.value.exit_code == 75


# -- how long it is tried --------------------------------------------------------------------------


def test_the_parts_of_a_call_share_the_time_that_may_be_lost() -> None:
    caller = Caller("s3://bucket", Limits(attempts=1_000_000, longest_wait_s=0.02, timeout_s=0.02))
    budget, failed = caller.budget(), dict[int, int]()

    def flaky(number: int) -> int:
        def act() -> int:
            failed[number] = failed.get(number, 0) + 1
            if failed[number] < 4:
                raise ConnectionResetError(104, "reset")
            return number

        return caller.call(f"part {number}", act, budget=budget, share=8)

    began = time.monotonic()
    with pytest.raises(StoreError, match="part") as error:
        list(at_once(flaky, range(10_000), budget))
    assert "reset" in sentence(error)
    assert max(failed.values()) == 4, "some time may be lost"
    assert time.monotonic() - began > 0.3  # 20 times 0.02
    # Of ten thousand parts about ninety lose that much together. Counted, because a stall of the
    # machine takes time and tries nothing.
    assert len(failed) < 300


def test_the_first_part_that_fails_for_good_stops_the_others() -> None:
    caller = Caller("s3://bucket", Limits(attempts=1_000_000, longest_wait_s=0.02, timeout_s=30))
    budget = caller.budget()

    def act(number: int) -> None:
        if number == 3:
            raise PermissionError(errno.EACCES, "Forbidden")
        raise ConnectionResetError(104, "reset")

    def part(number: int) -> None:
        caller.call("a", lambda: act(number), budget=budget)

    began = time.monotonic()
    with pytest.raises(StoreError):
        list(at_once(part, [3, *range(1000)], budget))
    assert time.monotonic() - began < 1.0
    assert budget.left > 500, "the whole may be tried again"


# -- damage on the way -----------------------------------------------------------------------------


class Damaging:
    """Passes calls on to a file system, and damages what the first calls of one method move."""

    def __init__(self, inner: Any, method: str, times: int) -> None:
        self._inner, self._method, self._times = inner, method, times

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name != self._method:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            if self._times:
                self._times -= 1
                if self._method == "get_file":
                    Path(args[1]).write_bytes(b"damaged")
                else:
                    where = args[1] if self._method == "put_file" else args[0]
                    self._inner.pipe_file(where, b"damaged")
            return result

        return call


def damaging(method: str, times: int) -> Root:
    root = Root(f"memory://{secrets.token_hex(8)}", longest_wait_s=0.0)
    replace_file_system(root, Damaging(file_system(root), method, times))
    return root


def test_a_download_that_was_damaged_is_done_again(tmp_path: Path) -> None:
    root = damaging("get_file", 2)
    root.publish("a", b"whole")
    root.get_file("a", tmp_path / "a", sha256=sha256_bytes(b"whole"))
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_download_that_is_damaged_three_times_is_named(tmp_path: Path) -> None:
    root = damaging("get_file", 3)
    root.publish("a", b"whole")
    with pytest.raises(DamagedError) as error:
        root.get_file("a", tmp_path / "a", sha256=sha256_bytes(b"whole"))
    assert "a in memory://" in sentence(error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", ["publish", "create", "put_file"])
def test_what_a_store_took_is_read_back_and_written_again(tmp_path: Path, write: str) -> None:
    root = damaging("put_file" if write == "put_file" else "pipe_file", 2)
    (tmp_path / "local").write_bytes(b"whole")
    acts: dict[str, Callable[[], object]] = {
        "publish": lambda: root.publish("a", b"whole"),
        "create": lambda: root.create("a", b"whole"),
        "put_file": lambda: root.put_file(tmp_path / "local", "a"),
    }
    assert acts[write]() in (None, True)
    assert root.read_bytes("a") == b"whole"


def test_a_store_that_never_keeps_what_was_sent_is_told() -> None:
    root = damaging("pipe_file", 100)
    with pytest.raises(StoreError) as error:
        root.publish("a", b"whole")
    assert "did not keep a as it was sent" in sentence(error)
    assert not isinstance(error.value, DamagedError), "another moment may help"
