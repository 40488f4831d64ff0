"""Made-up runs on made-up machines, to see what a forecast is worth.

Written apart from the forecaster: it knows nothing of it, and nothing here is normal-distributed
or a random walk because that one assumes so. Hosts come and go, have their own speed and their own
price; bids are pushed up by other people's demand and fall back; hosts get warm or share their
processor for some hours; a provider takes hosts away, now seldom and now in waves; what was done
since the last checkpoint is done again, after a wait and a set-up that is billed.

``make_run`` gives the log points of one run as a trainer would see them, and how it ended.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

REGIMES = ("calm", "shared hosts", "bids", "taken away", "day and night", "everything")
STEPS = 4000
LOG_EVERY, EVALUATE_EVERY, SAVE_EVERY = 20, 100, 200


@dataclass(frozen=True)
class LogPoint:
    """What a trainer knows at a log point; ``asides`` are (kind, seconds) since the one before."""

    attempt: int
    step: int
    hours: float
    usd: float
    usd_per_hour: float
    seconds: float
    asides: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class MadeRun:
    """One run: its log points in the order of time, what it cost, when (in hours) it was over."""

    regime: str
    points: tuple[LogPoint, ...]
    usd: float
    hours: float


@dataclass
class _World:
    """Where hosts come from, as one regime has it."""

    chance: random.Random
    regime: str
    clock: float = 0.0
    usd: float = 0.0
    _demand: float = 0.0
    _wave_until: float = 0.0
    _busy_until: float = 0.0
    _busy: float = 1.0
    base_price: float = field(init=False)
    step_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.base_price = self.chance.uniform(0.4, 4.0)
        self.step_s = self.chance.uniform(10.0, 90.0)  # 11 to 100 hours
        self.calm_h = self.chance.choice([6.0, 12.0, 25.0, 60.0])
        self.host_price, self.host_speed = 1.0, 1.0
        self.new_host(first=True)

    def has(self, *regimes: str) -> bool:
        return self.regime in (*regimes, "everything")

    def new_host(self, first: bool = False) -> None:
        """Another machine of the same model."""
        if not first:
            self.host_price = self.chance.triangular(0.85, 1.35, 1.0)
            self.host_speed = self.chance.uniform(0.93, 1.06)

    def price(self) -> float:
        """Of an hour, now."""
        price = self.base_price * self.host_price
        if self.has("bids"):
            price *= 1.0 + self._demand
        if self.regime == "day and night":
            price *= 1.0 + 0.12 * math.sin(2 * math.pi * self.clock / 24)
        return price

    def pass_time(self, hours: float) -> None:
        """Let demand and neighbours change; nobody asks what it costs."""
        chance = self.chance
        self.clock += hours
        if self.has("bids"):
            self._demand *= math.exp(-hours / 5.0)
            if chance.random() < hours / 2.5:  # somebody bids more, or leaves
                self._demand = max(-0.3, self._demand + chance.choice([-0.08, 0.06, 0.1, 0.2]))
        if self.has("shared hosts") and self.clock > self._busy_until:
            self._busy = 1.0
            if chance.random() < hours / 4.0:
                self._busy_until = self.clock + chance.uniform(0.3, 3.0)
                self._busy = chance.uniform(1.05, 1.4)

    def taken(self, hours: float) -> bool:
        """Whether the provider wants the host back within these hours."""
        if not self.has("taken away"):
            return False
        if self.clock > self._wave_until + 12 and self.chance.random() < hours / 48:
            self._wave_until = self.clock + self.chance.uniform(1.0, 4.0)
        rate = 1 / self.calm_h * (4.0 if self.clock < self._wave_until else 1.0)
        return self.chance.random() < hours * rate

    def seconds(self, steps: int) -> float:
        """What ``steps`` steps take on this host now."""
        noise = sum(self.chance.expovariate(1.0) for _ in range(4)) / 4  # a few of them stall
        return steps * self.step_s * (0.97 + 0.03 * noise) * self.host_speed * self._busy


def make_run(regime: str, seed: int) -> MadeRun:
    """One run of that regime."""
    world = _World(random.Random(f"{regime}/{seed}"), regime)
    chance, points = world.chance, []
    attempt, done = 1, 0
    evaluation_s = world.step_s * chance.uniform(1.0, 6.0)
    save_s = world.step_s * chance.uniform(0.1, 1.0)

    def pay(seconds: float) -> None:
        hours = seconds / 3600
        world.usd += hours * world.price()
        world.pass_time(hours)

    set_up(world, pay)
    while done < STEPS:
        before, bill_before = world.clock, world.usd
        seconds = world.seconds(LOG_EVERY)
        pay(seconds)
        done += LOG_EVERY
        asides = []
        for kind, every, cost in (
            ("evaluate", EVALUATE_EVERY, evaluation_s), ("checkpoint", SAVE_EVERY, save_s),
        ):  # fmt: skip
            if done % every == 0:
                asides.append((kind, cost * chance.uniform(0.9, 1.1)))
        points.append(
            LogPoint(attempt, done, world.clock, world.usd, world.price(), seconds, tuple(asides))
        )
        pay(sum(cost for _, cost in asides))
        if done < STEPS and world.taken(world.clock - before):
            assert world.usd > bill_before
            done -= done % SAVE_EVERY
            world.pass_time(chance.expovariate(1 / 0.4))  # nobody has one just now
            world.new_host()
            attempt += 1
            set_up(world, pay)
    return MadeRun(regime, tuple(points), world.usd, world.clock)


def set_up(world: _World, pay: Callable[[float], None]) -> None:
    """The machine is there and billed, and does not train yet."""
    pay(3600 * world.chance.uniform(0.05, 0.35))
