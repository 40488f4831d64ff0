"""How much longer, and how many dollars at the end: the speed so far, carried on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """Seconds that are left and dollars at the end (None: price unknown)."""

    seconds_left: float
    usd_at_end: float | None


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
