"""Servers and proxies for the tests of the proxy itself."""

from tests.services.fixtures import prefix, proxy, standing_proxy, store

__all__ = ["prefix", "proxy", "standing_proxy", "store"]
