"""A webhook on this machine: a real HTTP server whose answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "T0PSECRET/B0NNIE/x7Yq93kfUwp"


@dataclass
class Receiver:
    """Keeps what was posted; ``answers`` are status codes in turn, the last one for all after it.

    A status of 0 never answers, -1 answers a byte now and then without end. ``url`` holds the
    secret.
    """

    answers: list[int] = field(default_factory=lambda: [200])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, path: str, body: bytes) -> int:
        """The answer to one request; what was refused is not among ``bodies``."""
        with self._lock:
            status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            self.paths.append(path)
            if 200 <= status < 300:
                self.bodies.append(json.loads(body))
            return status

    @property
    def kinds(self) -> list[str]:
        """Of the alerts that it took."""
        return [body["kind"] for body in self.bodies]


@contextmanager
def receiving(*answers: int) -> Iterator[Receiver]:
    """A running receiver."""
    receiver = Receiver(list(answers) or [200])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/json"
            status = receiver.take(self.path, body)
            if status == 0:
                receiver.released.wait(60)
                return
            if status < 0:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                with suppress(OSError):
                    while not receiver.released.wait(0.05):
                        self.wfile.write(b".")
                return
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    receiver.url = f"http://127.0.0.1:{server.server_port}/services/{SECRET}"
    try:
        yield receiver
    finally:
        receiver.released.set()
        server.shutdown()
        server.server_close()
