from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tessera.storage import Root


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "folder":
        return Root(str(tmp_path / "root"))
    return Root(f"memory://{secrets.token_hex(8)}", longest_wait_s=0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "root"))
