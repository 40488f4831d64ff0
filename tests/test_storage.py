from __future__ import annotations

import errno
import json
import os
import random
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import ConflictError, InputError, NotFoundError, StoreError, TesseraError
from tessera.storage import (
    Root,
    canonical_json,
    open_root,
    publish_local,
    sha256_bytes,
    sha256_file,
)


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "folder":
        return Root(str(tmp_path / "root"))
    return Root(f"memory://{secrets.token_hex(8)}")


@pytest.fixture
def folder(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "root"))


def sentence(error: pytest.ExceptionInfo[TesseraError]) -> str:
    """What the person reads, after checking that it is one sentence on one line."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def on_disk(root: Root) -> list[str]:
    """Every file below a local root, hidden ones included."""
    base = Path(root.base)
    return sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.is_file())


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# -- reading back what was written -----------------------------------------------------------------


def test_an_object_is_written_replaced_read_and_deleted(root: Root) -> None:
    root.publish("a/b/c.bin", b"old")
    root.publish("a/b/c.bin", b"new")
    assert root.read_bytes("a/b/c.bin") == b"new"
    assert root.exists("a/b/c.bin")
    assert root.exists("a/b")
    root.delete("a/b/c.bin")
    assert not root.exists("a/b/c.bin")
    root.delete("a/b/c.bin")
    with pytest.raises(NotFoundError) as error:
        root.read_bytes("a/b/c.bin")
    assert "a/b/c.bin" in sentence(error)
    assert root.url in sentence(error)


def test_json_keeps_its_values(root: Root) -> None:
    value = {"text": "猫", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    root.publish_json("x.json", value)
    assert root.read_json("x.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        root.publish_json("x.json", {"loss": float("nan")})
    assert root.read_json("x.json") == value


@pytest.mark.parametrize("data", [b'{"a": [1, 2', b"", b"\xff\xfe\x00"])
def test_torn_json_is_a_sentence_that_names_the_file(root: Root, data: bytes) -> None:
    root.publish("runs/a/run.json", data)
    with pytest.raises(StoreError) as error:
        root.read_json("runs/a/run.json")
    assert "runs/a/run.json" in sentence(error)
    assert "not valid JSON" in sentence(error)


def test_create_writes_once(root: Root) -> None:
    assert root.create("a/run.json", b"first")
    assert not root.create("a/run.json", b"second")
    assert root.read_bytes("a/run.json") == b"first"
    assert root.create_json("a/other.json", {"a": 1})
    assert not root.create_json("a/other.json", {"a": 2})
    assert root.read_json("a/other.json") == {"a": 1}


def test_listings_see_names_below_a_folder_and_no_neighbours(root: Root) -> None:
    for path in ("runs/a/1.json", "runs/a/deep/2.json", "runs/ab/3.json", "runs/4.json"):
        root.publish(path, b"x")
    assert root.files("runs/a") == ["runs/a/1.json", "runs/a/deep/2.json"]
    assert root.files("") == [
        "runs/4.json",
        "runs/a/1.json",
        "runs/a/deep/2.json",
        "runs/ab/3.json",
    ]
    assert root.children("runs") == ["4.json", "a", "ab"]
    assert root.files("runs/4.json") == ["runs/4.json"]
    assert root.files("nothing") == []
    assert root.children("nothing") == []
    root.publish("runs/a/5.json", b"x")  # nothing is remembered from the listing before
    assert "runs/a/5.json" in root.files("runs/a")


def test_a_tree_is_deleted_whole_and_twice_is_no_error(root: Root) -> None:
    root.publish("runs/a/1.json", b"x")
    root.publish("runs/a/deep/2.json", b"x")
    root.publish("runs/ab/3.json", b"x")
    root.delete_tree("runs/a")
    root.delete_tree("runs/a")
    assert root.files("") == ["runs/ab/3.json"]
    assert not root.exists("runs/a")


def test_files_go_up_and_come_down(root: Root, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "up.bin").write_bytes(data)
    root.put_file(tmp_path / "up.bin", "model/up.bin")
    assert sha256_file(tmp_path / "up.bin") == sha256_bytes(data)
    root.get_file("model/up.bin", tmp_path / "down" / "down.bin", sha256=sha256_bytes(data))
    assert (tmp_path / "down" / "down.bin").read_bytes() == data
    assert os.listdir(tmp_path / "down") == ["down.bin"]


def test_a_wrong_digest_leaves_no_local_file(root: Root, tmp_path: Path) -> None:
    root.publish("model/weights.bin", b"damaged")
    target = tmp_path / "cache" / "weights.bin"
    with pytest.raises(StoreError) as error:
        root.get_file("model/weights.bin", target, sha256=sha256_bytes(b"whole"))
    assert "model/weights.bin" in sentence(error)
    assert sha256_bytes(b"damaged")[:12] in sentence(error)
    assert os.listdir(target.parent) == []


def test_a_wrong_digest_leaves_the_file_that_was_there(root: Root, tmp_path: Path) -> None:
    root.publish("weights.bin", b"damaged")
    (tmp_path / "weights.bin").write_bytes(b"whole")
    with pytest.raises(StoreError):
        root.get_file("weights.bin", tmp_path / "weights.bin", sha256=sha256_bytes(b"whole"))
    assert (tmp_path / "weights.bin").read_bytes() == b"whole"


def test_a_missing_object_is_not_downloaded(root: Root, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as error:
        root.get_file("model/none.bin", tmp_path / "cache" / "none.bin")
    assert "model/none.bin" in sentence(error)
    assert os.listdir(tmp_path / "cache") == []


# -- atomic whatever dies --------------------------------------------------------------------------

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


# -- faults of a store -----------------------------------------------------------------------------


class FaultyStore:
    """A file system whose next calls of one method fail, each with the next of ``faults``."""

    def __init__(self, inner: Any, method: str, *faults: Exception) -> None:
        self._inner, self._method, self._faults = inner, method, list(faults)
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name != self._method:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self._faults:
                raise self._faults.pop(0)
            return found(*args, **kwargs)

        return call


def faulty(method: str, *faults: Exception, attempts: int = 4) -> tuple[Root, FaultyStore]:
    """A root in memory with one object ``a/b.json``, and what fails below it."""
    root = Root(f"memory://{secrets.token_hex(8)}", attempts=attempts, longest_wait_s=0.0)
    root.publish("a/b.json", b"{}")
    store = FaultyStore(root.fs, method, *faults)
    root.fs = store
    return root, store


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
    inner = root.fs

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def ls(self, path: str, **kwargs: Any) -> Any:
            if path.endswith("step-1"):
                raise OSError(errno.EIO, "Input/output error")
            return inner.ls(path, **kwargs)

    root.fs = Broken()
    with pytest.raises(StoreError) as error:
        root.files("checkpoints")
    assert "Input/output error" in sentence(error)


def test_a_create_that_arrived_before_its_answer_was_lost_has_won() -> None:
    root, _ = faulty("nothing")
    inner = root.fs
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

    root.fs = Lossy()
    assert root.create("a/mine.json", b"token 1")
    assert not root.create("a/mine.json", b"token 2")


def test_no_keys_for_a_bucket_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_RESPONSE_CHECKSUM_VALIDATION", "AWS_REQUEST_CHECKSUM_CALCULATION"):
        monkeypatch.setenv(name, "when_required")  # Root sets them; this takes them back
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    root = Root("s3://bucket/prefix", attempts=1)
    with pytest.raises(StoreError) as error:
        root.exists("runs")
    assert "s3://bucket/prefix" in sentence(error)
    assert "credentials" in sentence(error)


# -- the root itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a/.."])
def test_paths_that_leave_the_root_are_refused(root: Root, tmp_path: Path, path: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: root.publish(path, b"x"),
        lambda: root.create(path, b"x"),
        lambda: root.read_bytes(path),
        lambda: root.put_file(Path(__file__), path),
        lambda: root.get_file(path, tmp_path / "local"),
        lambda: root.delete(path),
        lambda: root.delete_tree(path),
        lambda: root.files(path),
        lambda: root.children(path),
        lambda: root.exists(path),
        lambda: root.local_path(path) if root.is_local else root.exists(path),
    ]
    for call in calls:
        with pytest.raises(ConflictError) as error:
            call()
        assert repr(path) in sentence(error)


def test_a_root_that_is_a_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        Root(str(tmp_path / "file"))
    assert str(tmp_path / "file") in sentence(error)


def test_a_root_below_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as error:
        Root(str(tmp_path / "file" / "root")).publish("a", b"x")
    assert "a" in sentence(error)


def test_a_protocol_that_nobody_knows_is_bad_input() -> None:
    with pytest.raises(InputError) as error:
        Root("carrier-pigeon://coop")
    assert "carrier-pigeon" in sentence(error)


def test_which_root_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TESSERA_ROOT", raising=False)
    assert open_root().url == str(tmp_path / ".tessera")
    monkeypatch.setenv("TESSERA_ROOT", str(tmp_path / "variable"))
    assert open_root().url == str(tmp_path / "variable")
    assert open_root("option").url == str(tmp_path / "option")
    assert open_root(f"file://{tmp_path}/url/").url == f"{tmp_path}/url"
    assert Root("memory://a/b/").url == "memory://a/b"


def test_only_a_folder_can_be_read_in_place(root: Root) -> None:
    root.publish("a.bin", b"x")
    path = root.local_path("a.bin")
    assert (path is not None) == root.is_local
    assert path is None or path.read_bytes() == b"x"


def test_a_local_file_is_published_with_its_folder(tmp_path: Path) -> None:
    publish_local(tmp_path / "new" / "a.json", b"one")
    publish_local(tmp_path / "new" / "a.json", b"two")
    assert (tmp_path / "new" / "a.json").read_bytes() == b"two"
    assert os.listdir(tmp_path / "new") == ["a.json"]


# -- canonical JSON --------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


def _shuffled(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        dice.shuffle(keys)
        return {key: _shuffled(value[key], dice) for key in keys}
    return [_shuffled(part, dice) for part in value] if isinstance(value, list) else value


@given(_JSON, st.randoms(use_true_random=False))
def test_canonical_json_does_not_depend_on_the_order_of_keys(
    value: Any, dice: random.Random
) -> None:
    assert canonical_json(_shuffled(value, dice)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


def test_canonical_json_is_frozen() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"猫": "é\n"}}
    assert canonical_json(value) == '{"a":{"猫":"é\\n"},"b":[1,2.5,null,true]}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("inf"))
