"""How the run will end, told at log points: speed and price so far, carried on (``forecast``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tessera.ledger.forecast import Forecast, Forecaster, Point, forecast
from tessera.ledger.pace import Pace
from tessera.runs import Attempt
from tessera.tracking.journal import Journal
from tessera.training.budget import BudgetKeeper, every_steps
from tessera.training.program import Program


class Outlook:
    """What one attempt foresees; ``state`` travels with checkpoints, so that the next one knows."""

    def __init__(
        self,
        program: Program,
        attempt: Attempt,
        pace: Pace,
        clock: Callable[[], float],
        state: Mapping[str, Any] | None,
    ) -> None:
        self._program, self._attempt, self._pace, self._clock = program, attempt, pace, clock
        self._epoch = time.time() - clock()
        self._forecaster = Forecaster.of(program.experiment.checkpoint.every_steps, state)

    def state(self) -> dict[str, Any] | None:
        """JSON values for a checkpoint."""
        return self._forecaster.state()

    def at(
        self, step: int, usd: float | None, usd_per_hour: float | None, budget: BudgetKeeper | None
    ) -> Forecast | None:
        """The forecast after ``step`` steps; None while nobody knows where the end is."""
        steps = self._program.steps
        seconds = self._pace.seconds_per_step(every_steps(self._program))
        if seconds is None or not self._program.plan.known:
            return None
        if usd is None or not usd_per_hour:
            return forecast(
                steps_left=steps - step,
                seconds_per_step=seconds,
                usd_so_far=usd,
                usd_per_hour=usd_per_hour,
            )
        hours = (self._epoch + self._clock()) / 3600
        point = Point(self._attempt.number, step, hours, usd, usd_per_hour)
        self._forecaster.observe(point, seconds, steps)
        found = self._forecaster.forecast(steps - step, seconds)
        return found if budget is None else budget.bounded(found, usd, usd_per_hour)

    @staticmethod
    def record(journal: Journal, found: Forecast | None, step: int) -> None:
        """``forecast/usd`` and its interval, and the seconds that are left."""
        if found is None:
            return
        figures = {
            "usd": found.usd_at_end,
            "usd_low": found.usd_low,
            "usd_high": found.usd_high,
            "seconds_left": found.seconds_left,
        }
        for name, value in figures.items():
            if value is not None:
                journal.metric(f"forecast/{name}", value, step)
