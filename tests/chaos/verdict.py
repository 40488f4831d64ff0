"""Whether a run under fire came out as if nothing had happened, from the root's own files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.chaos.driver import Course
from tests.chaos.machines import USD_PER_HOUR, Dollars, compare
from tests.chaos.objects import RunFiles
from tests.services.trainers import CHECKOUT, base_environment

METRICS = ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "progress/tokens")


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was found if it does not."""

    name: str
    problem: str | None

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.problem is None


def judge(
    files: RunFiles, undisturbed: RunFiles, course: Course, steps: int, row: dict[str, Any]
) -> tuple[list[Check], Dollars]:
    """All checks of one run; ``row`` is what ``tessera-exp list --json`` says of it."""
    dollars = compare(row["cost_usd"], course.machines)
    recount = recount_usd(files)
    found, expected = points(files), points(undisturbed)
    twice = sorted({step for key, step, times in repeated(files) if key == "train/loss"})
    missing = sorted(set(range(1, steps + 1)) - found["train/loss"].keys())
    differ = {
        key: sorted(
            s for s in expected[key] | found[key] if found[key].get(s) != expected[key].get(s)
        )
        for key in METRICS
    }
    unequal = {key: some[:5] for key, some in differ.items() if some}
    digests = files.weights_digest(), undisturbed.weights_digest()
    return [
        _check("every step exactly once", not twice and not missing, f"{twice=} {missing=}"),
        _check("losses equal bit for bit", not unequal, f"first steps that differ: {unequal}"),
        _check("weights equal bit for bit", digests[0] == digests[1], f"{digests}"),
        _check("listed as finished", row["status"] == "finished", f"{row['status']}"),
        _check("listed with all its steps", row["step"] == steps, f"{row['step']} of {steps}"),
        _check(
            "no complete checkpoint lost", not course.faults_of_promise,
            "; ".join(course.faults_of_promise),
        ),
        _check(
            "dollars are those of the records",
            math.isclose(dollars.ledger, recount, rel_tol=1e-9, abs_tol=1e-9),
            f"listed ${dollars.ledger:.6f}, recounted ${recount:.6f}",
        ),
        _check(
            "dollars fit the driver's clock", dollars.fits,
            f"listed ${dollars.ledger:.4f}, clock ${dollars.clock:.4f} less at most "
            f"${dollars.tolerance:.4f}",
        ),
    ], dollars  # fmt: skip


def _check(name: str, holds: bool, otherwise: str) -> Check:
    return Check(name, None if holds else otherwise)


def lineage(files: RunFiles) -> list[tuple[str, int, float]]:
    """(attempt, after, upto) of the surviving attempts, oldest first, from the end backwards."""
    done = {n: e for n, e in files.endings().items() if e["outcome"] == "FINISHED"}
    name, upto = min(done, key=lambda n: done[n]["ended_at"]), math.inf
    found = []
    while True:
        before = files.attempt(name)["resumed_from"]
        found.append((name, before["step"] if before else -1, upto))
        if before is None:
            return found[::-1]
        name, upto = before["attempt"], before["step"]


def _surviving(files: RunFiles) -> Iterator[dict[str, Any]]:
    for attempt, after, upto in lineage(files):
        for record in files.journal(attempt):
            if record["kind"] == "metric" and after < record["step"] <= upto:
                yield record


def points(files: RunFiles) -> dict[str, dict[int, Any]]:
    """The values of ``METRICS`` by step, as they were written."""
    found: dict[str, dict[int, Any]] = {key: {} for key in METRICS}
    for record in _surviving(files):
        if record["key"] in found:
            found[record["key"]][record["step"]] = record["value"]
    return found


def repeated(files: RunFiles) -> list[tuple[str, int, int]]:
    """(key, step, times) of points that the surviving lineage holds more than once."""
    times: dict[tuple[str, int], int] = {}
    for record in _surviving(files):
        place = record["key"], record["step"]
        times[place] = times.get(place, 0) + 1
    return [(key, step, count) for (key, step), count in times.items() if count > 1]


def recount_usd(files: RunFiles) -> float:
    """Dollars by the records alone, counted another way than the ledger does.

    Every attempt of an instance names the moment it was rented, so the union of their intervals
    runs from there to the last word of any of them.
    """
    endings = files.endings()
    rented: dict[str, float] = {}
    last: dict[str, float] = {}
    for name in files.attempt_names():
        attempt = files.attempt(name)
        times = [record["time"] for record in files.journal(name)]
        word = max([*times, attempt["started_at"]])
        if name in endings:
            word = endings[name]["ended_at"]
        instance = attempt["instance"]
        rented[instance] = min(attempt["billed_from"], rented.get(instance, math.inf))
        last[instance] = max(word, attempt["started_at"], last.get(instance, 0.0))
    return sum(last[i] - rented[i] for i in rented) * USD_PER_HOUR / 3600


def listed(root: str, environment: dict[str, str]) -> dict[str, Any]:
    """The only run in ``tessera-exp list --json``."""
    program = "from tessera.cli.exp import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "list", "--json", "--root", root],
        cwd=CHECKOUT,
        env=base_environment() | environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"tessera-exp list failed with {done.returncode}: {done.stderr}")
    (row,) = json.loads(done.stdout)
    found: dict[str, Any] = row
    return found
