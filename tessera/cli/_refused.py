"""Dollars of machines that were refused: nobody's run, and paid for all the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.cloud.reconcile import Lodger
from tessera.cloud.refusals import Refusal, scan_refusals
from tessera.errors import DamagedError
from tessera.runs import scan_runs
from tessera.storage import Root
from tessera.tracking.history import Histories
from tessera.tracking.invoices import read_invoices

Place = tuple[str, str]


@dataclass(frozen=True)
class Refused:
    """Refused machines that no run was on; ``unknown`` of them have no price."""

    machines: int
    usd: float
    estimated: bool
    unknown: int


def lodger_of(refusal: Refusal) -> Lodger:
    """The refusal as a stay on its instance, from its bill's start to the refusal."""
    began = refusal.at if refusal.billed_from is None else min(refusal.billed_from, refusal.at)
    name = f"refused/{refusal.id}"
    return Lodger(name, refusal.provider, refusal.instance, began, refusal.at, alive=False)


def estimate(refusal: Refusal) -> float | None:
    """Dollars up to the refusal; what the machine cost until it was gone is in the bill alone."""
    if refusal.usd_per_hour is None or refusal.billed_from is None:
        return None
    return refusal.usd_per_hour * max(0.0, refusal.at - refusal.billed_from) / 3600


def refused_machines(
    root: Root, read: Histories | None = None, refusals: Sequence[Refusal] | None = None
) -> Refused | None:
    """What refused machines cost, by their invoices where there are; None if there were none.

    Dollars of an instance that a run was on as well are that run's. ``read`` and
    ``refusals`` are what the root was found to hold, if that was looked at already.
    """
    found = scan_refusals(root) if refusals is None else refusals
    latest = {(refusal.provider, refusal.instance): refusal for refusal in found}
    for place in _used(root, read) if latest else ():
        latest.pop(place, None)
    if not latest:
        return None
    invoices = read_invoices(root).found if read is None else read.invoices
    total, guessed, unknown = 0.0, False, 0
    for place, refusal in latest.items():
        invoice = invoices.get(place)
        billed = invoice.usd if invoice is not None and invoice.counts else None
        usd = estimate(refusal) if billed is None else billed
        total += usd or 0.0
        unknown += usd is None
        guessed |= billed is None
    return Refused(len(latest), total, guessed, unknown)


def _used(root: Root, read: Histories | None) -> set[Place]:
    """Every instance that a run was on; damaged runs are named elsewhere."""
    if read is not None:
        histories = [*read.whole, *read.billable]
        return {(i.attempt.provider, i.attempt.instance) for h in histories for i in h.attempts}
    found: set[Place] = set()
    for run in scan_runs(root)[0]:
        try:
            found |= {(attempt.provider, attempt.instance) for attempt in run.attempts()}
        except DamagedError:
            continue
    return found
