"""Into the lab's own namespaces: processes, network, mounts. Nothing started there outlives it.

The kernel ends every process of a process namespace with its first, and that one with whoever
started it: after Ctrl-C, a kill or a crash nothing is left running. A private /tmp keeps apart what
SkyPilot puts under fixed names there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.lab.network import run
from tests.services.proxied import CHECKOUT

_MARK = "TESSERA_LAB_INSIDE"


def inside() -> bool:
    """Whether this process is in the lab already."""
    return _MARK in os.environ


def enter(arguments: list[str]) -> int:
    """Run ``python -m tests.lab ARGUMENTS`` inside; its exit code."""
    first = [sys.executable, "-m", "tests.lab.init", sys.executable, "-m", "tests.lab", *arguments]
    namespaces = ["--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, *first]
    environment = {**os.environ, _MARK: "1", "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return process.wait()
    except KeyboardInterrupt:
        print("The lab was interrupted; nothing of it is left running.", file=sys.stderr)
        return 130
    finally:
        process.kill()  # and with it everything inside
        process.wait()


def private_tmp(folder: Path) -> None:
    """A layer in memory over /tmp, seen by the lab alone; the checkout may lie below /tmp."""
    folder.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", str(folder))
    for name in ("upper", "work"):
        (folder / name).mkdir()
    checkout = os.open(CHECKOUT, os.O_PATH)
    layers = f"lowerdir=/tmp,upperdir={folder}/upper,workdir={folder}/work"
    run("mount", "-t", "overlay", "overlay", "-o", layers, "/tmp")
    if CHECKOUT.is_relative_to("/tmp"):
        run(
            "mount",
            "--no-canonicalize",
            "--bind",
            f"/proc/{os.getpid()}/fd/{checkout}",
            str(CHECKOUT),
        )
    os.close(checkout)
