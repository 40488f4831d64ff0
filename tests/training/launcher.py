"""Starts ``tessera`` commands in processes of their own, without the seconds that torch takes.

It has imported everything, runs no thread, and forks for every order that it reads; it answers with
the process id and, once the process has ended, its exit code. What a child does is what the command
does, and a kill -9 is one. An order may set variables of the environment, and disturb the training
from inside (``disturb.py``).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import s3fs  # noqa: F401 - what takes the seconds

import tessera.training.session  # noqa: F401 - the same, and so is measuring the peak
from tessera.cli.common import run_command
from tessera.cli.main import tessera as command
from tessera.model.peak import Peak
from tessera.training import attempt
from tests.training.disturb import Disturbance

PEAK = Peak(1e12, "the tests")


def run(order: dict[str, Any]) -> int:
    """The child's life."""
    for descriptor, end in ((1, "out"), (2, "err")):
        file = os.open(f"{order['output']}.{end}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    os.environ.update(order["environ"])
    Disturbance(**order["disturb"]).install(setattr)
    code = run_command(command, order["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


setattr(attempt, "peak_flops", lambda device, dtype: PEAK)  # noqa: B010 - mypy minds the other way
for name in [name for name in os.environ if name.startswith("TESSERA_")]:
    del os.environ[name]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(run(json.loads(line)))
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
