"""Starts ``tessera`` commands in processes of their own, without the seconds that torch takes.

The same idea as ``tests/training/launcher.py``, for callers that need more than a cache folder: an
order carries the whole environment that the command sees, so each can be another machine.

It has imported everything and runs no thread. For every order (a JSON line: ``arguments``,
``environment``, ``output``, ``disturb``) it forks, answers with the process id and, once that
process has ended, with its exit code (negative: the signal) and when it ended. The imports must
stay free of threads; what a child does is what the command does, and a kill -9 of it is one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import tessera.model.peak as peak_module
from tessera.model.peak import Peak


def _peak(*_: object, **__: object) -> Peak:
    return Peak(1e12, "the tests")


# Before anything imports it: half of a tiny run would be the measurement of this machine's peak.
peak_module.peak_flops = _peak

import tessera.training.session  # noqa: E402, F401 - what takes the seconds
from tessera.cli.common import run_command  # noqa: E402
from tessera.cli.main import tessera as command  # noqa: E402
from tests.training.disturb import Disturbance  # noqa: E402


def run(order: dict[str, Any]) -> int:
    """The child's life."""
    for descriptor, end in ((1, "out"), (2, "err")):
        file = os.open(f"{order['output']}.{end}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    Disturbance(**order["disturb"]).install(setattr)
    code = run_command(command, order["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    """Read orders until there are no more."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                os._exit(run(order))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.time()]), flush=True)


if __name__ == "__main__":
    main()
