"""What goes to S3 and comes from it is checked, with ETags of every kind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.errors import DamagedError, StoreError
from tessera.storage import CHUNK, Root, sha256_bytes
from tests.storage import tiny_s3
from tests.storage.helpers import make_root, sentence
from tests.storage.tiny_s3 import Answer, Fault, TinyS3, error, flipped

BIG = 2 * CHUNK + 12345
"""Bytes of the fixture ``big``."""


@pytest.fixture
def root(s3_root: Root) -> Root:
    return s3_root


# -- what is read ----------------------------------------------------------------------------------


def test_a_read_that_its_etag_proves_is_one_request(server: TinyS3, root: Root) -> None:
    root.publish("a", b"abc" * 100)
    server.requests.clear()
    assert root.read_bytes("a") == b"abc" * 100
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [tiny_s3.flip, tiny_s3.cut])
@pytest.mark.parametrize("size", [1000, BIG])
def test_bytes_that_were_damaged_on_the_way_are_read_again(
    server: TinyS3, root: Root, fault: Fault, size: int
) -> None:
    data = os.urandom(size)
    root.publish("a", data)
    server.disturb("GET", fault)
    assert root.read_bytes("a") == data


def test_reads_that_never_agree_are_an_error(server: TinyS3, root: Root) -> None:
    root.publish("a", b"abc" * 100)

    def scatter(_: TinyS3, __: tiny_s3.Handler, answer: Answer) -> None:
        answer.body = os.urandom(300)

    server.disturb("GET", scatter, times=100)
    with pytest.raises(StoreError) as caught:
        root.read_bytes("a")
    assert "a in s3://bucket/p was different each time" in sentence(caught)


@pytest.mark.parametrize("etag", [lambda _: os.urandom(16).hex(), lambda _: "no-digest-9"])
def test_where_etags_are_no_digests_two_reads_must_agree(
    server: TinyS3, etag: Callable[[bytes], str]
) -> None:
    server.etag = etag
    server.store("p/a", b"abc" * 100)
    root = make_root()
    server.disturb("GET", tiny_s3.flip)
    assert root.read_bytes("a") == b"abc" * 100
    server.requests.clear()
    assert root.read_bytes("a") == b"abc" * 100
    assert len(server.requests) == 1, "the same ETag stands for the same bytes"
    server.disturb("GET", tiny_s3.flip)
    assert root.read_bytes("a") == b"abc" * 100
    server.store("p/a", b"other")
    server.requests.clear()
    assert root.read_bytes("a") == b"other"
    assert len(server.requests) == 2


def test_an_object_of_other_parts_is_proved_too(server: TinyS3, root: Root) -> None:
    size, part = 51 << 20, 50 << 20  # s3fs sends parts of 50 MiB
    data = os.urandom(1 << 20) * 51
    digests = [bytes.fromhex(tiny_s3.md5(data[start : start + part])) for start in (0, part)]
    server.store("p/a", data, f"{tiny_s3.md5(b''.join(digests))}-2")
    server.requests.clear()
    assert len(root.read_bytes("a")) == size
    assert server.count("GET") == 1 + 7


# -- files that come down --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, BIG])
def test_a_download_that_was_damaged_is_done_again(
    server: TinyS3, root: Root, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    root.publish("a", data)
    server.disturb("GET", tiny_s3.flip)
    root.get_file("a", tmp_path / "local", sha256=sha256_bytes(data))
    assert (tmp_path / "local").read_bytes() == data
    server.disturb("GET", tiny_s3.flip)
    root.get_file("a", tmp_path / "local")  # the ETag is the only digest here
    assert (tmp_path / "local").read_bytes() == data


def test_a_download_that_is_always_damaged_is_named(
    server: TinyS3, root: Root, tmp_path: Path
) -> None:
    root.publish("a", b"whole")
    server.store("p/a", b"rotted")
    server.requests.clear()
    with pytest.raises(DamagedError) as caught:
        root.get_file("a", tmp_path / "cache" / "local", sha256=sha256_bytes(b"whole"))
    assert "a in s3://bucket/p has sha256" in sentence(caught)
    assert caught.value.exit_code == 2
    assert server.count("GET") == 3
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("fault", [tiny_s3.cut, tiny_s3.lose, tiny_s3.stall])
def test_only_the_range_that_failed_is_fetched_again(
    server: TinyS3, root: Root, big: Path, tmp_path: Path, fault: Fault
) -> None:
    root.put_file(big, "big")
    server.requests.clear()
    server.disturb("GET", fault)
    root.get_file("big", tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == big.read_bytes()
    assert server.count("GET") == 3 + 1


def test_an_object_that_is_replaced_during_a_download_is_never_mixed(
    server: TinyS3, root: Root, big: Path, tmp_path: Path
) -> None:
    root.put_file(big, "big")
    other = os.urandom(BIG)

    def replace(store: TinyS3, _: tiny_s3.Handler, __: Answer) -> None:
        if store.count("HEAD") == 3:  # one of the upload, one for the size, one for the ETag
            store.store("p/big", other)

    server.disturb("HEAD", replace, times=2)
    root.get_file("big", tmp_path / "local")
    assert (tmp_path / "local").read_bytes() == other


# -- what is written -------------------------------------------------------------------------------


def test_a_write_that_its_etag_proves_is_one_request(server: TinyS3, root: Root) -> None:
    root.publish("a", b"abc")
    assert server.requests == ["PUT /bucket/p/a"]


def once_damaged(server: TinyS3) -> None:
    """The next object or part is stored with a bit turned over."""

    def damage(data: bytes) -> bytes:
        server.damage = None
        return flipped(data)

    server.damage = damage


@pytest.mark.parametrize("write", ["publish", "create", "put_file", "parts"])
@pytest.mark.parametrize("opaque", [False, True])
def test_a_write_that_was_damaged_is_done_again(
    server: TinyS3, root: Root, big: Path, tmp_path: Path, write: str, opaque: bool
) -> None:
    data = os.urandom(1000)
    (tmp_path / "small").write_bytes(data)
    if opaque:
        server.etag = lambda _: os.urandom(16).hex()
        root = make_root()
    once_damaged(server)
    acts: dict[str, Callable[[], object]] = {
        "publish": lambda: root.publish("a", data),
        "create": lambda: root.create("a", data),
        "put_file": lambda: root.put_file(tmp_path / "small", "a"),
        "parts": lambda: root.put_file(big, "a"),
    }
    acts[write]()
    assert server.objects["p/a"][0] == (big.read_bytes() if write == "parts" else data)
    assert server.damage is None


def test_a_store_that_never_keeps_what_was_sent_is_told(server: TinyS3, root: Root) -> None:
    server.damage = flipped
    with pytest.raises(StoreError) as caught:
        root.publish("a", b"abc" * 100)
    assert "s3://bucket/p did not keep a as it was sent" in sentence(caught)
    assert server.count("PUT") == 4


def test_where_etags_are_no_digests_a_write_is_read_back(server: TinyS3, big: Path) -> None:
    server.etag = lambda _: os.urandom(16).hex()
    root = make_root()
    root.publish("a", b"abc")
    assert server.requests == ["PUT /bucket/p/a", "GET /bucket/p/a"]
    assert root.read_bytes("a") == b"abc"
    assert len(server.requests) == 3, "what was read back need not be read twice"
    server.requests.clear()
    root.put_file(big, "big")
    assert (server.count("PUT"), server.count("GET")) == (3, 3)


@pytest.mark.parametrize("fault", [tiny_s3.lose, tiny_s3.stall])
def test_only_the_part_that_failed_is_sent_again(
    server: TinyS3, root: Root, big: Path, fault: Fault
) -> None:
    if fault is tiny_s3.stall:
        root = make_root(timeout_s=0.15)  # a part may take 5 of them
    server.disturb("PUT .*partNumber=2", fault)
    sent: list[int] = []
    root.put_file(big, "big", on_bytes=sent.append)
    assert server.objects["p/big"][0] == big.read_bytes()
    assert server.count("PUT") == 4
    assert sent == [CHUNK, CHUNK, BIG - 2 * CHUNK]


def test_an_upload_that_finished_before_its_answer_was_lost_has_arrived(
    server: TinyS3, root: Root, big: Path
) -> None:
    server.disturb("POST .*uploadId", tiny_s3.lose)
    root.put_file(big, "big")
    assert server.objects["p/big"][0] == big.read_bytes()
    assert server.count("PUT") == 3


def test_an_upload_that_vanished_is_begun_again(server: TinyS3, root: Root, big: Path) -> None:
    server.refuse("PUT .*partNumber=3", error(404, "NoSuchUpload"))
    root.put_file(big, "big")
    assert server.objects["p/big"][0] == big.read_bytes()
    assert server.count(r"POST .*\?uploads") == 2


def test_a_create_whose_answer_was_lost_has_won(server: TinyS3, root: Root) -> None:
    server.disturb("PUT", tiny_s3.lose)
    assert root.create("run.json", b"token 1")
    assert not root.create("run.json", b"token 2")
    server.objects.clear()
    server.disturb("HEAD", lambda store, *_: store.store("p/run.json", b"token 3") and None)
    assert not root.create("run.json", b"token 1"), "another came between looking and writing"
    assert root.read_bytes("run.json") == b"token 3"


def test_several_threads_share_a_root(server: TinyS3, root: Root, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        data = os.urandom(CHUNK + 1000 * number)
        local = tmp_path / f"up-{number}"
        local.write_bytes(data)
        try:
            for step in range(5):
                root.publish(f"{number}/{step}", data[:1000])
                assert root.read_bytes(f"{number}/{step}") == data[:1000]
            root.put_file(local, f"{number}/big")
            root.get_file(f"{number}/big", tmp_path / "down", sha256=sha256_bytes(data))
            assert len(root.files(f"{number}")) == 6
        except BaseException as failure:
            failures.append(failure)

    server.refuse("(GET|PUT)", error(503, "SlowDown"), times=3)  # even all for one request
    server.disturb("GET", tiny_s3.flip)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
