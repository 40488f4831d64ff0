"""A store in memory that refuses some methods, or has a clock of its own."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@contextmanager
def pretend_s3(
    refuse: str = "",
    methods: str = "GET HEAD PUT POST DELETE",
    ahead_s: float = 0.0,
    put_s: float = 0.0,
) -> Iterator[dict[str, str]]:
    """The environment that names it; ``methods`` are answered 403 with the code ``refuse``.

    Each PUT takes ``put_s`` seconds, however many there are at once.
    """
    objects: dict[str, bytes] = {}
    tags: dict[str, str] = {}
    parts: dict[str, dict[int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if refuse and self.command in methods.split():
                self.reply(403, f"<Error><Code>{refuse}</Code></Error>".encode())
                return
            address = urlsplit(self.path)
            query = parse_qs(address.query, keep_blank_values=True)
            prefix = query.get("prefix", [""])[0]
            if self.command == "PUT":
                time.sleep(put_s)
            if "list-type" in address.query:
                bucket = address.path.rstrip("/")
                keys = [k for k in objects if k.startswith(f"{bucket}/{prefix}")]
                found = "".join(
                    f"<Contents><Key>{k[len(bucket) + 1 :]}</Key></Contents>" for k in keys
                )
                self.reply(
                    200,
                    f"<ListBucketResult>{found}<IsTruncated>false</IsTruncated>"
                    "</ListBucketResult>".encode(),
                )
            elif "uploads" in query:
                parts[address.path] = {}
                self.reply(
                    200,
                    b"<InitiateMultipartUploadResult><UploadId>u</UploadId>"
                    b"</InitiateMultipartUploadResult>",
                )
            elif "partNumber" in query:
                parts[address.path][int(query["partNumber"][0])] = sent
                self.reply(200, tag=hashlib.md5(sent).hexdigest())
            elif self.command == "POST":
                whole = [part for _, part in sorted(parts.pop(address.path).items())]
                digests = b"".join(hashlib.md5(part).digest() for part in whole)
                tag = f"{hashlib.md5(digests).hexdigest()}-{len(whole)}"
                objects[address.path], tags[address.path] = b"".join(whole), tag
                self.reply(
                    200,
                    f"<CompleteMultipartUploadResult><ETag>{tag}</ETag>"
                    "</CompleteMultipartUploadResult>".encode(),
                )
            elif self.command == "PUT":
                tags[address.path] = hashlib.md5(sent).hexdigest()
                objects[address.path] = sent
                self.reply(200, tag=tags[address.path])
            elif self.command == "DELETE":
                objects.pop(address.path, None)
                self.reply(204)
            elif address.path in objects:
                data, status = objects[address.path], 200
                if span := self.headers.get("Range"):
                    start, end = map(int, span.removeprefix("bytes=").split("-"))
                    data, status = data[start : end + 1], 206
                self.reply(status, data, tags[address.path])
            else:
                self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")

        def reply(self, status: int, body: bytes = b"", tag: str = "") -> None:
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            if tag:
                self.send_header("ETag", f'"{tag}"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def __getattr__(self, name: str) -> object:
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "key-id",
            "AWS_SECRET_ACCESS_KEY": "secret-key",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.shutdown()
        server.server_close()
