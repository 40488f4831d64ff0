"""The proxy passes everything on, and each fault is really seen by a client.

The client is the standard library's, with addresses that botocore signed: it retries nothing and
hides nothing. rclone verifies the signatures, so a changed Host header or path would be refused.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from tests.services.faults import MODERATE, Chooser, Faults, ask
from tests.services.stores import BUCKET, s3_client

if TYPE_CHECKING:
    from tests.services.proxied import Proxy
    from tests.services.stores import Store

BODY = bytes(range(256)) * 4096  # 1 MiB: more than one chunk


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One signed request at a time, each on a connection of its own."""

    def __init__(self, proxy: Proxy, prefix: str) -> None:
        self.s3 = s3_client(proxy.store)
        self.key = f"{prefix}/a b+c/ü%41"  # what a careless proxy would write differently
        self.timeout_s = 30.0

    def ask(self, method: str, body: bytes | None = None, **headers: str) -> Answer:
        operation = f"{method.lower()}_object"
        parameters = {"Bucket": BUCKET, "Key": self.key}
        url = urlsplit(self.s3.generate_presigned_url(operation, Params=parameters))
        connection = http.client.HTTPConnection(url.netloc, timeout=self.timeout_s)
        try:
            connection.request(method, f"{url.path}?{url.query}", body=body, headers=headers)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers), answer.read())
        finally:
            connection.close()

    def put(self, body: bytes = BODY) -> None:
        assert self.ask("PUT", body).status == 200


@pytest.fixture
def client(proxy: Proxy, prefix: str) -> Client:
    return Client(proxy, prefix)


def stored(store: Store, client: Client) -> bytes | None:
    """What lies at the store itself."""
    s3 = s3_client(store)
    try:
        data: bytes = s3.get_object(Bucket=BUCKET, Key=client.key)["Body"].read()
    except s3.exceptions.NoSuchKey:
        return None
    return data


# -- without faults --------------------------------------------------------------------------------


def test_passes_on_what_s3_clients_do(proxy: Proxy, prefix: str) -> None:
    s3, before = s3_client(proxy.store), proxy.counts()
    key = f"{prefix}/x y/ü"
    s3.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    assert s3.head_object(Bucket=BUCKET, Key=key)["ContentLength"] == len(BODY)
    assert s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() == BODY
    part = s3.get_object(Bucket=BUCKET, Key=key, Range="bytes=10-19")
    assert part["Body"].read() == BODY[10:20]
    assert part["ContentRange"] == f"bytes 10-19/{len(BODY)}"
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/empty", Body=b"")
    assert s3.get_object(Bucket=BUCKET, Key=f"{prefix}/empty")["Body"].read() == b""
    listed = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    assert [item["Key"] for item in listed] == [f"{prefix}/empty", key]
    gone = {"Objects": [{"Key": f"{prefix}/empty"}]}
    s3.delete_objects(Bucket=BUCKET, Delete=gone)
    with pytest.raises(ClientError, match="404"):
        s3.head_object(Bucket=BUCKET, Key=f"{prefix}/empty")
    assert proxy.counts() == before


def test_passes_on_an_upload_in_parts(proxy: Proxy, prefix: str) -> None:
    s3 = s3_client(proxy.store)
    where = {"Bucket": BUCKET, "Key": f"{prefix}/parts"}
    upload = s3.create_multipart_upload(**where)["UploadId"]
    parts: list[dict[str, Any]] = []
    for number, size in ((1, 5 << 20), (2, 1000)):
        body = bytes([number]) * size
        sent = s3.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
    s3.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})
    whole = s3.get_object(**where)["Body"].read()
    assert whole == bytes([1]) * (5 << 20) + bytes([2]) * 1000


