"""Servers, proxies and a process that starts trainers, for the tests against real S3."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.fixtures import prefix, proxy, standing_proxy, store
from tests.services.trainers import Forker

__all__ = ["prefix", "proxy", "standing_proxy", "store"]


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Where commands of their own process come from."""
    with Forker() as found:
        yield found
