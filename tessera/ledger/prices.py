"""What an hour of a machine and its traffic cost, and who says so. Best source first:

the provider's own figure for this instance, the variable that a person set, the catalog's figure
that the launcher handed over (an hour only), the experiment's guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tessera.errors import InputError

PRICE_VARIABLE = "TESSERA_USD_PER_HOUR"
CATALOG_VARIABLE = "TESSERA_CATALOG_USD_PER_HOUR"
UP_VARIABLE, DOWN_VARIABLE = "TESSERA_USD_PER_GB_UP", "TESSERA_USD_PER_GB_DOWN"
PROVIDER, CATALOG, EXPERIMENT, UNKNOWN = "provider", "catalog", "experiment", "unknown"

PriceChange = tuple[float, float]
"""From this time on (seconds since the epoch) an hour costs so many US dollars."""


@dataclass(frozen=True)
class HourlyPrice:
    """US dollars an hour and where the figure comes from; None where nobody told one.

    ``note`` says why the provider's own figure is missing where it was asked for.
    """

    usd_per_hour: float | None
    source: str
    note: str = ""

    @property
    def words(self) -> str:
        """Such as ``$2.16/h (catalog)``."""
        if self.usd_per_hour is None:
            return "not known"
        return f"${self.usd_per_hour:g}/h ({self.source})"


@dataclass(frozen=True)
class TrafficPrice:
    """US dollars for 10^9 bytes in one direction, and where the figure comes from.

    0.0 where nobody told one: most providers bill none.
    """

    usd_per_gb: float
    source: str


@dataclass(frozen=True)
class Quote:
    """What the provider says at one moment that this instance costs; dollars as above.

    ``fixed``: the hourly price is the one that was agreed when the instance was rented, not a bid
    that moves. Traffic is None where the provider told no price of it.
    """

    usd_per_hour: float
    usd_per_gb_up: float | None
    usd_per_gb_down: float | None
    fixed: bool


AskPrice = Callable[[], Quote]
"""Asks the provider once more; raises ``TesseraError`` where it does not answer."""


def choose_price(
    *,
    provider: float | None = None,
    variable: str | None = None,
    catalog: str | None = None,
    experiment: float | None = None,
    note: str = "",
) -> HourlyPrice:
    """The best source that tells a price; see the head of this module.

    ``variable`` and ``catalog`` are the texts of ``TESSERA_USD_PER_HOUR`` and
    ``TESSERA_CATALOG_USD_PER_HOUR``. Raises ``InputError`` if the one that counts is not a number
    of dollars. ``note`` is kept with any figure but the provider's.
    """
    if provider is not None:
        return HourlyPrice(provider, PROVIDER)
    if variable:
        usd = _dollars(PRICE_VARIABLE, variable, "an hour", 2.16)
        return HourlyPrice(usd, PRICE_VARIABLE, note)
    if catalog:
        return HourlyPrice(_dollars(CATALOG_VARIABLE, catalog, "an hour", 2.16), CATALOG, note)
    if experiment is not None:
        return HourlyPrice(experiment, EXPERIMENT, note)
    return HourlyPrice(None, UNKNOWN, note)


def choose_traffic_price(
    *,
    provider: float | None = None,
    variable: str | None = None,
    experiment: float | None = None,
    name: str = UP_VARIABLE,
) -> TrafficPrice:
    """The provider's own figure for this instance, else the variable, else the experiment's.

    ``variable`` is the text of the variable ``name``. Raises ``InputError`` if that is not a number
    of dollars.
    """
    if provider is not None:
        return TrafficPrice(provider, PROVIDER)
    if variable:
        return TrafficPrice(_dollars(name, variable, "for 10^9 bytes", 0.02), name)
    if experiment is not None:
        return TrafficPrice(experiment, EXPERIMENT)
    return TrafficPrice(0.0, "not billed")


def _dollars(name: str, text: str, unit: str, example: float) -> float:
    """The number that the variable ``name`` holds; ``InputError`` if it is no sum of dollars."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise InputError(f"{name} is {text!r}; expected US dollars {unit}, such as {example}.")
    return value
