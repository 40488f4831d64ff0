"""What a run's earlier attempts left in their journals for the bill: traffic and prices.

Read once, at the start of an attempt: one listing an attempt and one read a segment, eight at a
time, and nothing at all for attempts whose traffic was free and whose price nobody followed. A line
is parsed only if it names what is looked for: a segment of 4 MB takes milliseconds. Broken lines
are passed over; ``tessera-exp`` names such damage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tessera.ledger.prices import PriceChange, Quote
from tessera.ledger.traffic import DOWN_BYTES, UP_BYTES, count_bytes, traffic_usd
from tessera.runs import Attempt, Run
from tessera.tracking.records import copy_of, segments
from tessera.tracking.told import HOUR, LATE, corrected, late_quote, price_changes

_READERS = 8  # object stores answer slowly but many at once; a segment is at most 4 MB
_METRICS = (UP_BYTES, DOWN_BYTES, HOUR)


@dataclass(frozen=True)
class Past:
    """Of one attempt: dollars of its traffic, changes of its price, a late word of the provider."""

    traffic_usd: float = 0.0
    prices: tuple[PriceChange, ...] = ()
    quote: Quote | None = None


NOTHING = Past()


def read_past(run: Run, attempts: Sequence[Attempt]) -> dict[str, Past]:
    """By attempt id; those that cannot have left anything are left out."""
    billed = [
        attempt
        for attempt in attempts
        if attempt.price_followed or attempt.usd_per_gb_up > 0 or attempt.usd_per_gb_down > 0
    ]
    if not billed:
        return {}
    found: dict[str, Past] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        listed = list(pool.map(lambda attempt: segments(run, attempt.id), billed))
        read = [pool.map(lambda twins: _told(copy_of(run, twins)[1]), each) for each in listed]
        for attempt, parts in zip(billed, read, strict=True):
            records = {number: told for part in parts for number, told in part.items()}
            found[attempt.id] = _sum_up(attempt, [told for _, told in sorted(records.items())])
    return found


_Told = tuple[str, float, Any]
"""Key, time and value of a record."""


def _sum_up(attempt: Attempt, records: Sequence[_Told]) -> Past:
    quotes = [late_quote(value) for key, _, value in records if key == LATE]
    quote = next((quote for quote in quotes if quote is not None), None)
    better = attempt if quote is None else corrected(attempt, quote)

    def dollars(wanted: str, usd_per_gb: float) -> float:
        sizes = (value for key, _, value in records if key == wanted)
        return traffic_usd(count_bytes(sizes), usd_per_gb)

    return Past(
        dollars(UP_BYTES, better.usd_per_gb_up) + dollars(DOWN_BYTES, better.usd_per_gb_down),
        price_changes((at, value) for key, at, value in records if key == HOUR),
        quote,
    )


def _told(segment: bytes) -> dict[int, _Told]:
    """What a journal segment tells of traffic and prices, by the record's sequence number."""
    found: dict[int, _Told] = {}
    for key in (*_METRICS, LATE):
        for line in _lines_with(segment, f'"{key}"'.encode()):
            try:
                record = json.loads(line)
                if record["key"] == key:
                    found[int(record["seq"])] = (key, float(record["time"]), _value(record))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # a torn last line, or damage
    return found


def _value(record: Mapping[str, Any]) -> Any:
    """A metric's number or an event's details; ``ValueError`` if the record is neither."""
    if record["key"] == LATE and record["kind"] == "event":
        return record["value"]
    if record["key"] in _METRICS and record["kind"] == "metric":
        return float(record["value"])
    raise ValueError(record["kind"])


def _lines_with(data: bytes, text: bytes) -> Iterator[bytes]:
    """The lines of ``data`` that contain ``text``; the others are not even cut out."""
    at = data.find(text)
    while at >= 0:
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        yield data[data.rfind(b"\n", 0, at) + 1 : end]
        at = data.find(text, end)
