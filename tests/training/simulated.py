"""A machine whose seconds and dollars are made up, handed to a training in place of the real ones.

Steps take what they are said to take; the price of an hour is what it is said to be at each step.
What is handed over are ``Instruments``; only the passing of time hangs on the loop itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from tessera.runs import Attempt, Run
from tessera.training import session
from tessera.training.cost import RunningCost
from tessera.training.loop import Loop
from tessera.training.workplace import Instruments

HOUR = 3600.0
Changes = tuple[tuple[int, float], ...]
"""(step, value): from that step (1-based) on it is the value."""


@dataclass
class Simulation:
    """``usd`` is what the run has cost so far, over all attempts that share this object."""

    seconds: Changes = ((1, 36.0),)
    prices: Changes = ((1, 1.0),)
    usd: float = 0.0
    idle_usd: float = 0.0
    now: float = 0.0
    costs: dict[int, float] = field(default_factory=dict)
    """Dollars of the run once a step was done."""

    def price(self, step: int) -> float:
        return _at(self.prices, step)

    def pass_step(self, step: int) -> None:
        """Step ``step`` is taken."""
        seconds = _at(self.seconds, step)
        self.now += seconds
        self.usd += seconds * self.price(step) / HOUR
        self.costs[step] = self.usd

    @property
    def instruments(self) -> Instruments:
        """What the training reads."""
        return Instruments(lambda: self.now, partial(SimulatedCost, self))

    @contextmanager
    def here(self) -> Iterator[Instruments]:
        """Trainings of this process take its time meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            self.hang_on(patch.setattr)
            yield self.instruments

    def hang_on(self, set_: Any) -> None:
        """Let steps pass time."""
        plain, simulation = Loop._step, self

        def step(loop: Loop, batch: Any) -> bool:
            simulation.step = loop.done + 1
            simulation.pass_step(loop.done + 1)
            return plain(loop, batch)

        set_(Loop, "_step", step)

    def install(self, set_: Any) -> None:
        """For a process of its own: every training there gets these instruments."""
        self.hang_on(set_)
        real = session.train

        def train(*arguments: Any, **options: Any) -> session.Result:
            return real(*arguments, **{**options, "instruments": self.instruments})

        set_(session, "train", train)

    step: int = 1


class SimulatedCost(RunningCost):
    """What the simulation says, without a look at records or a clock."""

    def __init__(self, simulation: Simulation, run: Run, attempt: Attempt) -> None:
        self._simulation = simulation
        self.idle_usd = simulation.idle_usd

    def add_traffic(self, sent: int) -> float:
        return 0.0

    @property
    def usd_per_hour(self) -> float | None:
        return self._simulation.price(self._simulation.step)

    def usd(self) -> float | None:
        return self._simulation.usd


def _at(changes: Changes, step: int) -> float:
    return [value for since, value in changes if since <= step][-1]
