"""Spikes and NaNs: judged on the device at every step, read by the host when something is due.

A step whose loss or gradient norm is not finite, or lies more than ``sigma`` standard deviations
above the mean of the last ``window`` applied steps, is not applied: the verdict is a device scalar
that the fused optimiser reads itself (its ``found_inf``), so the host never waits. The rule is the
one of OLMo 2's training (OLMo et al. 2025, "skip step"): there too six deviations and a window of
128. Until half a window of steps has been applied only numbers that are not finite count.

A gradient norm that stays high at an ordinary loss means a steep place: no other batch changes it,
since a step that is not applied leaves the weights as they are, and only a step leads out. So of
steps in a row that have nothing but that against them only the first ``PATIENCE`` are held back,
whatever the window, and as many ordinary ones end the row; clipping bounds the others. (Without
that a healthy run stood still at such a place for ten steps and was ended as diverged.) A loss that
stays high means that the weights are spoilt, and no step is applied until the run goes back.

    step on the device        loss, norm -> judge -> found_inf -> optimiser
    at a log point, host      read -> skipped steps -> within tolerance? -> go on, or go back
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.experiment import Stability

PATIENCE = 3
"""Steps in a row that are held back for their gradient norms alone."""
LEAST_SPREAD = 0.01
"""Share of the mean: a smaller standard deviation counts as this, or a flat loss would spike."""

Range = tuple[int, int]


class GoBackError(Exception):
    """Too many steps could not be applied; carries what to leave out for good. Never shown."""

    def __init__(self, first_step: int, excluded: Range, reason: str) -> None:
        super().__init__(reason)
        self.first_step, self.excluded = first_step, excluded


@dataclass(frozen=True)
class Verdict:
    """What the device said of the update after which ``step`` steps were done."""

    step: int
    applied: bool
    loss: float
    norm: float


class Watch:
    """Judges steps; all of its state travels with a checkpoint (``tensors``)."""

    def __init__(self, settings: Stability, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._places = torch.arange(settings.window, device=device)
        self._losses = torch.zeros(settings.window, device=device)
        self._norms = torch.zeros(settings.window, device=device)
        self._applied = torch.zeros((), dtype=torch.int64, device=device)
        self._steep = torch.zeros((), dtype=torch.int64, device=device)
        self._unread: list[tuple[int, Tensor]] = []

    def tensors(self) -> dict[str, Tensor]:
        """The state, to be saved and to be loaded into in place."""
        return {
            "stability.losses": self._losses,
            "stability.norms": self._norms,
            "stability.applied": self._applied,
            "stability.steep": self._steep,
        }

    @torch.no_grad()
    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 if the update that makes ``step`` steps must not be applied, else 0.0 (float32 ()).

        ``loss`` and ``norm`` are float32 scalars of the whole step, equal on every rank.
        """
        seen = torch.clamp(self._applied, max=self._settings.window)
        mask = self._places < seen
        enough = seen >= self._settings.window // 2
        high = enough & (loss > self._ceiling(self._losses, mask, seen))
        steep = enough & (norm > self._ceiling(self._norms, mask, seen))
        spoilt = ~(loss.isfinite() & norm.isfinite()) | high
        # A spoilt step says nothing of the place. An ordinary one counts back and does not end the
        # row at once: norms of steep steps that were applied raise the ceiling.
        counted = torch.where(steep, self._steep + 1, (self._steep - 1).clamp(min=0))
        self._steep.copy_(torch.where(spoilt, self._steep, counted))
        bad = spoilt | (steep & (self._steep <= PATIENCE))
        here = (self._places == self._applied % self._settings.window) & ~bad
        self._losses.copy_(torch.where(here, loss, self._losses))
        self._norms.copy_(torch.where(here, norm, self._norms))
        self._applied += (~bad).to(torch.int64)
        verdict = bad.to(torch.float32)
        self._unread.append((step, torch.stack((verdict, loss, norm))))
        return verdict

    def _ceiling(self, history: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        mean = (history * mask).sum() / seen.clamp(min=1)
        squares = ((history - mean) * mask).square().sum() / (seen - 1).clamp(min=1)
        spread = torch.maximum(squares.sqrt(), LEAST_SPREAD * mean.abs())
        return mean + self._settings.sigma * spread

    def read(self) -> list[Verdict]:
        """The verdicts since the last call; waits for the device."""
        if not self._unread:
            return []
        rows = torch.stack([row for _, row in self._unread]).tolist()
        steps = [step for step, _ in self._unread]
        self._unread = []
        return [
            Verdict(step, bad == 0, loss, norm)
            for step, (bad, loss, norm) in zip(steps, rows, strict=True)
        ]


class Skips:
    """Which samples were never learnt from, and which are left out: part of every checkpoint.

    ``skipped`` went by without an update; ``excluded`` are not read at all, so the samples after
    them move up. Both are ranges [first, end) of global sample numbers.
    """

    def __init__(self, settings: Stability, samples_per_step: int, rollbacks: int = 0) -> None:
        self._settings, self._per_step = settings, samples_per_step
        self.skipped: list[Range] = []
        self.excluded: list[Range] = []
        self.rollbacks = rollbacks
        self._steps: list[int] = []  # of `skipped`, as far as the window still counts them

    def first_sample(self, step: int) -> int:
        """Number of the first sample of optimiser step ``step`` (0-based), exclusions passed over.

        Ranges are whole steps long, so a step never straddles one.
        """
        sample = step * self._per_step
        for first, end in self.excluded:
            if sample < first:
                break
            sample += end - first
        return sample

    def block(self, step: int) -> int:
        """``first_sample`` in steps' worth of samples."""
        return self.first_sample(step) // self._per_step

    def note(self, verdict: Verdict) -> Range:
        """Remember a step that was not applied; returns its samples."""
        first = self.first_sample(verdict.step - 1)
        found = (first, first + self._per_step)
        self.skipped.append(found)
        self._steps.append(verdict.step)
        return found

    def judge(self, done: int) -> None:
        """Raise ``GoBackError`` if more than ``max_skips`` of the last ``window`` steps failed."""
        since = done - self._settings.window
        self._steps = [step for step in self._steps if step > since]
        if len(self._steps) <= self._settings.max_skips:
            return
        first, last = min(self._steps), max(self._steps)
        excluded = (self.first_sample(first - 1), self.first_sample(last - 1) + self._per_step)
        raise GoBackError(
            first,
            excluded,
            f"{len(self._steps)} of the steps {first} to {done} could not be applied (a loss or "
            "gradient norm that is not finite, or a spike)",
        )

    def exclude(self, ranges: Iterable[Range]) -> None:
        """Leave these out as well; then the count of steps that were not applied begins anew."""
        more = [(int(first), int(end)) for first, end in ranges]
        if more:
            self._steps = []
        merged: list[Range] = []
        for first, end in sorted({*self.excluded, *more}):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((first, end))
        self.excluded = merged

    def state(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        return {
            "skipped": [list(pair) for pair in self.skipped],
            "excluded": [list(pair) for pair in self.excluded],
            "recent": list(self._steps),
            "rollbacks": self.rollbacks,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        self.skipped = [(a, b) for a, b in state["skipped"]]
        self.excluded = [(a, b) for a, b in state["excluded"]]
        self._steps = list(state["recent"])
        self.rollbacks = int(state["rollbacks"])


def mean_of_applied(total: float, applied: float) -> float:
    """Mean loss over the steps that were applied; NaN if none was."""
    return total / applied if applied else math.nan
