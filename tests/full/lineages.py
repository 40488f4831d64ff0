"""A run as its files say it is, judged without the code under test.

Which checkpoints count, which attempt the run stands on and what its journal must hold is worked
out here from the contracts alone, so that it can contradict ``tessera.runs``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safetensors.torch import load

from tessera.model.digest import weights_digest
from tests.chaos.objects import Objects

METRICS = ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "progress/tokens")
_NAME = re.compile(r"step-(\d+)-((\d+)-[0-9a-f]+)")


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run came to: points by key and step, and the published tensors."""

    points: dict[str, dict[int, Any]]
    tensors_sha256: str
    weights_digest: str


@dataclass(frozen=True, order=True)
class Ref:
    """A complete checkpoint; the first in order is the furthest, then the latest attempt's."""

    minus_step: int
    minus_number: int
    attempt: str

    @property
    def step(self) -> int:
        return -self.minus_step

    @property
    def name(self) -> str:
        return f"step-{self.step}-{self.attempt}"


@dataclass(frozen=True)
class Stretch:
    """Steps above ``after`` up to ``upto`` come from this attempt."""

    attempt: str
    after: int
    upto: int


class Snapshot:
    """The only run of a root while nobody writes to it."""

    def __init__(self, objects: Objects) -> None:
        self._files = {
            "/".join(key.split("/")[2:]): objects.read(key) for key in objects.keys("runs/")
        }

    def _json(self, path: str) -> Any:
        return json.loads(self._files[path])

    def _records(self, folder: str) -> dict[str, Any]:
        found = (p for p in self._files if p.startswith(f"{folder}/") and p.endswith(".json"))
        return {path.split("/")[1].removesuffix(".json"): self._json(path) for path in found}

    @cached_property
    def attempts(self) -> dict[str, Any]:
        return {n: r for n, r in self._records("attempts").items() if not n.endswith(".end")}

    @cached_property
    def endings(self) -> dict[str, Any]:
        records = self._records("attempts").items()
        return {n.removesuffix(".end"): r for n, r in records if n.endswith(".end")}

    @cached_property
    def rollbacks(self) -> dict[str, Any]:
        return self._records("rollbacks")

    @property
    def finished(self) -> list[str]:
        """Attempts that say so, the earliest first."""
        done = [(e["ended_at"], n) for n, e in self.endings.items() if e["outcome"] == "FINISHED"]
        return [name for _, name in sorted(done)]

    # -- checkpoints -------------------------------------------------------------------------------

    @cached_property
    def complete(self) -> list[Ref]:
        found = (_NAME.fullmatch(p.split("/")[1]) for p in self._files if p.endswith("/COMPLETE"))
        return sorted(Ref(-int(m[1]), -int(m[3]), m[2]) for m in found if m)

    @property
    def counting(self) -> list[Ref]:
        """Those that no rollback gave up."""

        def given_up(ref: Ref) -> bool:
            return any(
                ref.step > r["to_step"] and -ref.minus_number < int(r["attempt"].split("-")[0])
                for r in self.rollbacks.values()
            )

        return [ref for ref in self.complete if not given_up(ref)]

    def is_whole(self, ref: Ref) -> bool:
        """Whether every file that the checkpoint names is there with its digest."""
        folder = f"checkpoints/{ref.name}"
        files = self._json(f"{folder}/COMPLETE")["files"]
        return bool(files) and all(
            f"{folder}/{name}" in self._files
            and hashlib.sha256(self._files[f"{folder}/{name}"]).hexdigest() == entry["sha256"]
            for name, entry in files.items()
        )

    @property
    def broken(self) -> list[Ref]:
        """Those that count and are not whole."""
        return [ref for ref in self.counting if not self.is_whole(ref)]

    # -- lineage -----------------------------------------------------------------------------------

    @property
    def tip(self) -> tuple[str, int] | None:
        """The attempt that the run stands on and how far that is."""
        if self.finished:
            return self.finished[0], int(self.endings[self.finished[0]]["step"])
        if self.counting:
            return self.counting[0].attempt, self.counting[0].step
        return None

    def chain(self) -> list[Stretch]:
        """From the start to the tip; a ``LookupError`` or ``ValueError`` says where it breaks."""
        if self.tip is None:
            return []
        name, upto = self.tip
        found: list[Stretch] = []
        while True:
            before = self.attempts[name]["resumed_from"]
            found.append(Stretch(name, before["step"] if before else 0, upto))
            if before is None:
                return found[::-1]
            if before["step"] > upto:
                raise ValueError(f"{name} continued from step {before['step']}, beyond {upto}")
            if int(before["attempt"].split("-")[0]) >= int(name.split("-")[0]):
                raise ValueError(f"{name} continued from the later {before['attempt']}")
            name, upto = before["attempt"], before["step"]

    def journal(self, attempt: str) -> Iterator[dict[str, Any]]:
        """Every record of an attempt."""
        paths = sorted(p for p in self._files if p.startswith(f"journal/{attempt}/"))
        seen = 0
        for path in paths:  # of one that was killed a segment may have a twin
            for line in self._files[path].splitlines():
                record = json.loads(line)
                if record["seq"] > seen:
                    seen = record["seq"]
                    yield record

    def points(self) -> dict[str, dict[int, Any]]:
        """``METRICS`` of the chain; a ``ValueError`` for a step that is there twice."""
        found: dict[str, dict[int, Any]] = {key: {} for key in METRICS}
        for number, part in enumerate(self.chain()):
            after = part.after if number else -1
            for record in self.journal(part.attempt):
                key, step = record["key"], record["step"]
                if record["kind"] == "metric" and key in found and after < step <= part.upto:
                    if step in found[key]:
                        raise ValueError(f"{key} of step {step} is there twice")
                    found[key][step] = record["value"]
        return found

    # -- judgements --------------------------------------------------------------------------------

    def whole(self) -> Whole:
        """What this run came to."""
        sidecar = self._sidecar()
        tensors = self._files[f"model/{sidecar['file']}"]
        return Whole(self.points(), hashlib.sha256(tensors).hexdigest(), sidecar["weights_digest"])

    def _sidecar(self) -> dict[str, Any]:
        """What the attempt that the run stands on says of the model, else who spoke last."""
        own = f"model/{self.tip[0]}.json" if self.tip else ""
        found: dict[str, Any] = self._json(own if own in self._files else "model/weights.json")
        return found

    def differs_from(self, whole: Whole) -> list[str]:
        """What the surviving lineage holds and should not, or the other way round."""
        try:
            points = self.points()
        except (LookupError, ValueError) as error:
            return [f"the chain of attempts breaks: {error!r}"]
        upto = self.tip[1] if self.tip else -1
        problems = []
        for key, values in whole.points.items():
            due = {step: value for step, value in values.items() if step <= upto}
            if points[key] != due:
                steps = sorted(s for s in due | points[key] if due.get(s) != points[key].get(s))
                problems.append(f"{key} differs from the undisturbed run's at steps {steps}")
        return problems

    def model_problems(self) -> list[str]:
        """Whether ``model/`` is of one attempt, and of the one that the run stands on."""
        sidecar = self._sidecar()
        said = sidecar["weights_digest"]
        problems = []
        if weights_digest(load(self._files[f"model/{sidecar['file']}"])) != said:
            problems.append("the tensors of model/ are not those of its digest")
        if self.tip:
            own = [
                record["value"]["weights_digest"]
                for record in self.journal(self.tip[0])
                if record["key"] == "model/published"
            ]
            if own != [said]:
                problems.append("model/ is of another attempt than the lineage")
        return problems
