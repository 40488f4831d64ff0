"""S3 as it misbehaves: throttling, stalls, cut-off and nonsensical answers, for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.errors import InputError, NotFoundError, StoreError
from tessera.storage import Root
from tests.storage import tiny_s3
from tests.storage.helpers import make_root, sentence
from tests.storage.tiny_s3 import Answer, Fault, TinyS3, error


@pytest.fixture
def root(s3_root: Root) -> Root:
    return s3_root


# -- one place tries again -------------------------------------------------------------------------

_CALLS: dict[str, tuple[str, Callable[[Root], object], object]] = {
    "read": (r"GET /bucket/p/a\.json", lambda root: root.read_bytes("a.json"), b"{}"),
    "size": (r"HEAD /bucket/p/a\.json", lambda root: root.size("a.json"), 2),
    "exists": (r"HEAD /bucket/p/a\.json", lambda root: root.exists("a.json"), True),
    "files": (r"GET /bucket\?", lambda root: root.files(""), ["a.json"]),
    "children": (r"GET /bucket\?", lambda root: root.children(""), ["a.json"]),
    "publish": (r"PUT /bucket/p/b", lambda root: root.publish("b", b"x"), None),
    "create": (r"PUT /bucket/p/b", lambda root: root.create("b", b"x"), True),
    "put_file": (r"PUT /bucket/p/b", lambda root: root.put_file(Path(__file__), "b"), None),
    "delete": (r"DELETE /bucket/p/a", lambda root: root.delete("a.json"), None),
}
_PASSING = {
    "503": error(503, "SlowDown"),
    "503 without a body": Answer(503),
    "429": error(429, "TooManyRequests"),
    "500": error(500, "InternalError"),
    "400 of a slow upload": error(400, "RequestTimeout"),
    "reset": Answer(reset=True),
}


@pytest.mark.parametrize("fault", _PASSING)
@pytest.mark.parametrize("call", _CALLS)
def test_passing_faults_are_tried_again_once_each(
    server: TinyS3, root: Root, call: str, fault: str
) -> None:
    pattern, act, expected = _CALLS[call]
    root.publish("a.json", b"{}")
    server.refuse(pattern, _PASSING[fault], times=3)
    assert act(root) == expected
    assert server.count(pattern) == 4


@pytest.mark.parametrize("call", _CALLS)
def test_what_does_not_pass_is_a_sentence_after_so_many_requests(
    server: TinyS3, root: Root, call: str
) -> None:
    pattern, act, _ = _CALLS[call]
    root.publish("a.json", b"{}")
    server.refuse(pattern, error(503, "SlowDown"), times=100)
    with pytest.raises(StoreError) as caught:
        act(root)
    assert "s3://bucket/p" in sentence(caught)
    assert caught.value.exit_code == 75
    assert server.count(pattern) == 4, "nothing below tries again by itself"


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (error(403, "AccessDenied"), "refused access"),
        (error(403, "InvalidAccessKeyId"), "refused access"),
        (error(400, "InvalidRequest"), "failed on"),
        (error(501, "NotImplemented"), "failed on"),
        (error(507, "XMinioStorageFull"), "No space is left"),
        (error(404, "NoSuchBucket"), "There is no bucket"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value.status),
)
def test_final_answers_are_told_at_once(
    server: TinyS3, root: Root, call: str, answer: Answer, says: str
) -> None:
    pattern, act, _ = _CALLS[call]
    if "HEAD" in pattern:  # these answers have no body, so no code, and a 400 or 404 means less
        answer = Answer(answer.status if answer.status > 500 else 403)
        says = says if answer.status > 500 else "refused access"
    root.publish("a.json", b"{}")
    server.refuse(pattern, answer, times=100)
    with pytest.raises(StoreError) as caught:
        act(root)
    assert says in sentence(caught)
    assert "s3://bucket/p" in sentence(caught)
    assert server.count(pattern) == 1


def test_a_bucket_that_is_missing_is_no_empty_one(server: TinyS3) -> None:
    missing = Root("s3://other/p", timeout_s=0.5, longest_wait_s=0.01)
    calls: list[Callable[[], object]] = [
        lambda: missing.files(""),
        lambda: missing.children("a"),
        lambda: missing.exists("a"),
        lambda: missing.read_bytes("a"),
        lambda: missing.publish("a", b"x"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"There is no bucket for .*s3://other/p") as caught:
            call()
        assert not isinstance(caught.value, NotFoundError)


@pytest.mark.parametrize("fault", [tiny_s3.nonsense, tiny_s3.nothing, tiny_s3.cut])
@pytest.mark.parametrize("call", ["files", "children"])
def test_a_listing_that_is_broken_is_not_an_empty_one(
    server: TinyS3, root: Root, fault: Fault, call: str
) -> None:
    pattern, act, expected = _CALLS[call]
    root.publish("a.json", b"{}")
    server.disturb(pattern, fault)
    assert act(root) == expected
    assert server.count(pattern) == 2


def test_a_long_listing_repeats_only_the_page_that_failed(server: TinyS3, root: Root) -> None:
    names = [f"n/{number:02}" for number in range(11)]
    for name in names:
        server.store(f"p/{name}", b"x")
    server.store("p/n/", b"")  # how a console draws a folder
    server.refuse("continuation-token", error(503, "SlowDown"))
    assert root.files("n") == names
    assert server.count(r"GET /bucket\?") == 5
    assert root.children("n") == [name[2:] for name in names]


def test_an_error_inside_an_answer_of_success_is_one(server: TinyS3, root: Root, big: Path) -> None:
    failed = Answer(200, error(500, "InternalError").body)
    server.refuse(r"POST .*uploadId", failed)
    root.put_file(big, "big")
    assert server.objects["p/big"][0] == big.read_bytes()
    assert server.count(r"POST .*uploadId") == 2


# -- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", _CALLS)
def test_a_stalled_connection_is_left_and_tried_again(
    server: TinyS3, root: Root, call: str
) -> None:
    pattern, act, expected = _CALLS[call]
    root.publish("a.json", b"{}")
    server.disturb(pattern, tiny_s3.stall)
    began = time.monotonic()
    assert act(root) == expected
    assert time.monotonic() - began < 1.4, "0.5 s of silence are enough"


def test_a_connection_that_drips_is_left(server: TinyS3) -> None:
    root = make_root(timeout_s=0.2)  # the server is never silent for so long
    root.publish("a.json", b"{}")
    server.disturb("GET", tiny_s3.drip)
    began = time.monotonic()
    assert root.read_bytes("a.json") == b"{}"
    assert 0.9 < time.monotonic() - began < 3.0


def test_the_time_lost_in_one_call_is_bounded(server: TinyS3) -> None:
    root = make_root(timeout_s=0.05, attempts=1_000_000)
    server.refuse("GET", error(503, "SlowDown"), times=100_000)
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        root.read_bytes("a.json")
    assert "a.json" in sentence(caught)
    assert 0.8 < time.monotonic() - began < 1.6  # 20 times 0.05


def test_an_upload_that_fails_is_given_up_at_the_store_too(
    server: TinyS3, root: Root, big: Path
) -> None:
    server.refuse("PUT", error(503, "SlowDown"), times=100)
    with pytest.raises(StoreError) as caught:
        root.put_file(big, "big")
    assert "big" in sentence(caught)
    assert server.count("PUT") <= 3 * 4
    assert server.parts == {}
    assert server.objects == {}


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf", "3601"])
@pytest.mark.parametrize("url", ["s3://bucket/p", "folder"])
def test_a_time_out_that_is_none_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, text: str, url: str
) -> None:
    monkeypatch.setenv("TESSERA_STORE_TIMEOUT_S", text)
    with pytest.raises(InputError) as caught:
        Root(url)
    assert f"TESSERA_STORE_TIMEOUT_S is {text!r}" in sentence(caught)


def test_the_time_out_of_the_environment_counts(
    server: TinyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_STORE_TIMEOUT_S", "0.3")
    root = Root("s3://bucket/p", longest_wait_s=0.01)
    root.publish("a.json", b"{}")
    server.disturb("GET", tiny_s3.stall)
    began = time.monotonic()
    assert root.read_bytes("a.json") == b"{}"
    assert time.monotonic() - began < 1.2
