"""What one attempt works with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tessera.ledger.prices import AskPrice
from tessera.model.peak import Peak
from tessera.runs import Attempt, Run
from tessera.storage import Root
from tessera.tracking.journal import Journal
from tessera.training.cost import RunningCost
from tessera.training.parallel import World
from tessera.training.preemption import StopRequest
from tessera.training.progress import ProgressLine


@dataclass(frozen=True)
class Instruments:
    """What time and money are read from: ``clock`` in seconds from any moment, ``cost_of`` a run.

    ``ask_price`` asks the provider what this machine costs now; None where there is nobody to ask.
    ``began`` is told, once and by one worker, which run this is. A simulation brings its own.
    """

    clock: Callable[[], float] = time.monotonic
    cost_of: Callable[[Run, Attempt], RunningCost] = RunningCost
    ask_price: AskPrice | None = None
    began: Callable[[Run], None] = lambda _: None


REAL = Instruments()


@dataclass
class Session:
    """What one attempt works with."""

    root: Root
    run: Run
    attempt: Attempt
    journal: Journal
    line: ProgressLine
    peak: Peak
    stop: StopRequest
    world: World
    instruments: Instruments = REAL