def test_a_client_that_waits_for_100_continue_gets_it(proxy: Proxy, client: Client) -> None:
    host, port = proxy.store.endpoint.removeprefix("http://").split(":")
    url = urlsplit(
        client.s3.generate_presigned_url("put_object", Params={"Bucket": BUCKET, "Key": client.key})
    )
    head = f"PUT {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: 3\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as link:
        link.sendall((head + "Expect: 100-continue\r\n\r\n").encode())
        assert link.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        link.sendall(b"abc")
        assert link.recv(100).startswith(b"HTTP/1.1 200 ")
    assert client.ask("GET").body == b"abc"


def test_a_conditional_write_is_the_stores_business(proxy: Proxy, prefix: str) -> None:
    s3 = s3_client(proxy.store)
    where = {"Bucket": BUCKET, "Key": f"{prefix}/once", "IfNoneMatch": "*"}
    s3.put_object(**where, Body=b"1")
    if proxy.store.kind == "moto":
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(**where, Body=b"2")
    else:
        s3.put_object(**where, Body=b"2")  # silently ignored: why it is tested against


# -- each fault ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "status"), [("slow_down", 503), ("throttle", 429)])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_refusals(
    store: Store, proxy: Proxy, client: Client, fault: str, status: int, method: str
) -> None:
    proxy.set(Faults.from_json({fault: 1.0, "limit": 1}))
    before = proxy.counts()[fault]
    answer = client.ask(method, BODY if method == "PUT" else None)
    assert answer.status == status
    assert b"<Error>" in answer.body
    assert stored(store, client) is None
    assert proxy.counts()[fault] == before + 1
    client.put()  # the limit is used up


def test_reset_before(store: Store, proxy: Proxy, client: Client) -> None:
    proxy.set(Faults(reset_before=1.0))
    with pytest.raises(ConnectionError):
        client.ask("PUT", BODY)
    with pytest.raises(ConnectionError):
        client.ask("GET")
    assert stored(store, client) is None


def test_reset_in_the_middle_of_a_download(proxy: Proxy, client: Client) -> None:
    client.put()
    proxy.set(Faults(reset_body=1.0))
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        client.ask("GET")


def test_reset_in_the_middle_of_an_upload(store: Store, proxy: Proxy, client: Client) -> None:
    proxy.set(Faults(reset_body=1.0))
    with pytest.raises(ConnectionError):
        client.ask("PUT", BODY)
    assert stored(store, client) is None


def test_reset_after_the_write_arrived(store: Store, proxy: Proxy, client: Client) -> None:
    proxy.set(Faults(reset_after=1.0))
    with pytest.raises(ConnectionError):
        client.ask("PUT", BODY)
    assert stored(store, client) == BODY


def test_stall(proxy: Proxy, client: Client) -> None:
    client.put()
    proxy.set(Faults(stall=1.0, stall_s=0.7))
    began = time.monotonic()
    assert client.ask("GET").body == BODY
    assert time.monotonic() - began > 0.7
    client.timeout_s = 0.2
    with pytest.raises(TimeoutError):
        client.ask("GET")


