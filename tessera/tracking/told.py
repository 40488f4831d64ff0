"""What an attempt learned of its price while it ran, out of its journal.

    metric  cost/usd_per_hour   the price of an hour from the record's time on
    event   price/provider      the provider answered after the start had to do without it:
                                ``usd_per_hour``, ``usd_per_gb_up``, ``usd_per_gb_down`` (None: it
                                told none) and ``fixed``: whether it was that price all along

A price that was fixed all along replaces the guess that the attempt was recorded with. A bid may
have been another before, so it counts from then on; the price of traffic is the instance's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tessera.ledger.prices import PROVIDER, PriceChange, Quote
from tessera.runs import Attempt

HOUR = "cost/usd_per_hour"
LATE = "price/provider"


def price_changes(points: Iterable[tuple[float, float]]) -> tuple[PriceChange, ...]:
    """Times and prices of ``cost/usd_per_hour``, without what cannot be dollars."""
    return tuple((at, usd) for at, usd in points if math.isfinite(usd) and usd >= 0)


def corrected(attempt: Attempt, quote: Quote) -> Attempt:
    """``attempt`` as it would have been recorded had the provider answered at its start.

    Unless the price moves: then the hours before stay at the guess.
    """
    up, down = quote.usd_per_gb_up, quote.usd_per_gb_down
    better = replace(
        attempt,
        usd_per_gb_up=attempt.usd_per_gb_up if up is None else up,
        usd_per_gb_down=attempt.usd_per_gb_down if down is None else down,
    )
    if not quote.fixed:
        return better
    return replace(better, usd_per_hour=quote.usd_per_hour, price_source=PROVIDER)


def late_quote(details: Any) -> Quote | None:
    """The quote that an event ``price/provider`` tells of; None where it is none."""
    if not isinstance(details, Mapping):
        return None
    hour = _dollars(details.get("usd_per_hour"))
    if hour is None:
        return None
    up, down = (_dollars(details.get(name)) for name in ("usd_per_gb_up", "usd_per_gb_down"))
    return Quote(hour, up, down, details.get("fixed") is True)


def _dollars(value: Any) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
        return float(value)
    return None
