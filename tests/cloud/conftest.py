"""A pretend vast.ai, and machines on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.services.vast import PretendVast

KEY = "0123456789abcdef-the-key"

Rent = Callable[..., int]


@pytest.fixture
def vast() -> Iterator[PretendVast]:
    with PretendVast() as server:
        server.key = KEY
        yield server


@pytest.fixture
def rent(vast: PretendVast) -> Iterator[Rent]:
    """Rents a machine and returns the instance's id."""
    http = httpx.Client(base_url=vast.url, headers={"Authorization": f"Bearer {KEY}"})

    def rent_one(ask: int = 101, label: str = "job-0123abcd-head", **body: object) -> int:
        answer = http.put(f"/api/v0/asks/{ask}/", json={"label": label, "disk": 100, **body})
        return int(answer.raise_for_status().json()["new_contract"])

    with http:
        yield rent_one


@pytest.fixture
def host(vast: PretendVast, tmp_path: Path) -> dict[str, str]:
    """The variables of a job on a host where SkyPilot has put the key; no container named yet."""
    file = tmp_path / "home" / ".vast_api_key"
    file.parent.mkdir()
    file.write_text(f"{KEY}\n")
    return {"HOME": str(file.parent), "VAST_URL": vast.url}