def test_truncated_body(proxy: Proxy, client: Client) -> None:
    client.put()
    proxy.set(Faults(truncate=1.0))
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.ask("GET")
    assert caught.value.partial == BODY[: len(BODY) // 2]
    assert caught.value.expected == len(BODY) // 2  # what Content-Length promised beyond that


def bits_apart(one: bytes, other: bytes) -> int:
    assert len(one) == len(other)
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def test_flipped_bit_in_a_download(proxy: Proxy, client: Client) -> None:
    client.put()
    proxy.set(Faults(flip=1.0))
    assert bits_apart(client.ask("GET").body, BODY) == 1
    assert bits_apart(client.ask("GET", Range="bytes=0-9").body, BODY[:10]) == 1
    proxy.set(Faults())
    assert client.ask("GET").body == BODY


def test_flipped_bit_in_an_upload(store: Store, proxy: Proxy, client: Client) -> None:
    """Neither server compares a body with what was signed, so the damage lies there."""
    proxy.set(Faults(flip=1.0))
    client.put()
    found = stored(store, client)
    assert found is not None
    assert bits_apart(found, BODY) == 1


def test_listings_are_never_flipped(proxy: Proxy, client: Client, prefix: str) -> None:
    client.put(b"x")
    proxy.set(Faults(flip=1.0))
    for _ in range(20):
        (item,) = client.s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
        assert item["Key"] == client.key


def test_latency(proxy: Proxy, client: Client) -> None:
    client.put(b"x")
    proxy.set(Faults(latency_s=0.1))
    began = time.monotonic()
    for _ in range(10):
        client.ask("GET")
    assert time.monotonic() - began > 0.5  # 1.0 on average; 0.5 has odds of one in thousands


# -- choosing, control, log ------------------------------------------------------------------------


def test_only_what_matches_is_disturbed(proxy: Proxy, client: Client) -> None:
    proxy.set(Faults(slow_down=1.0, only=r"^PUT .*/other"))
    client.put()
    proxy.set(Faults(slow_down=1.0, only=r"^PUT "))
    assert client.ask("PUT", BODY).status == 503
    assert client.ask("GET").status == 200


def test_the_log_tells_both_ends_of_a_request(proxy: Proxy, client: Client) -> None:
    log = proxy.log()
    log.fresh()
    client.put()
    proxy.set(Faults(throttle=1.0, limit=1))
    client.ask("GET")
    proxy.set(Faults(reset_before=1.0, limit=1))
    with pytest.raises(ConnectionError):
        client.ask("GET")
    entries = [entry for entry in log.fresh() if entry.key == client.key]
    assert [(e.event, e.method, e.status, e.fault, e.arrived) for e in entries] == [
        ("begin", "PUT", None, None, False),
        ("end", "PUT", 200, None, True),
        ("begin", "GET", None, None, False),
        ("end", "GET", 429, "throttle", False),
        ("begin", "GET", None, None, False),
        ("end", "GET", None, "reset_before", False),
    ]
    assert log.fresh() == []


def test_a_fault_that_there_is_not_is_refused(proxy: Proxy) -> None:
    connection = http.client.HTTPConnection(proxy.control.removeprefix("http://"))
    connection.request("PUT", "/faults", json.dumps({"slowdown": 1.0}))
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (400, b"no such fault: slowdown")


def test_the_same_seed_makes_the_same_faults_at_the_rates_that_were_set() -> None:
    asked = ask("PUT", "/bucket/key", 10, "")

    def draw(seed: int) -> list[str | None]:
        chooser = Chooser(MODERATE, seed)
        return [chooser.choose(asked) for _ in range(20_000)]

    drawn = draw(1)
    assert drawn == draw(1)
    assert drawn != draw(2)
    for kind in asked.possible:  # five standard deviations of the smallest rate: 0.25 points
        assert drawn.count(kind) / len(drawn) == pytest.approx(getattr(MODERATE, kind), abs=0.0035)


@pytest.mark.parametrize(
    ("method", "target", "length", "encoding", "upload", "download"),
    [
        ("GET", "/b/k", None, "", False, True),
        ("GET", "/b/k?x-id=GetObject", None, "", False, True),
        ("GET", "/b/?list-type=2&prefix=k", None, "", False, False),
        ("GET", "/b?list-type=2", None, "", False, False),
        ("GET", "/b/k?uploadId=1", None, "", False, False),
        ("HEAD", "/b/k", None, "", False, False),
        ("PUT", "/b/k", 5, "", True, False),
        ("PUT", "/b/k?partNumber=1&uploadId=2", 5, "", True, False),
        ("PUT", "/b/k?tagging", 5, "", False, False),
        ("PUT", "/b/k", 0, "", False, False),
        ("PUT", "/b/k", 5, "aws-chunked", False, False),
        ("PUT", "/b", 5, "", False, False),
        ("POST", "/b?delete", 5, "", False, False),
    ],
)
def test_what_is_an_objects_body(
    method: str, target: str, length: int | None, encoding: str, upload: bool, download: bool
) -> None:
    asked = ask(method, target, length, encoding)
    assert (asked.upload, asked.download) == (upload, download)
