"""A SkyPilot of the tests' own: its HOME, its catalogs, no network, one process for all plans."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent

# Names as `sky check` prints them. Written in lower case, SkyPilot 0.14.1 disables every provider
# as soon as a task names one that is not enabled.
CONFIG = "allowed_clouds: [Vast, RunPod, Lambda]\n"


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of `plan_tasks.py`: stock SkyPilot on the task YAMLs, some eight seconds once.

    A catalog without a checksum beside it counts as edited by hand and is never fetched again. The
    proxy is a port that nothing listens on, so that a request which we overlooked fails at once.
    """
    return ask("plan_tasks.py", tmp_path_factory)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of `plan_commands.py`: `tessera plan` and `launch` on stock SkyPilot."""
    return ask("plan_commands.py", tmp_path_factory)


def ask(program: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program writes, run in a HOME with seeded catalogs and without a network."""
    home = tmp_path_factory.mktemp("skypilot")
    (home / ".sky").mkdir()
    (home / ".sky" / "config.yaml").write_text(CONFIG)
    (home / ".tessera").mkdir()
    for name in ("env", "run-tessera-configure-first"):
        (home / ".tessera" / name).touch()
    shutil.copytree(HERE / "catalogs", home / ".sky" / "catalogs" / "v8")
    answers = home / "answers.json"
    # SkyPilot asks whether there is an rsync; a dry launch copies nothing, so any program will do.
    tools = home / "tools"
    tools.mkdir()
    (tools / "rsync").symlink_to("/bin/true")
    dead_proxy = "http://127.0.0.1:9"
    environment = {
        "PATH": f"{os.environ['PATH']}{os.pathsep}{tools}",
        "HOME": str(home),
        "SKY_RUNTIME_DIR": str(home),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "HTTP_PROXY": dead_proxy,
        "HTTPS_PROXY": dead_proxy,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / program), str(REPOSITORY), str(answers)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Failed to fetch" not in done.stdout  # SkyPilot's log would spoil what programs read
    fetched = list(home.rglob("*.md5"))
    assert not fetched, f"SkyPilot fetched a catalog instead of reading the seeded one: {fetched}"
    result: dict[str, Any] = json.loads(answers.read_text())
    return result
