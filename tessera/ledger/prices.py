"""What an hour of a machine costs, and who says so. Best source first."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tessera.errors import InputError

PRICE_VARIABLE = "TESSERA_USD_PER_HOUR"


@dataclass(frozen=True)
class HourlyPrice:
    """US dollars an hour and where the figure comes from; None where nobody told one."""

    usd_per_hour: float | None
    source: str


def choose_price(
    *, provider: float | None = None, variable: str | None = None, experiment: float | None = None
) -> HourlyPrice:
    """The provider's own figure for this instance, else the variable, else the experiment's.

    ``variable`` is the text of ``TESSERA_USD_PER_HOUR``. Raises ``InputError`` if that is not a
    number of dollars.
    """
    if provider is not None:
        return HourlyPrice(provider, "provider")
    if variable:
        try:
            value = float(variable)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise InputError(
                f"{PRICE_VARIABLE} is {variable!r}; expected US dollars an hour, such as 2.16."
            )
        return HourlyPrice(value, PRICE_VARIABLE)
    if experiment is not None:
        return HourlyPrice(experiment, "experiment")
    return HourlyPrice(None, "unknown")
