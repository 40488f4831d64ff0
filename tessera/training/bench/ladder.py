"""The ladder: one technique after the other, each as a whole optimiser step, each a row.

A technique is what one would write into an experiment, so adding one is a line in ``TECHNIQUES``.
All are measured in one process, with the memory of the one before released.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError

from tessera.errors import InputError
from tessera.experiment import Pretrain, dump, parse_experiment
from tessera.model.probe import float8_missing
from tessera.training.bench.runner import StepRunner, Timing
from tessera.training.bench.tokens import Batches, samples_per_step
from tessera.training.prepare import compute_dtype

WARM_UP = 3
_REASON_WIDTH = 160


@dataclass(frozen=True)
class Technique:
    """What a row changes in the experiment: top-level keys, and ``times`` the micro-batch."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    times: int = 1

    @property
    def float8(self) -> bool:
        """Whether products are taken in float8."""
        return self.settings.get("precision") == "fp8"

    @property
    def fused(self) -> bool:
        """Whether the fused operations compute the steps."""
        return self.settings.get("kernels") == "fused"


_FUSED = {"kernels": "fused"}
_EIGHT = {"precision": "fp8", "kernels": "fused"}

TECHNIQUES: tuple[Technique, ...] = (
    Technique("eager", {"kernels": "torch", "compile": "off"}),
    Technique("compiled", {"kernels": "torch", "compile": "on"}),
    Technique("fused-cudnn", {**_FUSED, "attention": "cudnn"}),
    Technique("fused-flash4", {**_FUSED, "attention": "flash4"}),
    Technique("fused", _FUSED),
    Technique("fused-x2", _FUSED, times=2),
    Technique("fp8", _EIGHT),
    Technique("fp8-x2", _EIGHT, times=2),
)
NAMES = tuple(technique.name for technique in TECHNIQUES)


@dataclass(frozen=True)
class Measured:
    """One row: its timing, or in ``reason`` why there is none."""

    technique: Technique
    experiment: Pretrain | None
    micro_batch: int | None
    timing: Timing | None
    reason: str | None = None

    @property
    def tokens_per_s(self) -> float:
        """At the median step; 0 where nothing was measured."""
        if self.timing is None or self.experiment is None:
            return 0.0
        return self.experiment.batch.tokens_per_step / statistics.median(self.timing.seconds)


def chosen(names: Sequence[str]) -> tuple[Technique, ...]:
    """The techniques of these names in the ladder's order, all of them without names.

    Raises ``InputError`` for a name that is none.
    """
    for name in names:
        if name not in NAMES:
            raise InputError(
                f"--only {name} is no row of the ladder; choose of {', '.join(NAMES)}."
            )
    return tuple(t for t in TECHNIQUES if not names or t.name in names)


def same_as(technique: Technique, others: Sequence[Technique], own_attention: str) -> str | None:
    """Which of ``others`` measures the same, as its attention backend is the one named here.

    ``own_attention`` is the backend of a row that names none.
    """
    if technique.settings.get("attention") != own_attention:
        return None
    rest = {key: value for key, value in technique.settings.items() if key != "attention"}
    same = (t.name for t in others if (t.settings, t.times) == (rest, technique.times))
    return next(same, None)


def applied(technique: Technique, experiment: Pretrain, device: torch.device) -> Pretrain:
    """``experiment`` as ``technique`` changes it; ``InputError``, in few words, if it cannot be."""
    plain = experiment.precision
    if plain in ("auto", "fp8"):
        low = compute_dtype("auto", device) == torch.bfloat16
        plain = "bf16" if low else "float32"
    data: dict[str, Any] = {**dump(experiment), "precision": plain, **technique.settings}
    if not technique.fused:
        data["attention"] = "auto"
    if not technique.float8:
        data["float8"] = None
    size = experiment.batch.micro_batch
    if technique.times != 1:
        if size == "auto":
            raise InputError("batch.micro_batch is auto, so as many as fit already")
        size *= technique.times
        if samples_per_step(experiment) % size:
            samples = samples_per_step(experiment)
            raise InputError(f"micro-batch {size} does not divide the step's {samples} samples")
        data["batch"] = {**data["batch"], "micro_batch": size}
    try:
        changed = parse_experiment(data)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise InputError(message) from error
    assert isinstance(changed, Pretrain)
    return changed


def measure(
    technique: Technique,
    experiment: Pretrain,
    batches: Batches,
    device: torch.device,
    steps: int,
    ticked: Callable[[], None],
) -> Measured:
    """One row. What fails is a row with its reason; Ctrl-C goes through."""
    changed: Pretrain | None = None
    size: int | None = None
    timing: Timing | None = None
    reason: str | None = None
    try:
        if technique.float8 and (missing := float8_missing(device)):
            raise InputError(missing)
        changed = applied(technique, experiment, device)
        runner = StepRunner(changed, device)
        size = runner.micro_batch
        timing = runner.time(batches, steps, WARM_UP, ticked)
    except Exception as error:
        # A row that fails, however it does, must not cost the others. Only words of the error stay:
        # its traceback holds the tensors of its frames.
        if os.environ.get("TESSERA_DEBUG"):
            raise
        reason = reason_of(error)
    finally:
        runner = None  # type: ignore[assignment]
        release(device)
    return Measured(technique, changed, size, timing, reason)


def reason_of(error: Exception) -> str:
    """An error in the few words that fit a row."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"{error.name or 'a package'} is not installed"
    lines = str(error).strip().splitlines()
    words = lines[0] if lines else ""
    if not isinstance(error, InputError | ValueError):
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    words = words.rstrip(".")
    return words if len(words) <= _REASON_WIDTH else words[: _REASON_WIDTH - 3].rstrip() + "..."


def release(device: torch.device) -> None:
    """Give back what the last row held: tensors, compiled code and the allocator's cache."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def best_of(rows: Sequence[Measured]) -> Measured | None:
    """The fastest row; None if nothing was measured."""
    measured = [row for row in rows if row.timing]
    return max(measured, key=lambda row: row.tokens_per_s, default=None)
