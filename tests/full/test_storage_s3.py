"""``Root`` against moto and rclone: every operation through every fault of the proxy."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tessera.errors import DamagedError, NotFoundError, StoreError
from tessera.storage import CHUNK, Root, sha256_bytes, sha256_file
from tests.services.faults import MODERATE, Faults
from tests.services.proxied import Proxy
from tests.services.stores import BUCKET, Store, s3_client

BIG = 2 * CHUNK + 12345
FAULTS = (
    "slow_down", "throttle", "reset_before", "reset_body", "reset_after", "stall", "truncate",
    "flip",
)  # fmt: skip


def open_at(store: Store, prefix: str, patch: pytest.MonkeyPatch, timeout_s: float = 1.0) -> Root:
    """A root at ``store``, its connection made while the environment says where that is."""
    for name, value in store.environment().items():
        patch.setenv(name, value)
    root = Root(store.url(prefix), timeout_s=timeout_s, longest_wait_s=0.2)
    root.files("")
    return root


@pytest.fixture
def root(proxy: Proxy, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Root:
    return open_at(proxy.store, prefix, monkeypatch)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    (tmp_path / "big.bin").write_bytes(os.urandom(BIG))
    return tmp_path / "big.bin"


def stored(store: Store, prefix: str, path: str) -> bytes:
    """What lies at the store, asked without the proxy and without our code."""
    answer = s3_client(store).get_object(Bucket=BUCKET, Key=f"{prefix}/{path}")
    data: bytes = answer["Body"].read()
    return data


def test_an_object_is_written_replaced_listed_read_and_deleted(
    root: Root, store: Store, prefix: str
) -> None:
    for path in ("a/1.json", "a/deep/2 +ü%41.json", "ab/3.json"):
        root.publish(path, b"old")
        root.publish(path, path.encode())
        assert root.read_bytes(path) == path.encode() == stored(store, prefix, path)
        assert root.size(path) == len(path.encode())
    assert root.files("") == ["a/1.json", "a/deep/2 +ü%41.json", "ab/3.json"]
    assert root.files("a") == ["a/1.json", "a/deep/2 +ü%41.json"]
    assert root.files("a/1.json") == ["a/1.json"]
    assert root.children("a") == ["1.json", "deep"]
    assert [root.exists(path) for path in ("a/1.json", "a", "b", "a/1")] == [
        True,
        True,
        False,
        False,
    ]
    root.publish("empty", b"")
    assert root.read_bytes("empty") == b""
    root.delete_tree("a")
    root.delete("a/1.json")
    assert root.files("") == ["ab/3.json", "empty"]
    with pytest.raises(NotFoundError):
        root.read_bytes("a/1.json")


def test_files_of_one_and_of_several_parts(
    root: Root, store: Store, prefix: str, proxy: Proxy, tmp_path: Path
) -> None:
    for size in (0, 1, CHUNK, CHUNK + 1, BIG):
        data = os.urandom(size)
        (tmp_path / "up").write_bytes(data)
        before = proxy.requests()
        root.put_file(tmp_path / "up", "file")
        assert proxy.requests() - before == (1 if size <= CHUNK else 3 + -(-size // CHUNK))
        assert stored(store, prefix, "file") == data
        root.get_file("file", tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == data
        assert root.read_bytes("file") == data


def test_long_listings(root: Root, store: Store, prefix: str) -> None:
    client = s3_client(store)
    names = [f"many/{number:04}" for number in range(1010)]  # a page has 1000

    def put(name: str) -> None:
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, names))
    assert root.files("many") == names
    assert len(root.children("many")) == len(names)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_gets_over_every_fault(
    root: Root, store: Store, prefix: str, proxy: Proxy, big: Path, tmp_path: Path, fault: str
) -> None:
    root.publish("a.json", b"abc" * 1000)
    root.put_file(big, "big")

    def publish() -> None:
        root.publish("b.json", b"xyz" * 1000)
        assert stored(store, prefix, "b.json") == b"xyz" * 1000

    def create() -> None:
        assert root.create("c.json", b"mine")
        assert stored(store, prefix, "c.json") == b"mine"
        assert not root.create("c.json", b"other")

    def put_file() -> None:
        root.put_file(big, "up")
        assert stored(store, prefix, "up") == big.read_bytes()

    def get_file() -> None:
        root.get_file("big", tmp_path / "one")
        assert (tmp_path / "one").read_bytes() == big.read_bytes()

    def get_file_by_digest() -> None:
        root.get_file("big", tmp_path / "two", sha256=sha256_file(big))

    def read() -> None:
        assert root.read_bytes("a.json") == b"abc" * 1000

    def look() -> None:
        assert root.children("")[0] == "a.json"
        assert root.exists("a.json")
        assert root.size("big") == BIG

    rate: dict[str, Any] = {fault: 1.0}
    happened = proxy.counts()[fault]
    for act in (publish, create, put_file, get_file, get_file_by_digest, read, look):
        proxy.set(Faults(**rate, stall_s=2.5, limit=1))
        act()
    assert proxy.counts()[fault] > happened


@pytest.mark.parametrize("fault", ["slow_down", "reset_body", "flip"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_fault_in_one_part_costs_that_part_alone(
    store: Store,
    prefix: str,
    proxy: Proxy,
    big: Path,
    fault: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = open_at(proxy.store, prefix, monkeypatch, timeout_s=30)  # a busy machine is no stall
    log = proxy.log()
    log.fresh()
    rate: dict[str, Any] = {fault: 1.0}
    proxy.set(Faults(**rate, only=f"PUT .*partNumber={number}(&|$)", limit=1))
    root.put_file(big, "up")
    assert stored(store, prefix, "up") == big.read_bytes()
    parts = [
        re.search(r"partNumber=(\d+)", entry.query)
        for entry in log.fresh()
        if entry.event == "begin" and entry.method == "PUT"
    ]
    sent = sorted(int(part[1]) for part in parts if part)
    assert set(sent) == {1, 2, 3}
    again = [n for n in set(sent) if sent.count(n) > 1]
    # rclone forgets the whole upload when one part is not what its Content-MD5 says.
    assert again == [number] or (store.kind, fault) == ("rclone", "flip")


def test_what_stays_refused_is_a_sentence(proxy: Proxy, prefix: str, root: Root) -> None:
    proxy.set(Faults(slow_down=1.0))
    with pytest.raises(StoreError) as caught:
        root.read_bytes("a.json")
    assert root.url in str(caught.value)
    assert "a.json" in str(caught.value)


def test_wrong_keys_are_told_at_once(
    proxy: Proxy, store: Store, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.kind == "moto":
        return  # it verifies no keys
    monkeypatch.setattr(
        type(store), "environment", _with_a_wrong_secret(type(store).environment), raising=True
    )
    before = proxy.requests()
    with pytest.raises(StoreError, match="refused access"):
        open_at(proxy.store, prefix, monkeypatch)
    assert proxy.requests() == before + 1


def _with_a_wrong_secret(
    environment: Callable[[Store], dict[str, str]],
) -> Callable[[Store], dict[str, str]]:
    return lambda store: environment(store) | {"AWS_SECRET_ACCESS_KEY": "not-the-secret-of-it"}


def test_no_bucket(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in proxy.store.environment().items():
        monkeypatch.setenv(name, value)
    root = Root("s3://no-such-bucket/p", timeout_s=5)
    acts: list[Callable[[], object]] = [
        lambda: root.publish("a", b"x"), lambda: root.files("a"), lambda: root.exists("a"),
        lambda: root.read_bytes("a"),
    ]  # fmt: skip
    for act in acts:
        with pytest.raises(StoreError, match="There is no bucket"):
            act()


def test_an_object_that_rotted_is_named(root: Root, tmp_path: Path) -> None:
    root.publish("weights", b"rotted")
    with pytest.raises(DamagedError, match="weights in s3://"):
        root.get_file("weights", tmp_path / "weights", sha256=sha256_bytes(b"whole"))


def test_of_eight_threads_that_create_at_most_the_store_decides(
    store: Store, root: Root, prefix: str
) -> None:
    wins: list[int] = []

    def race(number: int) -> None:
        if root.create("race.json", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 if store.kind == "moto" else wins  # rclone ignores the condition
    assert int(root.read_bytes("race.json")) in wins


def test_threads_share_a_root_while_one_request_in_twelve_goes_wrong(
    root: Root, store: Store, prefix: str, proxy: Proxy, big: Path, tmp_path: Path
) -> None:
    proxy.set(MODERATE)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(20):
                data = os.urandom(5000)
                root.publish(f"{number}/{step}", data)
                assert root.read_bytes(f"{number}/{step}") == data
            root.put_file(big, f"{number}/big")
            root.get_file(f"{number}/big", tmp_path / f"{number}", sha256=sha256_file(big))
            assert len(root.files(f"{number}")) == 21
        except BaseException as failure:
            failures.append(failure)

    began = time.monotonic()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert time.monotonic() - began < 120
    assert sum(proxy.counts().values()) > 0
