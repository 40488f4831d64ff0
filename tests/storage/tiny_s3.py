"""A small S3 server in this process, so that a test can say what each answer looks like.

It knows what ``tessera.storage`` asks for and verifies no signature; real servers are tested
against in ``tests/full``. ``faults`` is a list of (pattern, fault): the next request whose
"METHOD /path?query" contains the pattern meets that fault, which is then used up.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Answer:
    """What goes back: its ``cut`` last bytes are left out although Content-Length counts them."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    reset: bool = False


K = TypeVar("K")
Fault = Callable[["TinyS3", "Handler", Answer], None]
"""Changes the answer, after the request was served."""


def error(status: int, code: str) -> Answer:
    """An S3 error document."""
    return Answer(status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())


def md5(data: bytes) -> str:
    """Hex MD5."""
    return hashlib.md5(data).hexdigest()


class TinyS3(ThreadingHTTPServer):
    """Objects in memory; ``requests`` holds "METHOD /path?query" of all so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Begin anew, empty and without faults."""
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, Fault]] = []
        self.before: list[tuple[str, Answer]] = []
        self.etag: Callable[[bytes], str] = md5
        self.damage: Callable[[bytes], bytes] | None = None

    def refuse(self, pattern: str, answer: Answer, times: int = 1) -> None:
        """Answer the next ``times`` matching requests so, without doing what they ask."""
        self.before += [(pattern, answer)] * times

    def disturb(self, pattern: str, fault: Fault, times: int = 1) -> None:
        """Serve the next ``times`` matching requests, and change the answers."""
        self.faults += [(pattern, fault)] * times

    def count(self, pattern: str) -> int:
        """How many requests so far contain ``pattern`` (a regular expression)."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def store(self, key: str, data: bytes, etag: str | None = None) -> str:
        """Put an object there, as the ``damage`` of the moment has it."""
        data = self.damage(data) if self.damage else data
        self.objects[key] = (data, etag or self.etag(data))
        return self.objects[key][1]

    def taken(self, waiting: list[tuple[str, K]], request: str) -> K | None:
        """The first of ``waiting`` that matches, used up."""
        with self.lock:
            for index, (pattern, found) in enumerate(waiting):
                if re.search(pattern, request):
                    del waiting[index]
                    return found
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: TinyS3

    def serve(self) -> None:
        """One request."""
        request = f"{self.command} {self.path}"
        self.sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.requests.append(request)
        answer = self.server.taken(self.server.before, request)
        if answer is None:
            answer = self.answer()
            if fault := self.server.taken(self.server.faults, request):
                fault(self.server, self, answer)
        if answer.reset:
            self.close_connection = True
            return
        try:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: len(answer.body) - answer.cut])
        except ConnectionError:
            self.close_connection = True
        self.close_connection |= bool(answer.cut)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve  # noqa: N815

    def answer(self) -> Answer:
        """What a store without faults says."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        if bucket != "bucket":
            return error(404, "NoSuchBucket")
        act = getattr(self, f"{self.command.lower()}_{'object' if key else 'bucket'}")
        found: Answer = act(key, query)
        return found

    def get_bucket(self, key: str, query: dict[str, str]) -> Answer:
        """A page of a listing."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = sorted(k for k in self.server.objects if k.startswith(prefix))
        keys = [k for k in keys if k > query.get("continuation-token", "")]
        most = int(query.get("max-keys", "3"))
        xml, folders = "", set()
        for name in keys[:most]:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                xml += f"<Contents><Key>{escape(name)}</Key><Size>1</Size></Contents>"
        for name in sorted(folders):
            xml += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        more = len(keys) > most
        xml += f"<IsTruncated>{str(more).lower()}</IsTruncated>"
        if more:
            xml += f"<NextContinuationToken>{escape(keys[most - 1])}</NextContinuationToken>"
        return Answer(body=f"<ListBucketResult>{xml}</ListBucketResult>".encode())

    def get_object(self, key: str, query: dict[str, str]) -> Answer:
        """An object or a range of it."""
        if key not in self.server.objects:
            return error(404, "NoSuchKey")
        data, etag = self.server.objects[key]
        headers = {"ETag": f'"{etag}"'}
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(span[1]), int(span[2])
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return Answer(206, data[first : last + 1], headers)
        return Answer(200, data, headers)

    def head_object(self, key: str, query: dict[str, str]) -> Answer:
        """What there is to know about an object."""
        answer = self.get_object(key, query)
        answer.headers["Content-Length"] = str(len(answer.body))
        return answer

    def put_object(self, key: str, query: dict[str, str]) -> Answer:
        """An object, or a part of one."""
        if "partNumber" in query:
            data = self.server.damage(self.sent) if self.server.damage else self.sent
            self.server.parts[query["uploadId"]][int(query["partNumber"])] = data
            return Answer(headers={"ETag": f'"{self.server.etag(data)}"'})
        if self.headers.get("If-None-Match") == "*" and key in self.server.objects:
            return error(412, "PreconditionFailed")
        return Answer(headers={"ETag": f'"{self.server.store(key, self.sent)}"'})

    def post_object(self, key: str, query: dict[str, str]) -> Answer:
        """The beginning or the end of an upload in parts."""
        if "uploads" in self.path.partition("?")[2]:
            upload = f"upload-{len(self.server.requests)}"
            self.server.parts[upload] = {}
            xml = f"<UploadId>{upload}</UploadId>"
            return Answer(
                body=f"<InitiateMultipartUploadResult>{xml}"
                "</InitiateMultipartUploadResult>".encode()
            )
        parts = self.server.parts.pop(query["uploadId"], None)
        if parts is None:
            return error(404, "NoSuchUpload")
        digests = b"".join(bytes.fromhex(md5(data)) for _, data in sorted(parts.items()))
        whole = b"".join(data for _, data in sorted(parts.items()))
        etag = f"{md5(digests)}-{len(parts)}" if self.server.etag is md5 else None
        self.server.objects[key] = (whole, etag or self.server.etag(whole))
        xml = f"<ETag>{self.server.objects[key][1]}</ETag>"
        return Answer(
            body=f"<CompleteMultipartUploadResult>{xml}</CompleteMultipartUploadResult>".encode()
        )

    def delete_object(self, key: str, query: dict[str, str]) -> Answer:
        """An object or an upload goes."""
        if "uploadId" in query:
            self.server.parts.pop(query["uploadId"], None)
        else:
            self.server.objects.pop(key, None)
        return Answer(204)

    def log_message(self, *_: object) -> None:
        """Nothing on the test's output."""


