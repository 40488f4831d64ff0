"""Which code this is: the commit that runs and corpora are traced back to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def code_commit(folder: Path = Path(__file__).parent) -> str | None:
    """Commit of the checkout that the package in ``folder`` is tracked in; None outside of one.

    ``-dirty`` is appended if a Python file of the package differs from it or is not tracked. An
    installed copy inside somebody else's repository is not tracked there, and gives None.
    """
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # only looking: take no lock for it

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            check=True,
            env=environment,
            text=True,
            timeout=30,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
