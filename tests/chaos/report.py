"""What a chaos run prints and writes."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tests.chaos.driver import Kill

if TYPE_CHECKING:
    from tests.chaos.run import Outcome, Setting


class Progress:
    """One line a kill, with the time that the rest will take at this rate."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._began = total, 0, time.monotonic()

    def __call__(self, store: str, kill: Kill, steps: int) -> None:
        """Tell of one kill."""
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * (self._total - self._done)
        print(
            f"kill {self._done}/{self._total}  {store}  {kill.how} {kill.moment}, after "
            f"{kill.after_s:.1f} s on machine {kill.machine}; checkpoint {kill.step} of {steps} "
            f"steps; about {left:.0f} s left",
            flush=True,
        )


def show(outcomes: Sequence[Outcome], seconds: float) -> None:
    """Tables for people."""
    console = Console(width=None if os.isatty(1) else 120)
    table = Table("", *(outcome.store for outcome in outcomes))
    for name, cells in _rows(outcomes).items():
        table.add_row(name, *cells)
    console.print(table)
    for outcome in outcomes:
        if outcome.stopped:
            console.print(f"{outcome.store} stopped: {outcome.stopped}", markup=False)
        for check in outcome.checks:
            if not check.holds:
                console.print(f"{outcome.store}: {check.name}: {check.problem}", markup=False)
    good = sum(outcome.good for outcome in outcomes)
    console.print(f"{good} of {len(outcomes)} stores as if undisturbed, {seconds:.0f} s in all")


def _rows(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {
        "kills": [f"{len(o.kills)} of {o.planned}" for o in outcomes],
        "steps": [str(o.steps) for o in outcomes],
        "machines": [str(o.machines) for o in outcomes],
        "gave up by itself (75)": [str(o.gave_up) for o in outcomes],
        "requests": [str(o.requests) for o in outcomes],
        "faults injected": [str(sum(o.faults.values())) for o in outcomes],
        "seconds": [f"{o.seconds:.0f}" for o in outcomes],
    }
    for kind in dict.fromkeys(kind for o in outcomes for kind in o.faults):
        rows[f"  {kind}"] = [str(o.faults.get(kind, "-")) for o in outcomes]
    moments = [Counter(kill.moment for kill in o.kills) for o in outcomes]
    for moment in sorted({moment for counts in moments for moment in counts}):
        rows[f"killed {moment}"] = [str(counts[moment]) for counts in moments]
    rows["dollars: ledger / clock / tolerance"] = [
        f"{d.ledger:.4f} / {d.clock:.4f} / {d.tolerance:.4f}" if (d := o.dollars) else "-"
        for o in outcomes
    ]
    names = dict.fromkeys(check.name for o in outcomes for check in o.checks)
    for name in names:
        found = [{c.name: c.holds for c in o.checks}.get(name) for o in outcomes]
        rows[name] = ["-" if holds is None else "yes" if holds else "NO" for holds in found]
    return rows


def as_json(outcomes: Sequence[Outcome], setting: Setting) -> str:
    """Everything, for programs and for the log."""
    record: dict[str, Any] = {
        "seed": setting.seed,
        "faults": asdict(setting.faults),
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "stores": [asdict(outcome) | {"good": outcome.good} for outcome in outcomes],
    }
    return json.dumps(record, indent=2) + "\n"
