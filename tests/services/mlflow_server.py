"""A real ``mlflow server`` for tests, and something in front of it that makes it unreliable.

with mlflow_server(database_uri, folder) as server, Unreliable(server.url, seed=1) as front:
    front.rates = {"500": 0.1, "lost": 0.1}
    sync(root, front.url)
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PATIENCE_S = 120.0
FAULTS = ("refused", "hang", "500", "503", "403", "404", "lost")
"""``lost``: it is done, and the answer says 500. ``refused``: the connection is reset."""


@dataclass
class MlflowServer:
    """A server with one worker; ``kill`` is -9, and ``start`` starts it again at the same port."""

    uri: str
    folder: Path
    port: int
    _process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        """Start it; with ``wait`` return when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.uri]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with (self.folder / "mlflow-server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=kept | quiet, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            if self._process is None or self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError((self.folder / "mlflow-server.log").read_text("utf-8")[-2000:])

    def kill(self) -> None:
        """Kill it and its worker with -9."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextmanager
def mlflow_server(uri: str, folder: Path) -> Iterator[MlflowServer]:
    """Run ``mlflow server`` on that database until the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = MlflowServer(uri, folder, port)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Unreliable:
    """Passes requests on to a server, with faults at ``rates`` (0 to 1 by name)."""

    def __init__(self, upstream: str, seed: int) -> None:
        self._upstream = upstream.removeprefix("http://")
        self._random = random.Random(seed)
        self.rates: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Unreliable:
        """Serve from now on."""
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and let go of those that hang."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def choose(self) -> str | None:
        """The fault of the next request."""
        draw = self._random.random()
        for name, rate in self.rates.items():
            draw -= rate
            if draw < 0:
                self.counts[name] += 1
                return name
        return None

    def pass_on(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        """Status and content of the server's answer; 502 where it does not answer."""
        kept = {k: v for k, v in headers.items() if k.lower() not in ("host", "connection")}
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(method, path, body, kept)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 502, b""
        finally:
            connection.close()

    def hang(self) -> None:
        """Wait until nobody listens any more."""
        self._closing.wait(30)


def _handler(front: Unreliable) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = front.choose()
            if fault == "hang":
                front.hang()
            if fault in ("refused", "hang"):
                reset = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                self.close_connection = True
                return
            status, content = 500, b""
            if fault is None or fault == "lost":
                status, content = front.pass_on(self.command, self.path, self.headers, body)
            if fault is not None:
                status, content = 500 if fault == "lost" else int(fault), b""
            with suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = answer  # noqa: N815

    return Handler
