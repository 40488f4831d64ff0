"""The machines of a chaos run, and what they should have cost by the driver's own clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

USD_PER_HOUR = 3.6  # a tenth of a cent a second
HEARTBEAT_S = 1.0
PROVISION_S = 2.0
"""How long a machine is paid for before its first process starts."""
UPLOAD_S = 6.0
"""Longest time that the upload of a heartbeat, or of an ending, may take under these faults."""


@dataclass(frozen=True)
class Life:
    """One process: when it was born and died by our clock, and the attempt that it recorded."""

    born_at: float
    died_at: float
    attempt: str | None


@dataclass
class Machine:
    """A rented instance: a name, an empty cache, and a bill that runs from ``rented_at`` on."""

    number: int
    folder: Path
    rented_at: float
    lives: list[Life] = field(default_factory=list)

    @classmethod
    def rent(cls, number: int, folder: Path) -> Machine:
        """A fresh one, ready now."""
        return cls(number, folder, time.time() - PROVISION_S)

    @property
    def instance(self) -> str:
        """The name that the provider gives the container."""
        return f"C.{self.number}"

    def environment(self) -> dict[str, str]:
        """What a trainer on this machine finds."""
        return {
            "TESSERA_CACHE": str(self.folder / f"cache-{self.number}"),
            "TESSERA_USD_PER_HOUR": str(USD_PER_HOUR),
            "TESSERA_BILLED_FROM": f"{self.rented_at:.6f}",
            "TESSERA_HEARTBEAT_S": str(HEARTBEAT_S),
            "VAST_CONTAINERLABEL": self.instance,
        }

    @property
    def paid_s(self) -> float:
        """Seconds from renting it to the end of its last process."""
        return self.lives[-1].died_at - self.rented_at if self.lives else 0.0

    @property
    def unheard_s(self) -> float:
        """How many of these seconds the root may never have heard of, at most.

        The gaps between two attempts of one instance belong to the later one, so only the end
        counts: the processes that died before they recorded an attempt, and the time from the last
        word of the last recorded one to its death. A living attempt says something every half
        heartbeat or so and uploads it every heartbeat, so its last word in the root is no older
        than one and a half heartbeats and one upload. It may also have died before its first.
        """
        recorded = [life for life in self.lives if life.attempt is not None]
        if not recorded:
            return self.paid_s
        last = recorded[-1]
        tail = min(last.died_at - last.born_at, 1.5 * HEARTBEAT_S + UPLOAD_S)
        return self.lives[-1].died_at - last.died_at + tail


@dataclass(frozen=True)
class Dollars:
    """What the ledger says, beside the driver's clock; all in dollars.

    The ledger may be below the clock by ``tolerance`` and never above it.
    """

    ledger: float
    clock: float
    tolerance: float

    @property
    def fits(self) -> bool:
        """Whether they agree; 0.01 s of slack for the rounding of times in the records."""
        slack = 0.01 * USD_PER_HOUR / 3600
        return self.clock - self.tolerance - slack <= self.ledger <= self.clock + slack


def compare(ledger: float, machines: list[Machine]) -> Dollars:
    """The ledger's dollars against the clock's."""
    price = USD_PER_HOUR / 3600
    paid, unheard = (sum(getattr(m, name) for m in machines) for name in ("paid_s", "unheard_s"))
    return Dollars(ledger, price * paid, price * unheard)
