"""A root on which one case after the other is performed and judged."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.chaos.objects import BucketObjects, FolderObjects, Objects
from tests.full.interleaving import END, Actor, Case, Hold, Said, Theatre, Variant
from tests.full.lineages import Snapshot, Whole


class Cleared(Objects, Protocol):
    """Objects that can be removed."""

    def clear(self) -> None:
        """Remove all runs."""


class Folder(FolderObjects):
    """A root that is a folder."""

    def clear(self) -> None:
        shutil.rmtree(self.folder / "runs", ignore_errors=True)


class Bucket(BucketObjects):
    """A root in a bucket."""

    def clear(self) -> None:
        for key in self.keys("runs/"):
            self._s3.delete_object(Bucket=self._bucket, Key=self._prefix + key)


@dataclass
class Tally:
    """What the cases came to."""

    tried: int = 0
    problems: list[str] = field(default_factory=list)
    facts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        facts = ", ".join(f"{count} {name}" for name, count in sorted(self.facts.items()))
        return f"{self.tried} interleavings, {len(self.problems)} with a problem; {facts}"


class Stage:
    """One root, used for one case after the other; its corpus stays, its runs go."""

    def __init__(
        self,
        theatre: Theatre,
        folder: Path,
        root: str,
        objects: Cleared,
        environment: dict[str, str],
        shards: Path | None = None,
    ) -> None:
        """``shards`` is a cache folder that a machine begins with, to save the downloads."""
        self._theatre, self._folder, self._root, self._objects = theatre, folder, root, objects
        self._environment, self._shards = environment, shards
        self._count = 0
        self._first: dict[Variant, tuple[dict[str, bytes], Path]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    # -- processes ---------------------------------------------------------------------------------

    def _machine(self, name: str) -> Path:
        cache = self._folder / f"case-{self._count}" / name
        if not cache.exists():
            cache.parent.mkdir(exist_ok=True)
            if self._shards:
                shutil.copytree(self._shards, cache)
        return cache

    def start(
        self, who: str, case: Case, *, machine: str, gated: bool = True, tokens: str = "e"
    ) -> Actor:
        """``tessera train`` of the case's experiment."""
        path = self._folder / "experiment.yaml"
        case.variant.write(path)
        cache = self._machine(machine)
        return self._theatre.start(
            ["train", str(path), "--root", self._root, "--quiet"],
            self._environment | {
                "TESSERA_CACHE": str(cache), "TESSERA_HEARTBEAT_S": "3600",
                "TESSERA_USD_PER_HOUR": "3.6", "VAST_CONTAINERLABEL": f"C.{machine}",
            },
            cache.parent / f"output-{who}",
            gated=gated,
            tokens=tokens,
            nudge=1e-3 if who == case.nudged else 0.0,
            poisoned=case.variant.samples,
        )  # fmt: skip

    def run_whole(self, who: str, case: Case, *, machine: str) -> Said:
        """One attempt to its end with nobody in the way."""
        actor = self.start(who, case, machine=machine, gated=False)
        actor.go(END)
        return actor.said()

    def listed(self) -> dict[str, Any]:
        """The only run in ``tessera-exp list --json``."""
        output = self._folder / "list"
        arguments = ["list", "--json", "--root", self._root]
        cache = {"TESSERA_CACHE": str(self._folder / "laptop")}
        actor = self._theatre.start(
            arguments, self._environment | cache, output, command="tessera-exp", gated=False
        )
        actor.go(END)
        said = actor.said()
        if said.code != 0:
            raise AssertionError(f"tessera-exp list ended with {said.code}: {said.err}")
        (row,) = json.loads(said.out)
        found: dict[str, Any] = row
        return found

    # -- the root ----------------------------------------------------------------------------------

    def clear(self) -> None:
        """No run is left, and no machine."""
        self._objects.clear()
        shutil.rmtree(self._folder / f"case-{self._count}", ignore_errors=True)
        self._count += 1

    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        return Snapshot(self._objects)

    def undisturbed(self, variant: Variant) -> tuple[Whole, list[tuple[str, str]]]:
        """What a run comes to that nobody disturbs, and its points."""
        case = Case((), variant)
        self.clear()
        actor = self.start("A", case, machine="A")
        actor.go(END)
        assert actor.code == 0, actor.said().err
        return self.snapshot().whole(), actor.seen

    def points_of_later(self, variant: Variant) -> list[tuple[str, str]]:
        """The points of an attempt that continues from the first checkpoint."""
        case = Case((), variant, later=True)
        self._begin(case)
        actor = self.start("A", case, machine="A", tokens="a")
        actor.go(END)
        assert actor.code == 0, actor.said().err
        return actor.seen

    def _begin(self, case: Case) -> None:
        """A root without runs; for ``later`` with one whose first attempt died at step 2."""
        self.clear()
        if not case.later:
            return
        if case.variant not in self._first:
            actor = self.start("first", case, machine="A", tokens="f")
            actor.go(Hold("latest", 1, "after"))
            actor.kill()
            kept = self._folder / f"first-{len(self._first)}"
            shutil.copytree(self._machine("A"), kept)
            files = {key: self._objects.read(key) for key in self._objects.keys("runs/")}
            self._first[case.variant] = files, kept
            return
        files, kept = self._first[case.variant]
        for key, data in files.items():
            self._objects.write(key, data)
        shutil.rmtree(self._machine("A"), ignore_errors=True)
        shutil.copytree(kept, self._machine("A"))

    # -- one case ----------------------------------------------------------------------------------

    def perform(self, case: Case) -> dict[str, Said]:
        """Make the moves; everybody has ended or was killed afterwards."""
        self._begin(case)
        actors: dict[str, Actor] = {}
        tokens = dict(case.tokens)
        try:
            for move in case.moves:
                if move.who not in actors:
                    machine = "A" if case.same_machine else move.who
                    actors[move.who] = self.start(
                        move.who, case, machine=machine, tokens=tokens[move.who]
                    )
                actors[move.who].go(move.until)
        finally:
            for actor in actors.values():
                actor.kill()
        return {who: actor.said() for who, actor in actors.items()}

    def judge(self, case: Case, whole: Whole, tally: Tally) -> None:
        """Perform a case and add what is wrong with it to the tally."""
        tally.tried += 1
        problems: list[str] = []
        try:
            problems += self._judged(case, whole, tally.facts)
        except (AssertionError, LookupError, ValueError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        if problems:
            tally.problems.append(f"{case}: {'; '.join(problems)}")

    def _judged(self, case: Case, whole: Whole, facts: Counter[str]) -> list[str]:
        ended = self.perform(case)
        problems = [text for who, said in ended.items() for text in ended_badly(who, said)]
        facts["stopped because another took over"] += sum(s.code == 2 for s in ended.values())
        before = self.snapshot()
        problems += before.differs_from(whole)
        problems += disagreements(self.listed(), before)
        facts["finished by both"] += len(before.finished) > 1
        facts["with a broken checkpoint"] += bool(before.broken)

        last = self.run_whole("Z", case, machine="A" if case.same_machine else "Z")
        if last.code != 0 or "Traceback" in last.err:
            return [*problems, f"the next attempt ended with {last.code}: {last.err[-600:]}"]
        furthest = before.counting[:1]
        if furthest and furthest[0] in before.broken and not before.finished:
            facts["passed over by the next"] += 1
            if "is passed over" not in last.err:
                problems.append("a broken checkpoint was passed over without a note")
        after = self.snapshot()
        if not after.finished:
            problems.append("the run is not finished")
        problems += after.differs_from(whole) + disagreements(self.listed(), after)
        problems += after.model_problems()
        if not case.nudged and after.whole().tensors_sha256 != whole.tensors_sha256:
            problems.append("the weights differ from the undisturbed run's")
        return problems


def ended_badly(who: str, said: Said) -> list[str]:
    """An attempt may finish, be killed, or stop because of another one."""
    if "Traceback" in said.err or "Traceback" in said.out:
        return [f"{who} ended with a traceback: {said.err[-600:]}"]
    if said.code == 2 and "took over" in said.err:
        return []
    return [] if said.code in (0, None) else [f"{who} ended with {said.code}: {said.err[-600:]}"]


def disagreements(row: dict[str, Any], run: Snapshot) -> list[str]:
    """Whether ``tessera-exp list`` says the same."""
    step = run.tip[1] if run.tip else None
    problems = []
    if row["step"] != step:
        problems.append(f"tessera-exp lists step {row['step']}, the files say {step}")
    if (row["status"] == "finished") != bool(run.finished):
        problems.append(f"tessera-exp lists it as {row['status']}")
    if row["attempts"] != len(run.attempts):
        problems.append(f"tessera-exp lists {row['attempts']} attempts of {len(run.attempts)}")
    return problems
