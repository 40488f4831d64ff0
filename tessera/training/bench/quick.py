"""A whole model's step from two shallow ones: time and memory are a line over the layers.

Blocks are equal (but for those that float8 leaves in bf16, which both have), so what a step takes
is a part that does not depend on them (embedding, head, loss) and one part a block (its passes, its
share of clip and optimiser).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from tessera.errors import InputError
from tessera.experiment import Pretrain
from tessera.model.probe import float8_missing
from tessera.training.bench.ladder import reason_of, release
from tessera.training.bench.runner import StepRunner, Timing, estimate_bytes
from tessera.training.bench.tokens import Batches, samples_per_step
from tessera.training.memory import CPU_MOST, CPU_SHARE, GPU_SHARE, CudaCard, divisors

SHALLOW, DEEPER = 2, 6
WARM_UP = 2


@dataclass(frozen=True)
class Depth:
    """What was measured at a number of layers."""

    layers: int
    timing: Timing

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.timing.seconds)


@dataclass(frozen=True)
class Projection:
    """The whole model's step; ``layers`` are those that were measured, one if it was the whole."""

    layers: tuple[int, ...]
    step_s: float
    first_s: float
    peak_bytes: int | None
    steps: int
    attention: str | None = None


def depths(layers: int, kept: int = 0) -> tuple[int, ...]:
    """Which numbers of layers to measure for a model of ``layers``.

    ``kept`` of them are not like the others (``Pretrain.kept_in_bf16``), and in both.
    """
    shallow, deeper = SHALLOW + kept, DEEPER + kept
    return (shallow, deeper) if layers > deeper else (layers,)


def on_the_line(points: Sequence[tuple[int, float]], at: int) -> float:
    """The value at ``at`` of the line through the first and the last point; one point is flat."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    return y0 if x0 == x1 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def project(measured: Sequence[Depth], layers: int) -> Projection:
    """The model of ``layers`` from what was measured, ascending in depth."""
    step_s = on_the_line([(d.layers, d.step_s) for d in measured], layers)
    if step_s <= 0 or measured[-1].step_s < measured[0].step_s:
        raise ValueError(
            "a deeper model was not slower than a shallow one: something else keeps this machine "
            "busy"
        )
    peaks = [(d.layers, d.timing.peak_bytes) for d in measured]
    known = [(depth, float(peak)) for depth, peak in peaks if peak is not None]
    peak = round(on_the_line(known, layers)) if len(known) == len(measured) else None
    return Projection(
        layers=tuple(d.layers for d in measured),
        step_s=step_s,
        first_s=measured[0].timing.first_s,
        peak_bytes=peak,
        steps=min(len(d.timing.seconds) for d in measured),
        attention=measured[0].timing.attention,
    )


def with_micro_batch(experiment: Pretrain, device: torch.device) -> Pretrain:
    """``batch.micro_batch: auto`` as a number by arithmetic: a shallow model would fit far more."""
    if experiment.batch.micro_batch != "auto":
        return experiment
    sizes = divisors(samples_per_step(experiment))
    if device.type == "cuda":
        allowed = GPU_SHARE * CudaCard(device).usable()
    else:
        allowed = CPU_SHARE * psutil.virtual_memory().available
        sizes = [size for size in sizes if size <= CPU_MOST]
    fitting = [size for size in sizes if estimate_bytes(experiment, size, device) <= allowed]
    batch = experiment.batch.model_copy(update={"micro_batch": max(fitting, default=1)})
    return experiment.model_copy(update={"batch": batch})


def measure_quickly(
    experiment: Pretrain,
    batches: Batches,
    device: torch.device,
    steps: int,
    ticked: Callable[[], None],
) -> tuple[Projection | None, str | None]:
    """The experiment's own settings on few layers; or None and the reason."""
    try:
        if experiment.precision == "fp8" and device.type == "cuda":
            missing = float8_missing(device)
            if missing:
                raise InputError(missing)
        measured = [
            Depth(layers, _at_depth(experiment, layers, batches, device, steps, ticked))
            for layers in depths(experiment.model.layers, experiment.kept_in_bf16)
        ]
        return project(measured, experiment.model.layers), None
    except Exception as error:  # as in the ladder
        if os.environ.get("TESSERA_DEBUG"):
            raise
        return None, reason_of(error)
    finally:
        release(device)


def _at_depth(
    experiment: Pretrain,
    layers: int,
    batches: Batches,
    device: torch.device,
    steps: int,
    ticked: Callable[[], None],
) -> Timing:
    model = experiment.model.model_copy(update={"layers": layers})
    shallow = experiment.model_copy(update={"model": model})
    return StepRunner(shallow, device).time(batches, steps, WARM_UP, ticked)
