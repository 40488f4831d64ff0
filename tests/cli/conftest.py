"""Runs made up for tests; see ``tests/tracking/fabricate.py``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

bench = importlib.import_module("fabricate").bench


@pytest.fixture
def shell(bench: Any, capfd: pytest.CaptureFixture[str]) -> Any:
    """``tessera-exp`` in this process, on the fabricated root."""
    from tests.cli.shell import Shell

    return Shell(bench, capfd)
