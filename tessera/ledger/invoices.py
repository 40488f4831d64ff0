"""What a provider billed for an instance, and whose dollars those are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

BILLED, CATALOG = "billed", "catalog"
GPU, STORAGE, TRAFFIC, OTHER = "gpu", "storage", "traffic", "other"
FOLDER = "bills"


@dataclass(frozen=True)
class Invoice:
    """One instance's dollars, as its provider tells them; ``bills/<provider>/<instance>.json``.

    ``source`` is ``billed``, or ``catalog`` for a price list times hours, which is no bill. A
    ``partial`` one goes on growing. ``by_category`` adds up to ``usd``; ``lines`` are what the
    provider answered, unchanged. Times in seconds since the epoch.
    """

    provider: str
    instance: str
    label: str
    usd: float
    by_category: dict[str, float]
    started_at: float | None
    ended_at: float | None
    fetched_at: float
    source: str
    partial: bool
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def counts(self) -> bool:
        """Whether it takes the place of the ledger's estimate."""
        return self.source == BILLED and not self.partial

    @property
    def path(self) -> str:
        """Where it lies in the root."""
        return invoice_path(self.provider, self.instance)


def invoice_path(provider: str, instance: str) -> str:
    """The record of an instance's invoice; names may hold anything, a file name may not."""
    return f"{FOLDER}/{quote(provider, safe='')}/{quote(instance, safe='')}.json"


def share_out(usd: float, parts: Mapping[str, tuple[float | None, float]]) -> dict[str, float]:
    """``usd`` over ``parts`` (dollars by the ledger, billed seconds), by name; they add up to it.

    In proportion to the ledger's dollars; where one of those is not known or all are zero, to the
    seconds; where those are zero too, in equal parts.
    """
    dollars = [known for known, _ in parts.values() if known is not None]
    if len(dollars) == len(parts) and sum(dollars) > 0:
        weights = {name: known or 0.0 for name, (known, _) in parts.items()}
    elif sum(seconds for _, seconds in parts.values()) > 0:
        weights = {name: seconds for name, (_, seconds) in parts.items()}
    else:
        weights = dict.fromkeys(parts, 1.0)
    whole = sum(weights.values())
    return {name: usd * (weight / whole) for name, weight in weights.items()}
