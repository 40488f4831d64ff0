"""Fixtures for tests against real S3 servers; a folder's conftest.py imports what it uses.

One server of each kind and one proxy in front of it live for a whole session, so a test uses a
prefix of its own (``prefix``). The proxy does nothing until a test asks it to (``proxy.set``), and
forgets that afterwards.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator

import pytest

from tests.services.faults import NONE
from tests.services.proxied import Proxy, proxy_for
from tests.services.stores import KINDS, Store, serve


@pytest.fixture(scope="session", params=KINDS)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    """A running S3 server with an empty bucket: every test runs against each kind."""
    with serve(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


@pytest.fixture(scope="session")
def standing_proxy(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The proxy of ``store`` for the whole session; tests take ``proxy``."""
    with proxy_for(store, tmp_path_factory.mktemp(f"proxy-{store.kind}"), seed=20261122) as found:
        yield found


@pytest.fixture
def proxy(standing_proxy: Proxy) -> Iterator[Proxy]:
    """A proxy in front of ``store`` that injects nothing yet."""
    standing_proxy.set(NONE)
    yield standing_proxy
    standing_proxy.set(NONE)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Where this test alone keeps its objects."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())
    return f"{name[:40].strip('-')}-{uuid.uuid4().hex[:8]}"
