"""Rent machines of a pretended vast.ai with stock SkyPilot, and train on them: docs/lab.md.

    python -m tests.lab                     every scenario
    python -m tests.lab plain refused       these

Needs root on Linux. The exit code is 0 only if every scenario found what it expects.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.lab.bake import bake
from tests.lab.enter import enter, inside
from tests.lab.lab import Failure, Lab, build, say, show_logs
from tests.lab.scenarios import GROUPS, Scenario


@dataclass(frozen=True)
class Outcome:
    """What became of one scenario."""

    name: str
    passed: bool
    found: str
    seconds: float


def main() -> int:
    """Entry point."""
    names = [scenario.name for group in GROUPS for scenario in group]
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(names)}; default: all")
    wanted = parser.parse_args().scenario or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        print("The lab needs root on Linux: it makes namespaces and mounts.", file=sys.stderr)
        return 2
    image = bake()
    if not inside():
        return enter(sys.argv[1:])
    began = time.monotonic()
    with build(image) as lab:
        outcomes = [Outcome("lab", True, "set up", time.monotonic() - began)]
        say(f"the lab is up after {outcomes[0].seconds:.0f} s")
        for group in GROUPS:
            outcomes += play(lab, [scenario for scenario in group if scenario.name in wanted])
    outcomes.append(Outcome("all", True, "", time.monotonic() - began))
    show(outcomes)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def play(lab: Lab, group: Sequence[Scenario]) -> list[Outcome]:
    """The scenarios of a group at the same time."""
    if not group:
        return []
    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(lambda scenario: play_one(lab, scenario), group))


def play_one(lab: Lab, scenario: Scenario) -> Outcome:
    """One to its end; a failing one shows what was printed and logged meanwhile."""
    began = time.monotonic()
    try:
        found, passed = scenario.play(lab), True
    except Failure as failure:
        found, passed = f"FAILED: {failure}", False
    except Exception as error:
        traceback.print_exc()
        found, passed = f"FAILED: {type(error).__name__}: {error}", False
    outcome = Outcome(scenario.name, passed, found, time.monotonic() - began)
    say(f"{scenario.name}: {outcome.seconds:.0f} s: {found}")
    if not passed:
        show_logs(lab, scenario.name)
    return outcome


def show(outcomes: list[Outcome]) -> None:
    """The table at the end."""
    table = Table(title="lab", title_justify="left")
    for column, side in (("scenario", "left"), ("", "left"), ("s", "right"), ("found", "left")):
        table.add_column(column, justify="right" if side == "right" else "left")
    for each in outcomes:
        mark = "passed" if each.passed else "FAILED"
        table.add_row(each.name, mark, f"{each.seconds:.0f}", each.found)
    Console(width=120 if not sys.stdout.isatty() else None, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