@contextmanager
def serve() -> Iterator[TinyS3]:
    """A server on a free loopback port."""
    server = TinyS3()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def flipped(data: bytes) -> bytes:
    """One bit of the middle turned over."""
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def flip(_: TinyS3, __: Handler, answer: Answer) -> None:
    """A bit turns over on the way back."""
    answer.body = flipped(answer.body)


def cut(_: TinyS3, __: Handler, answer: Answer) -> None:
    """Half of the answer arrives."""
    answer.cut = len(answer.body) // 2


def lose(_: TinyS3, __: Handler, answer: Answer) -> None:
    """What was asked is done; the answer is lost."""
    answer.reset = True


def nonsense(_: TinyS3, __: Handler, answer: Answer) -> None:
    """Success, and XML that breaks off."""
    answer.body = b"<ListBucketResult><Contents><Key>a"


def nothing(_: TinyS3, __: Handler, answer: Answer) -> None:
    """Success, and no body at all."""
    answer.body = b""


def stall(_: TinyS3, __: Handler, answer: Answer) -> None:
    """Silence for longer than a test's root waits."""
    time.sleep(1.5)
    answer.reset = True


def drip(_: TinyS3, handler: Handler, answer: Answer) -> None:
    """A byte now and then: never silent for long, and never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _step in range(60):
            handler.wfile.write(b"x")
            time.sleep(0.1)
    except ConnectionError:
        pass
    answer.reset = True
