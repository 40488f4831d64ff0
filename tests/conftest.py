"""What all tests share: no test sees this machine's own settings, and in CI a skip is a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_OURS = ("TESSERA_", "MLFLOW_", "AWS_", "SKYPILOT_", "VAST_")


@pytest.fixture(autouse=True)
def clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No variable of the project or of a cloud leaks in; caches go to a folder of the session."""
    for name in list(os.environ):
        if name.startswith(_OURS) or name == "COLUMNS":  # the width of whoever runs the tests
            monkeypatch.delenv(name)
    monkeypatch.setenv("TESSERA_CACHE", str(_cache(tmp_path_factory)))
    monkeypatch.setenv("TESSERA_ENV_FILE", os.devnull)  # not what `tessera configure` wrote here
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def _cache(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "cache"
    folder.mkdir(exist_ok=True)
    return folder


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Under ``CI`` a skipped test fails the run: the project installs all that tests need."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("skipped tests count as failures in CI", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
