"""Kill a trainer again and again while its store misbehaves, and compare with an undisturbed run.

    python -m tests.chaos                                  both stores, 40 kills on each
    python -m tests.chaos --kills 10 --store moto --seed 7
    python -m tests.chaos --store folder                   no server: a plain folder

The seed decides the moments, signals and machines that are planned and the draws of faults; which
request meets which fault also depends on how fast this machine is. The exit code is 0 only if every
check holds and every kill came to pass.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.report import Progress, as_json, show
from tests.chaos.run import Outcome, Setting, prepare, run_store
from tests.services.faults import MODERATE, NONE
from tests.services.stores import KINDS
from tests.services.trainers import Forker


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=40, help="on each store (default: 40)")
    parser.add_argument("--store", choices=(*KINDS, "folder", "both"), default="both")
    parser.add_argument("--seed", type=int, default=None, help="default: another each time")
    parser.add_argument("--no-faults", action="store_true", help="kills only")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="the result as JSON")
    parser.add_argument("--keep", action="store_true", help="leave the working folder behind")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    stores = KINDS if given.store == "both" else (given.store,)
    faults = NONE if given.no_faults else MODERATE
    setting = Setting(given.kills, seed, faults)
    print(f"seed {seed}, {given.kills} kills on each of: {', '.join(stores)}", flush=True)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="tessera-chaos-"))
    try:
        progress = Progress(given.kills * len(stores))
        with Forker() as forker:
            bench = prepare(forker, folder, setting)
            outcomes: list[Outcome] = [
                run_store(store, forker, bench, folder / store, setting, progress)
                for store in stores
            ]
    finally:
        if given.keep:
            print(f"everything is left in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    show(outcomes, time.monotonic() - began)
    if given.out is not None:
        given.out.write_text(as_json(outcomes, setting), "utf-8")
        print(f"written to {given.out}")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
