"""What the tests of storage share: sentences, what lies on the disk, and a store that fails."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from tessera.errors import TesseraError
from tessera.storage import Root
from tessera.storage.stores import FsspecStore


def sentence(error: pytest.ExceptionInfo[TesseraError]) -> str:
    """What the person reads, after checking that it is one sentence on one line."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def on_disk(root: Root) -> list[str]:
    """Every file below a local root, hidden ones included."""
    base = Path(root.base)
    return sorted(str(p.relative_to(base)) for p in base.rglob("*") if p.is_file())


def file_system(root: Root) -> Any:
    """What fsspec made for a root that is not in S3."""
    assert isinstance(root.store, FsspecStore)
    return root.store.fs


def replace_file_system(root: Root, fs: Any) -> None:
    """Put ``fs`` between a root and what is stored."""
    assert isinstance(root.store, FsspecStore)
    root.store.fs = fs


class FaultyStore:
    """A file system whose next calls of one method fail, each with the next of ``faults``."""

    def __init__(self, inner: Any, method: str, *faults: Exception) -> None:
        self._inner, self._method, self._faults = inner, method, list(faults)
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name != self._method:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self._faults:
                raise self._faults.pop(0)
            return found(*args, **kwargs)

        return call


def faulty(method: str, *faults: Exception, attempts: int = 4) -> tuple[Root, FaultyStore]:
    """A root in memory with one object ``a/b.json``, and what fails below it."""
    root = Root(f"memory://{secrets.token_hex(8)}", attempts=attempts, longest_wait_s=0.0)
    root.publish("a/b.json", b"{}")
    store = FaultyStore(file_system(root), method, *faults)
    replace_file_system(root, store)
    return root, store


def make_root(**options: Any) -> Root:
    """A root in ``tiny_s3``; the fixture ``server`` says in the environment where that is."""
    return Root(
        "s3://bucket/p", **{"timeout_s": 0.5, "longest_wait_s": 0.01, "attempts": 4} | options
    )
