"""The meter: which seconds of which instance each attempt pays for, and what they were spent on.

The cost of an instance is its price times the union of its billed intervals, and each second
belongs to exactly one attempt. Several attempts of one or many runs may share an instance, and
each may name the instance's creation as the start of its bill: the one that started first owns
its interval, the next owns what is left (so an idle gap between two attempts is paid by the later
one). A price that changes (a bid that moves) holds from the time at which it was seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tessera.ledger.prices import PriceChange

Interval = tuple[float, float]

CATEGORIES = (
    "provision", "setup", "compile", "data_wait", "train", "evaluate", "checkpoint", "idle", "lost",
)  # fmt: skip
"""Every billed second is filed under one of these."""


@dataclass(frozen=True)
class Usage:
    """The billed life of one attempt; times in seconds since the epoch.

    ``ended_at`` is what the attempt said, or its last heartbeat with ``estimated`` set.
    ``usd_per_hour`` holds until the first of ``prices``, each of which holds until the next.
    """

    attempt: str
    provider: str
    instance: str
    started_at: float
    billed_from: float
    ended_at: float
    usd_per_hour: float | None
    estimated: bool = False
    prices: tuple[PriceChange, ...] = ()


@dataclass(frozen=True)
class Bill:
    """What one attempt owns: disjoint intervals, seconds and dollars (None: price unknown).

    ``billed_usd`` is its part of what the provider billed for machine and traffic; None where no
    whole invoice is recorded.
    """

    attempt: str
    intervals: tuple[Interval, ...]
    seconds: float
    usd: float | None
    estimated: bool
    billed_usd: float | None = None


@dataclass(frozen=True)
class Span:
    """Seconds that the loop filed under a category, ending at ``step``."""

    attempt: str
    category: str
    seconds: float
    step: int


def bill(usages: Iterable[Usage]) -> dict[str, Bill]:
    """Give every billed second to exactly one attempt; keyed by ``Usage.attempt``.

    An attempt that is named several times (read at two moments, say) counts once, as far as it was
    seen last.
    """
    once: dict[str, Usage] = {}
    for usage in usages:
        once[usage.attempt] = max(once.get(usage.attempt, usage), usage, key=_reach)
    by_instance: defaultdict[tuple[str, str], list[Usage]] = defaultdict(list)
    for usage in once.values():
        by_instance[usage.provider, usage.instance].append(usage)
    bills: dict[str, Bill] = {}
    for group in by_instance.values():
        taken: list[Interval] = []
        for usage in sorted(group, key=lambda u: (u.started_at, u.attempt)):
            wanted = (min(usage.billed_from, usage.started_at), usage.ended_at)
            own = subtract(wanted, taken)
            taken = sorted([*taken, *own])
            seconds = sum(end - start for start, end in own)
            usd = time_usd(own, usage.usd_per_hour, usage.prices)
            bills[usage.attempt] = Bill(usage.attempt, tuple(own), seconds, usd, usage.estimated)
    return bills


def time_usd(
    intervals: Iterable[Interval], usd_per_hour: float | None, prices: Sequence[PriceChange] = ()
) -> float | None:
    """US dollars of disjoint intervals, each second at the price that held then.

    Before the first of ``prices`` that is ``usd_per_hour``; where nobody had told one, the first
    that was told is the best guess. None if there never was one.
    """
    changes = sorted(prices)
    if usd_per_hour is None and not changes:
        return None
    first = changes[0][1] if usd_per_hour is None else usd_per_hour
    steps = [(-math.inf, first), *changes, (math.inf, 0.0)]
    total = 0.0
    for start, end in intervals:
        for (since, price), (until, _) in pairwise(steps):
            total += price * max(0.0, min(end, until) - max(start, since))
    return total / 3600


def _reach(usage: Usage) -> tuple[float, bool]:
    return usage.ended_at, not usage.estimated  # of two that agree, the one that was told


def subtract(wanted: Interval, taken: Sequence[Interval]) -> list[Interval]:
    """``wanted`` without the parts that the disjoint, sorted ``taken`` intervals cover."""
    start, end = wanted
    left: list[Interval] = []
    for other_start, other_end in taken:
        if other_end <= start or other_start >= end:
            continue
        if other_start > start:
            left.append((start, other_start))
        start = max(start, other_end)
    if start < end:
        left.append((start, end))
    return left


def total_usd(bills: Iterable[Bill]) -> float | None:
    """Sum of dollars; None as soon as one attempt's price is unknown."""
    total = 0.0
    for item in bills:
        if item.usd is None:
            return None
        total += item.usd
    return total


def file_seconds(
    bill_: Bill,
    spans: Iterable[Span],
    *,
    started_at: float,
    setup_started_at: float | None,
    kept_upto: int | None,
) -> dict[str, float]:
    """Seconds of one attempt's bill by category; they add up to ``bill_.seconds``.

    Steps above ``kept_upto`` were computed again by a later attempt: whatever they were spent on is
    ``lost`` (None: nothing was). Before the process started the time is provision, from
    ``setup_started_at`` on setup. What no span covers is idle.
    """
    filed = dict.fromkeys(CATEGORIES, 0.0)
    for start, end in bill_.intervals:
        before = max(0.0, min(end, started_at) - start)
        split = min(max(setup_started_at or started_at, start), max(start, min(end, started_at)))
        filed["provision"] += min(before, split - start)
        filed["setup"] += max(0.0, before - (split - start))
    for span in spans:
        lost = kept_upto is not None and span.step > kept_upto
        filed["lost" if lost else span.category] += span.seconds
    rest = bill_.seconds - sum(filed.values())
    if rest >= 0:
        filed["idle"] += rest
    else:  # the spans reach past an estimated end, or another attempt owns a part of the interval
        scale = bill_.seconds / sum(filed.values())
        filed = {name: seconds * scale for name, seconds in filed.items()}
    return filed
