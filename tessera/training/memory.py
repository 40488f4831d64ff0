"""How many samples go through the model at once: ``batch.micro_batch``, and ``auto``.

A step's samples are cut into micro-batches whose gradients add up, so their size decides the memory
and the speed, and of the loss no more than the rounding of its sums. ``auto`` takes the largest
size that divides the step evenly and fits:

- on a GPU by measuring: the peak of a forward and backward pass at the two smallest sizes gives a
  straight line, the largest size under it that stays below 92 % of what this process can have is
  tried, and where that was too much, the next smaller one;
- on a CPU by arithmetic against half of the memory that is available, because a process that takes
  too much there is killed instead of told; and no more than 8, because on two cores models 128 and
  384 wide were fastest at 2 to 8 sequences of 256 tokens.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import psutil
import torch

GPU_SHARE = 0.92
"""Of what a process can have of a GPU; the rest is left to fragmentation and to other processes."""
CPU_SHARE = 0.5
"""Of the memory that is available on a machine without a GPU."""
CPU_MOST = 8
"""Samples at once, above which a CPU gets no faster."""
_GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """Samples that go through the model at once, and why so many, for the line that says so."""

    size: int
    how: str

    def __str__(self) -> str:
        return f"micro-batch {self.size}: {self.how}"


class Card(Protocol):
    """The memory of one GPU, in bytes, as seen by this process."""

    def usable(self) -> int:
        """What this process has and could still get."""

    def watch(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> int:
        """The most that was allocated since ``watch``."""

    def tidy(self) -> None:
        """Give back what is cached and no longer used."""


class CudaCard:
    """``Card`` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def usable(self) -> int:
        """Free memory and what torch already holds; what other processes hold is not in it."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)

    def watch(self) -> None:
        """Start a new peak at what is allocated now."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """The most that tensors took since ``watch``."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def tidy(self) -> None:
        """Return cached blocks to the driver."""
        gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Trial:
    """What is tried on a GPU.

    ``step(size)`` runs one forward and backward pass over ``size`` dummy samples and leaves the
    gradients; ``release()`` sets them to None. ``reserve`` is what training will hold beyond what
    is allocated now, in bytes: an optimiser's state that does not exist yet. ``worst`` turns a
    number of this rank into the largest of all ranks, so that all of them come to the same answer
    by the same trials.
    """

    samples: int
    step: Callable[[int], None]
    release: Callable[[], None] = lambda: None
    reserve: int = 0
    worst: Callable[[float], float] = lambda number: number


def resolve_micro_batch(
    setting: int | Literal["auto"],
    *,
    samples: int,
    step: Callable[[int], None],
    device: torch.device,
    estimate: Callable[[int], int],
    remembered: int | None,
    release: Callable[[], None] = lambda: None,
    reserve: int = 0,
    worst: Callable[[float], float] = lambda number: number,
) -> Choice:
    """The size that ``batch.micro_batch`` comes to on this machine.

    ``samples`` are those of one optimiser step on this rank, ``estimate(size)`` the bytes of
    training by arithmetic (asked on a CPU), ``remembered`` the size that a checkpoint recorded: it
    is kept where it still divides the step and fits, so that sums round as they did before. See
    ``Trial`` for the rest. Raises ``torch.OutOfMemoryError`` if not even one sample fits a GPU.
    """
    if setting != "auto":
        return Choice(setting, "as the experiment says")
    if device.type == "cuda":
        trial = Trial(samples, step, release, reserve, worst)
        return choose_on_card(CudaCard(device), trial, remembered)
    if remembered is not None and samples % remembered == 0:
        return _kept(remembered)
    available = psutil.virtual_memory().available
    return _by_arithmetic(samples, estimate, -worst(-CPU_SHARE * available))


