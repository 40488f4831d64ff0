"""Debian packages that the slower lanes need: installed by the lanes themselves, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it before a new package starts a service


class PackageError(Exception):
    """A program is missing and cannot be installed; says what to do."""


def missing(programs: Mapping[str, str]) -> list[str]:
    """The packages of those programs that are not there; ``programs`` maps program to package.

    A program is a name on the path, or a path that may hold ``*`` (``/usr/lib/x/*/bin/y``).
    """
    return sorted({package for program, package in programs.items() if not find(program)})


def find(program: str) -> str | None:
    """Where the program is, or None."""
    if "/" not in program:
        return shutil.which(program, path=PATH)
    places = sorted(Path("/").glob(program.lstrip("/")))
    return str(places[-1]) if places else None


def install(programs: Mapping[str, str]) -> list[str]:
    """Install the packages of those programs that are not there, and start nothing of them.

    Returns the packages that were installed. Raises ``PackageError`` without root or apt.
    """
    wanted = missing(programs)
    if not wanted:
        return []
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise PackageError(
            f"{', '.join(wanted)} should be installed, which needs root on Debian; run "
            f"`apt-get install {' '.join(wanted)}` as root."
        )
    ours = not _POLICY.exists()
    if ours:
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *wanted],
        ):
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    finally:
        if ours:
            _POLICY.unlink()
    return wanted
