"""Where a run ends that a budget ends: the plan, how it moves, and what is kept back.

The learning rate is constant until ``decay_start`` and then falls in a straight line that ends at
``end_step``. A new plan may put both anywhere ahead while the rate is still constant; once it
falls, only the end moves, and the line goes on from the rate of the last step. Money:

    0 ------------- aim -- line ------------------ budget
      steps are       |     |  reserve: last save, upload, the idle machine until it is down;
      planned to here-'     |  allowance: earlier machines, idle until they were down
                            '-- the hard stop

Pure arithmetic; ``tessera.training.budget`` measures and decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tessera.errors import InputError
from tessera.ledger.dollars import as_typed, dollars

BUDGET_VARIABLE = "TESSERA_BUDGET_USD"
OPEN = 10**15
"""Step of an end that is not planned yet."""
TOLERANCE = 0.01
"""Share of the steps ahead by which an end has to move before it is planned anew."""
SLACK = 0.1
"""Share of the reserve by which plans stay away from the line where the hard stop is."""
IDLE_S = 600.0
"""How long a rented machine may stand idle before it is down: the task YAMLs' ``autostop``."""
FINISH_S = 60.0
"""To notice that the money is gone, to evaluate once more, to leave."""
UPLOAD_BYTES_PER_S = 50e6
"""A store that is slower than this needs a larger reserve."""
CHECKPOINT_BYTES, MODEL_BYTES = 12, 4
"""A parameter: weights and two moments; the published weights."""


@dataclass(frozen=True)
class Plan:
    """The end of a run. Steps count from 0, so the last one is ``end_step`` - 1.

    ``decay_start`` is the last step whose learning rate is ``level`` of the way from the final to
    the peak rate; the last step has 0 of it. Both mean nothing where tokens (or epochs) size the
    run: there the schedule's own shape holds.
    """

    end_step: int = OPEN
    decay_start: int = OPEN
    level: float = 1.0
    sized_by: str = "budget"

    @classmethod
    def fixed(cls, steps: int) -> Plan:
        """The plan of a run that knows its steps."""
        return cls(steps, sized_by="tokens")

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Plan:
        """What ``state`` returned; ``KeyError``, ``TypeError`` or ``ValueError`` for another."""
        return cls(
            int(data["steps"]), int(data["decay_start"]), float(data["level"]), "budget"
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint and the journal."""
        data = asdict(self)
        return {"steps": data.pop("end_step"), **data}

    @property
    def known(self) -> bool:
        """Whether there is an end yet."""
        return self.end_step < OPEN

    def share(self, step: int) -> float:
        """What is left of the way down to the final rate at ``step``: 1 at the peak, 0 last."""
        if step <= self.decay_start:
            return self.level
        width = max(self.end_step - 1 - self.decay_start, 1)
        return self.level * max(0.0, 1.0 - (step - self.decay_start) / width)

    def moved(self, done: int, end_step: int, warmup: int, decay_fraction: float) -> Plan:
        """The plan with its end at ``end_step``, as seen once ``done`` steps are done.

        The rate of the last step taken, ``done`` - 1, is on the new line as it was on the old.
        """
        if self.share(done - 1) < 1.0:
            return replace(
                self, end_step=end_step, decay_start=done - 1, level=self.share(done - 1)
            )
        start = max(warmup, min(round(end_step * (1 - decay_fraction)), end_step - 2), done - 1)
        return replace(self, end_step=end_step, decay_start=start)

    def differs(self, other: Plan, done: int) -> bool:
        """Whether ``other`` ends so far from here that it is worth taking."""
        tolerance = max(1.0, TOLERANCE * (self.end_step - done))
        return abs(other.end_step - self.end_step) > tolerance


@dataclass(frozen=True)
class Budget:
    """US dollars of a run, and how many of them are kept back for its end.

    ``idle_usd`` allows for what earlier machines cost until they were down: nobody records that.
    """

    usd: float
    reserve_usd: float
    idle_usd: float = 0.0

    @property
    def line_usd(self) -> float:
        """Where the hard stop is."""
        return self.usd - self.reserve_usd - self.idle_usd

    @property
    def aim_usd(self) -> float:
        """What is planned to be spent: noise alone should not bring the hard stop about."""
        return self.line_usd - SLACK * self.reserve_usd

    @property
    def eaten_up(self) -> bool:
        """Whether nothing of it is left to train for."""
        return self.reserve_usd >= self.usd

    def steps_left(self, usd_so_far: float, usd_per_step: float) -> int:
        """Whole steps that the rest of the money pays for, 0 if there is none."""
        left = self.aim_usd - usd_so_far
        if left <= 0:
            return 0
        return min(OPEN, math.floor(left / usd_per_step)) if usd_per_step > 0 else OPEN


def closing_usd(
    usd_per_hour: float, *, rented: bool, upload_bytes: int, usd_per_gb_up: float
) -> float:
    """US dollars that the end of a run takes: the default reserve.

    The price of the minutes until an idle machine is down (a machine of one's own bills none), of
    ``FINISH_S``, of the upload of the last checkpoint and the model (``upload_bytes``), and of
    their traffic.
    """
    seconds = FINISH_S + upload_bytes / UPLOAD_BYTES_PER_S + (IDLE_S if rented else 0.0)
    return usd_per_hour * seconds / 3600 + usd_per_gb_up * upload_bytes / 1e9


def kept_back(
    given: float | None,
    usd_per_hour: float,
    *,
    rented: bool,
    parameters: int,
    usd_per_gb_up: float,
) -> float:
    """The reserve of a run: the experiment's, else what its end takes at this price."""
    if given is not None:
        return given
    return closing_usd(
        usd_per_hour,
        rented=rented,
        upload_bytes=(CHECKPOINT_BYTES + MODEL_BYTES) * parameters,
        usd_per_gb_up=usd_per_gb_up,
    )


def nothing_left(budget: Budget, usd_per_hour: float) -> str:
    """The sentence that refuses a budget that its reserve eats up."""
    price = as_typed(usd_per_hour)
    return (
        f"Nothing can be trained for a budget of {as_typed(budget.usd)} at {price} an hour: "
        f"{dollars(budget.reserve_usd)} are kept back for the last save and the minutes until the "
        "machine is down; raise the budget, or lower budget_reserve_usd."
    )


def read_budget(text: str, who: str) -> float:
    """The dollars that the option or variable ``who`` holds; ``InputError`` if it is no budget."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise InputError(f"{who} is {text!r}; expected US dollars above 0, such as 315.")
    return value


def choose_budget(option: str | None, variable: str | None) -> tuple[float, str] | None:
    """The option ``--budget``, else the variable, and who gave it; None leaves it to the file."""
    if option is not None:
        return read_budget(option, "--budget"), f"--budget {option}"
    if variable and variable.strip():
        return read_budget(variable, BUDGET_VARIABLE), f"{BUDGET_VARIABLE}={variable}"
    return None
