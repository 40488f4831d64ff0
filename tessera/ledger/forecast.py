"""Dollars and hours at the end of a run: what is likely, and where four of five runs end.

What is ahead is played through many times, from what was seen of this run so far:

- the pace: the present one, and how much stretches of the run have differed from one another;
- the price: its moves come back to a mean or do not, as they did up to now (an
  Ornstein-Uhlenbeck process, whose limit is a random walk);
- interruptions: how often a machine was lost, what its loss cost in billed hours, how long nobody
  had another; the next machine has a price and a speed of its own.

Before something was seen a weak prior stands in for it, so a young run is told wide. The paths are
drawn from a fixed seed: the same records give the same forecast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PATHS = 600
LOW, HIGH = 0.1, 0.9
"""Between these quantiles lie four of five paths."""

# The priors. Hours are those of the machine, prices and paces are logarithms.
LOSSES, LOSSES_H = 0.4, 12.0  # machines lost, in so many hours
SETUP_H, GAP_H = 0.25, 0.4  # billed hours until a new machine trains; hours until there is one
HOST_PRICE, HOST_SPEED = 0.12, 0.04  # how machines of one model differ
PRICE_MOVE, PACE_MOVE = 0.02, 0.02  # standard deviation of what an hour changes
PRICE_SPREAD, PACE_SPREAD = 0.035, 0.025  # standard deviation over days
PRIOR_H = 2.0  # of observation: what those four are worth
BLOCK_SHARE = 0.03
"""The pace is looked at in stretches of so much of the whole run: steps alone are noise."""
_MOST_LOSSES = 64


@dataclass(frozen=True)
class Forecast:
    """Seconds left and dollars at the end; None where the price is unknown.

    ``usd_low`` and ``usd_high``, and the seconds alike, hold four of five runs.
    """

    seconds_left: float
    usd_at_end: float | None
    usd_low: float | None = None
    usd_high: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None

    def within(self, aim_usd: float, line_usd: float) -> Forecast:
        """The same for a run that a budget ends: its end moves so that ``aim_usd`` are spent."""
        if self.usd_at_end is None or self.usd_low is None or self.usd_high is None:
            return self
        low = min(max(self.usd_low, min(self.usd_at_end, aim_usd)), line_usd)
        middle = min(self.usd_at_end, line_usd)
        high = max(min(self.usd_high, line_usd), middle)
        return Forecast(self.seconds_left, middle, low, high, self.seconds_low, self.seconds_high)


def forecast(
    *,
    steps_left: int,
    seconds_per_step: float,
    usd_so_far: float | None,
    usd_per_hour: float | None,
) -> Forecast:
    """Carry the present speed and price on to the last step."""
    left = steps_left * seconds_per_step
    if usd_so_far is None or usd_per_hour is None:
        return Forecast(left, None)
    return Forecast(left, usd_so_far + usd_per_hour * left / 3600)


@dataclass(frozen=True)
class Point:
    """A log point: attempt number, steps done, hours since the epoch, dollars so far, price."""

    attempt: int
    step: int
    hours: float
    usd: float
    usd_per_hour: float


@dataclass
class Drift:
    """A quantity that wanders, and may come back: an Ornstein-Uhlenbeck process, by its moments.

    ``moves`` adds up the squares of its changes over ``hours``; ``total`` and ``squares`` weight
    its values with the hours that they held.
    """

    hours: float = 0.0
    moves: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def hold(self, value: float, hours: float) -> None:
        """It was ``value`` for ``hours``."""
        self.hours += hours
        self.total += value * hours
        self.squares += value * value * hours

    def ahead(
        self, now: float, hours: Floats, normal: Floats, move: float, spread: float
    ) -> Floats:
        """Paths of how its mean over the next ``hours`` differs from ``now``, the present value.

        ``move`` and ``spread`` are the prior's; ``normal`` are standard normal draws.
        """
        known = self.hours + PRIOR_H
        rate = (move**2 * PRIOR_H + self.moves) / known
        mean = (self.total + now * PRIOR_H) / known
        variance = self.squares - 2 * mean * self.total + mean**2 * self.hours
        variance = (max(0.0, variance) + (spread**2 + (now - mean) ** 2) * PRIOR_H) / known
        found = 2 * variance / rate  # of a walk that never comes back: a third of the hours
        tau = found / max(0.05, 1 - 3 * found / known)
        x = np.maximum(hours, 1e-6) / tau
        once = (1 - np.exp(-x)) / x
        # Mean and variance of the average of such a process over x of its times.
        wander = rate * tau * (1 - 2 * once + (1 - np.exp(-2 * x)) / (2 * x)) / x
        unsure = rate * tau * tau / known * (1 - once) ** 2
        sigma = np.sqrt(np.maximum(0.0, wander + unsure))
        return (mean - now) * (1 - once) + sigma * normal


@dataclass
class _Seen:
    """What was observed, in numbers that travel with a checkpoint."""

    price: Drift = field(default_factory=Drift)
    pace: Drift = field(default_factory=Drift)
    hours: float = 0.0
    losses: int = 0
    lost_h: float = 0.0
    gap_h: float = 0.0
    host_moves: float = 0.0  # squared, of the price from one machine to the next


@dataclass
class Forecaster:
    """Observes a run, over all its attempts, and says how it may end.

    ``redo_steps`` is how many steps lie between two checkpoints: half of them, in the mean, are
    done again when a machine is lost.
    """

    redo_steps: int
    last: Point | None = None
    seen: _Seen = field(default_factory=_Seen)
    _block_from: Point | None = None
    _block_pace: float | None = None

    @classmethod
    def of(cls, redo_steps: int, state: Mapping[str, Any] | None) -> Forecaster:
        """Continue from what ``state`` returned; begin anew where that cannot be read."""
        try:
            if state:
                seen = dict(state["seen"])
                price, pace = Drift(**seen.pop("price")), Drift(**seen.pop("pace"))
                return cls(redo_steps, Point(**state["last"]), _Seen(price, pace, **seen))
        except (KeyError, TypeError, AttributeError):
            pass
        return cls(redo_steps)

    def state(self) -> dict[str, Any] | None:
        """JSON values; None before the first observation."""
        return {"last": asdict(self.last), "seen": asdict(self.seen)} if self.last else None

    def observe(self, point: Point, seconds_per_step: float, steps: int) -> None:
        """Take in a log point; the run has ``steps`` steps at ``seconds_per_step`` by now."""
        last, self.last = self.last, point
        if last is None or min(point.usd_per_hour, last.usd_per_hour) <= 0:
            self._block_from = point
            return
        move = math.log(point.usd_per_hour / last.usd_per_hour)
        passed = max(0.0, point.hours - last.hours)
        if point.attempt == last.attempt and point.step > last.step:
            self.seen.hours += passed
            self.seen.price.moves += move * move
            self.seen.price.hold(math.log(last.usd_per_hour), passed)
            self._watch_pace(self._block_from or last, point, steps)
        else:
            self._lost(last, point, passed, move, seconds_per_step)

    def _watch_pace(self, start: Point, point: Point, steps: int) -> None:
        self._block_from = start
        passed = point.hours - start.hours
        if point.step - start.step < max(1.0, BLOCK_SHARE * steps) or passed <= 0:
            return
        pace = math.log(passed / (point.step - start.step))
        if self._block_pace is not None:
            self.seen.pace.moves += (pace - self._block_pace) ** 2
        self.seen.pace.hold(pace, passed)
        self._block_from, self._block_pace = point, pace

    def _lost(
        self, last: Point, point: Point, passed: float, move: float, seconds_per_step: float
    ) -> None:
        seen, count = self.seen, max(1, point.attempt - last.attempt)
        billed = max(0.0, point.usd - last.usd) / point.usd_per_hour
        useful = (point.step - last.step) * seconds_per_step / 3600
        seen.losses += count
        seen.lost_h += max(0.0, billed - useful)
        seen.gap_h += max(0.0, passed - billed)
        seen.hours += min(passed, billed)
        seen.host_moves += move * move
        self._block_from, self._block_pace = point, None

    # -- what may come ---------------------------------------------------------------------------

    def forecast(self, steps_left: int, seconds_per_step: float) -> Forecast:
        """From the last point on, at ``seconds_per_step`` by now."""
        if self.last is None:
            return Forecast(steps_left * seconds_per_step, None)
        if steps_left <= 0:
            usd = self.last.usd
            return Forecast(0.0, usd, usd, usd, 0.0, 0.0)
        chance = np.random.default_rng(0)
        hours: Floats = np.full(PATHS, steps_left * seconds_per_step / 3600)
        pace = math.log(max(seconds_per_step, 1e-9) / 3600)
        drift = self._drift(self.seen.pace, pace, hours, chance, PACE_MOVE, PACE_SPREAD)
        working = hours * np.exp(drift)
        losses, lost, gaps = self._loss_paths(chance, working, seconds_per_step)
        price, slower = self._machine_paths(chance, working, losses)
        billed = working * slower + lost
        total = self.last.usd + billed * price
        low, middle, high = map(float, np.quantile(total, (LOW, 0.5, HIGH)))
        ends = [float(end) for end in np.quantile(3600 * (billed + gaps), (LOW, 0.5, HIGH))]
        if self.seen.losses == 0 and self.seen.price.moves == 0:  # nothing moves: carry it on
            left = 3600 * float(hours[0])
            ends[1] = min(max(left, ends[0]), ends[2])
            middle = min(max(self.last.usd + left / 3600 * self.last.usd_per_hour, low), high)
        return Forecast(ends[1], middle, low, high, ends[0], ends[2])

    def _drift(
        self, drift: Drift, now: float, hours: Floats, chance: np.random.Generator,
        move: float, spread: float,
    ) -> Floats:  # fmt: skip
        return drift.ahead(now, hours, chance.standard_normal(PATHS), move, spread)

    def _loss_paths(
        self, chance: np.random.Generator, working: Floats, seconds_per_step: float
    ) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
        """Machines that will be lost, the billed hours that costs, and the hours of waiting."""
        seen = self.seen
        rate = chance.gamma(LOSSES + seen.losses, 1 / (LOSSES_H + seen.hours), PATHS)
        losses = np.minimum(chance.poisson(rate * working), _MOST_LOSSES)
        usual = SETUP_H + self.redo_steps / 2 * seconds_per_step / 3600
        each = (usual + seen.lost_h) / chance.gamma(seen.losses + 2.0, 1.0, PATHS)
        wait = (GAP_H + seen.gap_h) / chance.gamma(seen.losses + 2.0, 1.0, PATHS)
        some = np.maximum(losses, 1)
        lost = np.where(losses > 0, chance.gamma(3.0 * some, each / 3.0), 0.0)
        gaps = np.where(losses > 0, chance.gamma(1.0 * some, wait), 0.0)
        return losses, lost, gaps

    def _machine_paths(
        self, chance: np.random.Generator, working: Floats, losses: npt.NDArray[np.int64]
    ) -> tuple[Floats, Floats]:
        """Mean price of an hour, and by what factor the machines to come are slower."""
        assert self.last is not None
        seen = self.seen
        most = int(losses.max()) + 1
        shares = chance.exponential(1.0, (PATHS, most))
        shares[np.arange(most)[None, :] > losses[:, None]] = 0.0
        shares /= shares.sum(axis=1, keepdims=True)
        own = math.sqrt((HOST_PRICE**2 + seen.host_moves / 2) / (1 + seen.losses))
        prices = own * chance.standard_normal((PATHS, most))
        speeds = HOST_SPEED * chance.standard_normal((PATHS, most))
        prices[:, 0] = speeds[:, 0] = 0.0  # the present machine
        now = math.log(max(self.last.usd_per_hour, 1e-9))
        drift = self._drift(seen.price, now, working, chance, PRICE_MOVE, PRICE_SPREAD)
        mean = (shares * np.exp(prices)).sum(axis=1) * self.last.usd_per_hour * np.exp(drift)
        return mean, (shares * np.exp(speeds)).sum(axis=1)
