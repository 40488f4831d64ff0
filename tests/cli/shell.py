"""``tessera-exp`` in this process, on a fabricated root."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tessera.cli.common import run_command
from tessera.cli.exp import exp

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench


class Shell:
    """Runs a command and keeps what it printed."""

    def __init__(self, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
        self._bench, self._capfd = bench, capfd

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = run_command(exp, [*arguments, "--root", self._bench.root.url])
        out, err = self._capfd.readouterr()
        return code, out, err

    def said(self, *arguments: str) -> str:
        """What it printed, where it succeeds and complains of nothing."""
        code, out, err = self(*arguments)
        assert (code, err) == (0, "")
        return out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.said(*arguments, "--json"))
