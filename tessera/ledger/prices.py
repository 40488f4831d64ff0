"""What an hour of a machine and its traffic cost, and who says so. Best source first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tessera.errors import InputError

PRICE_VARIABLE = "TESSERA_USD_PER_HOUR"
TRAFFIC_VARIABLE = "TESSERA_USD_PER_GB_UP"
PROVIDER, EXPERIMENT = "provider", "experiment"


@dataclass(frozen=True)
class HourlyPrice:
    """US dollars an hour and where the figure comes from; None where nobody told one."""

    usd_per_hour: float | None
    source: str


@dataclass(frozen=True)
class TrafficPrice:
    """US dollars for 10^9 bytes from the machine to the root, and where the figure comes from.

    0.0 where nobody told one: most providers bill none.
    """

    usd_per_gb_up: float
    source: str


def choose_price(
    *, provider: float | None = None, variable: str | None = None, experiment: float | None = None
) -> HourlyPrice:
    """The provider's own figure for this instance, else the variable, else the experiment's.

    ``variable`` is the text of ``TESSERA_USD_PER_HOUR``. Raises ``InputError`` if that is not a
    number of dollars.
    """
    if provider is not None:
        return HourlyPrice(provider, PROVIDER)
    if variable:
        return HourlyPrice(_dollars(PRICE_VARIABLE, variable, "an hour", 2.16), PRICE_VARIABLE)
    if experiment is not None:
        return HourlyPrice(experiment, EXPERIMENT)
    return HourlyPrice(None, "unknown")


def choose_traffic_price(
    *, provider: float | None = None, variable: str | None = None, experiment: float | None = None
) -> TrafficPrice:
    """The provider's own figure for this instance, else the variable, else the experiment's.

    ``variable`` is the text of ``TESSERA_USD_PER_GB_UP``. Raises ``InputError`` if that is not a
    number of dollars.
    """
    if provider is not None:
        return TrafficPrice(provider, PROVIDER)
    if variable:
        value = _dollars(TRAFFIC_VARIABLE, variable, "for 10^9 bytes", 0.02)
        return TrafficPrice(value, TRAFFIC_VARIABLE)
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
