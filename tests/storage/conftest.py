from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.storage import CHUNK, Root
from tests.storage import tiny_s3
from tests.storage.helpers import make_root
from tests.storage.tiny_s3 import TinyS3


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "folder":
        return Root(str(tmp_path / "root"))
    return Root(f"memory://{secrets.token_hex(8)}", longest_wait_s=0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "root"))


@pytest.fixture(scope="session")
def tiny_environment() -> Iterator[tuple[TinyS3, dict[str, str]]]:
    with tiny_s3.serve() as found:
        yield (
            found,
            {
                "AWS_ACCESS_KEY_ID": "a-key-for-tests-only",
                "AWS_SECRET_ACCESS_KEY": "a-secret-for-tests-only",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.server_port}",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            },
        )


@pytest.fixture(scope="session")
def standing_root(tiny_environment: tuple[TinyS3, dict[str, str]]) -> Root:
    """A root whose connection is made once: that takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tiny_environment[1].items():
            patch.setenv(name, value)
        found = make_root()
        found.files("")
    return found


@pytest.fixture
def server(
    tiny_environment: tuple[TinyS3, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> TinyS3:
    for name, value in tiny_environment[1].items():
        monkeypatch.setenv(name, value)
    tiny_environment[0].forget()
    return tiny_environment[0]


@pytest.fixture
def s3_root(server: TinyS3, standing_root: Root) -> Root:
    return standing_root


@pytest.fixture
def big(tmp_path: Path) -> Path:
    (tmp_path / "big.bin").write_bytes(os.urandom(2 * CHUNK + 12345))
    return tmp_path / "big.bin"