def choose_on_card(card: Card, trial: Trial, remembered: int | None = None) -> Choice:
    """The size for a GPU, found by running on it; what was allocated for that is freed again."""
    card.tidy()
    limit = -trial.worst(-(GPU_SHARE * card.usable() - trial.reserve))
    note = ""
    if remembered is not None and trial.samples % remembered == 0:
        if math.isfinite(_peak(card, trial, remembered)):
            return _kept(remembered)
        note = f"; the {remembered} of the checkpoint did not fit"
    tried: list[int] = []

    def peak_of(size: int) -> float:
        tried.append(size)
        return _peak(card, trial, size)

    size, peak = choose_micro_batch(peak_of, divisors(trial.samples), limit)
    if "torch._dynamo" in sys.modules and len(tried) > 1:
        # Blocks compiled for several sizes would go on as kernels for any size, which are slower.
        torch.compiler.reset()
    shown = f"{peak / _GIB:.1f} GiB measured, {limit / _GIB:.1f} GiB may be used"
    if trial.reserve:
        shown += f" beside {trial.reserve / _GIB:.1f} GiB of optimiser"
    what = "the smallest, though tight" if peak > limit else "the largest that fits"
    return Choice(size, f"{what} ({shown}){note}")


def choose_micro_batch(
    peak_of: Callable[[int], float], sizes: Sequence[int], limit: float
) -> tuple[int, float]:
    """The largest of the ascending ``sizes`` whose peak stays within ``limit``, and its peak.

    ``peak_of(size)`` measures bytes, infinity where memory ran out. Two sizes are measured and the
    answer, which is itself measured before it is given. The smallest size is taken even above the
    limit, as long as it runs; else ``torch.OutOfMemoryError``.
    """
    first = peak_of(sizes[0])
    if not math.isfinite(first):
        raise torch.OutOfMemoryError(f"micro-batch {sizes[0]} does not fit")
    if len(sizes) == 1 or first > limit:
        return sizes[0], first
    second = peak_of(sizes[1])
    if second > limit:
        return sizes[0], first
    slope = (second - first) / (sizes[1] - sizes[0])
    for size in reversed(sizes[2:]):
        if first + slope * (size - sizes[0]) <= limit and (peak := peak_of(size)) <= limit:
            return size, peak
    return sizes[1], second


def divisors(samples: int) -> list[int]:
    """Every size that cuts ``samples`` evenly, ascending."""
    return [size for size in range(1, samples + 1) if samples % size == 0]


def out_of_memory_sentence(
    device_name: str, micro_batch: int | Literal["auto"], recompute: bool
) -> str:
    """What to do about a GPU that ran out of memory; ``auto``: not even one sample fitted."""
    advice = []
    if micro_batch not in (1, "auto"):
        advice.append("set batch.micro_batch to auto or to a smaller number")
    if not recompute:
        advice.append("set recompute: true")
    size = 1 if micro_batch == "auto" else micro_batch
    if not advice:
        return (
            f"{device_name} has too little memory even for batch.micro_batch {size} with "
            "recompute: true; use a larger GPU, or several with parallel: fsdp."
        )
    same = "the loss stays the same" + (" with either" if len(advice) > 1 else "")
    return (
        f"{device_name} has too little memory for batch.micro_batch {size}; "
        f"{' or '.join(advice)} ({same})."
    )


def _peak(card: Card, trial: Trial, size: int) -> float:
    """Bytes at the peak of a pass over ``size`` samples, the largest of all ranks.

    Two passes where a step has several: all but the first find their gradients allocated, and what
    a compilation takes is over by then.
    """
    passes = 1 if size == trial.samples else 2
    peak = math.inf
    try:
        for _ in range(passes):
            card.watch()
            trial.step(size)
        peak = float(card.peak())
    except torch.OutOfMemoryError:
        pass  # with this line the traceback goes, and the tensors that its frames held
    trial.release()
    card.tidy()
    return trial.worst(peak)


def _by_arithmetic(samples: int, estimate: Callable[[int], int], allowed: float) -> Choice:
    sizes = [size for size in divisors(samples) if size <= CPU_MOST]
    fitting = [size for size in sizes if estimate(size) <= allowed]
    size = max(fitting, default=1)
    shown = (
        f"about {estimate(size) / _GIB:.1f} GiB by arithmetic, {allowed / _GIB:.1f} GiB may be used"
    )
    if not fitting:
        return Choice(size, f"the smallest, though tight ({shown})")
    if size == max(sizes):
        return Choice(size, f"more make a CPU no faster ({shown})")
    return Choice(size, f"the largest that fits ({shown})")


def _kept(remembered: int) -> Choice:
    return Choice(remembered, "as recorded in the checkpoint, so that sums round as before")
