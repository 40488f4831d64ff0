"""``python -m tessera.cloud.refuse --found "1 x NVIDIA GeForce RTX 5090"``: what sky/run.sh calls.

It runs on a machine on which tessera is not installed, with the few packages that storage needs.
It records the refusal in the root, says one sentence, and leaves with 75, or with 2 at the limit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tessera.cloud.machine import describe_machine
from tessera.cloud.nvidia import list_gpus
from tessera.cloud.refusals import RefusedTooOftenError, refuse
from tessera.errors import TesseraError
from tessera.storage import open_root

WANTED_VARIABLE, COUNT_VARIABLE = "TESSERA_GPU", "TESSERA_GPUS"


def main(arguments: Sequence[str] | None = None) -> int:
    """Refuse this machine; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tessera.cloud.refuse", description=__doc__)
    parser.add_argument("--found", required=True, help="the GPUs of this machine")
    parser.add_argument("--reason", default="another GPU than asked for", help="a clause")
    given = parser.parse_args(arguments)
    found = given.found
    wanted = f"{os.environ.get(COUNT_VARIABLE) or 1} x {os.environ.get(WANTED_VARIABLE) or 'GPU'}"
    try:
        error = refuse(
            open_root(),
            describe_machine(hardware=(found, 1)),
            wanted=wanted,
            found=found,
            reason=given.reason,
            gpus=[gpu.uuid for gpu in list_gpus()[0]],
        )
    except TesseraError as broken:  # a root or a variable that cannot be used: nobody can count
        error = RefusedTooOftenError(
            f"This machine is refused (wanted {wanted}, found {found}), and nobody can count that, "
            f"so this is final: {broken}"
        )
    print(f"Error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
