"""What the loop gathers between two log points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Interval:
    """Since the last log point: the losses of the steps that were applied, and how fast they went.

    Sum and count travel with a checkpoint, so that the mean at the next log point is the one of an
    undisturbed run; the clock (seconds from any moment) starts anew with each attempt and after a
    compilation.
    """

    loss: Tensor
    applied: Tensor
    clock: Callable[[], float]
    timed_steps: int = 0
    timed_tokens: int = 0
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.clock()

    @classmethod
    def fresh(cls, device: torch.device, clock: Callable[[], float]) -> Interval:
        """One that begins now."""
        return cls(torch.zeros((), device=device), torch.zeros((), device=device), clock)

    @property
    def seconds(self) -> float:
        """Of its steps, without what was set aside."""
        return self.clock() - self.since

    def restart_clock(self) -> None:
        """What came before does not count as speed."""
        self.timed_steps = self.timed_tokens = 0
        self.since = self.clock()
