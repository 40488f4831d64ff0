"""Servers, proxies and a process that starts trainers, for the tests against real S3."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.fixtures import prefix, proxy, standing_proxy, store
from tests.services.trainers import Forker

__all__ = ["bench", "prefix", "proxy", "standing_proxy", "store"]

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

bench = importlib.import_module("fabricate").bench


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Where commands of their own process come from."""
    with Forker() as found:
        yield found
