"""``tessera-exp reconcile``: the ledger's runs on one side, what providers say on the other."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from tessera.cli._refused import estimate, lodger_of
from tessera.cloud.launch import may_bill
from tessera.cloud.offers import VAST
from tessera.cloud.reconcile import Findings, IdleMachine, Lodger, ask_vast, worth_recording
from tessera.cloud.refusals import Refusal, scan_refusals
from tessera.cloud.sky_records import NOT_ASKED, catalog_invoices, sky_records
from tessera.cloud.vast import VastClient, find_key
from tessera.errors import InputError, RetryElsewhereError, TesseraError
from tessera.ledger.invoices import Invoice
from tessera.ledger.meter import Bill
from tessera.ledger.traffic import plus_traffic
from tessera.storage import Root
from tessera.tracking.history import AttemptHistory, Histories, bill_all, bills_of, read_histories

Place = tuple[str, str]
"""Provider and instance."""


@dataclass(frozen=True)
class Line:
    """One instance: what was billed, beside what the ledger had; ``fresh``: not recorded yet."""

    invoice: Invoice
    attempts: tuple[str, ...]
    ledger_usd: float | None
    fresh: bool


@dataclass(frozen=True)
class Reconciled:
    """Everything that was found; ``errors`` are those of providers that gave no answer.

    ``idle_known``: vast.ai said what bills there now. ``note``: why it was not asked, where that
    hides nothing that this root knows of.
    """

    lines: tuple[Line, ...]
    unbilled: tuple[str, ...]
    idle: tuple[IdleMachine, ...]
    damaged: tuple[str, ...]
    errors: tuple[TesseraError, ...]
    idle_known: bool = True
    note: str = ""


@dataclass
class _Ledger:
    """The attempts on each instance, or the refusal of it, and their dollars."""

    lodgers: list[Lodger] = field(default_factory=list)
    usd: dict[Place, float | None] = field(default_factory=dict)
    attempts: defaultdict[Place, list[str]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, read: Histories, refusals: Sequence[Refusal]) -> _Ledger:
        found = cls()
        histories = [*read.whole, *read.billable]
        bills = bill_all(histories)  # without what was billed before
        for history in histories:
            for item, own in bills_of(history, bills):
                found.add(history.run.id, item, own)
        for refusal in refusals:
            place, lodger = (refusal.provider, refusal.instance), lodger_of(refusal)
            found.lodgers.append(lodger)
            if not found.attempts[place]:  # else its dollars are a run's
                found.usd[place] = estimate(refusal)
                found.attempts[place].append(lodger.name)
        return found

    def add(self, run_id: str, item: AttemptHistory, own: Bill) -> None:
        """One more attempt."""
        attempt = item.attempt
        place, name = (attempt.provider, attempt.instance), f"{run_id}/{attempt.id}"
        began = min(attempt.billed_from, attempt.started_at)
        self.lodgers.append(Lodger(name, *place, began, item.ended_at, item.alive))
        self.attempts[place].append(name)
        usd = plus_traffic(own.usd, item.traffic_usd)
        before = self.usd.get(place, 0.0)
        self.usd[place] = None if usd is None or before is None else before + usd


def reconcile(root: Root, provider: str | None = None, *, now: float | None = None) -> Reconciled:
    """Ask the providers of the root's runs (or the one of them) what they billed.

    Nothing is written; see ``record``. vast.ai is asked whenever there is a key, since machines may
    bill that no run knows of. Without one that is an error where this root's runs or launches were
    there, or where it was asked for by name, and else a note.
    """
    now = time.time() if now is None else now
    read = read_histories(root)
    ledger = _Ledger.of(read, scan_refusals(root))
    found: list[Findings] = []
    errors: list[TesseraError] = []

    known = {lodger.provider for lodger in ledger.lodgers} - NOT_ASKED | {"vast"}
    if provider is not None and provider not in known:
        raise InputError(_no_bill_of(provider, sorted(known), read))

    def chosen(name: str) -> bool:
        return provider in (None, name)

    idle_known, note = False, ""
    if chosen("vast") and find_key():
        try:
            with VastClient() as client:
                found.append(ask_vast(client, ledger.lodgers, now))
                idle_known = True
        except TesseraError as error:
            errors.append(error)
    elif chosen("vast"):
        on_vast = any(lodger.provider == "vast" for lodger in ledger.lodgers)
        why = _why_vast_matters(root, on_vast, asked=provider == "vast")
        note = _NO_KEY.format(f", {why}" if why else "")
        if why:
            errors.append(RetryElsewhereError(note))
    others = [one for one in ledger.lodgers if chosen(one.provider)]
    others = [one for one in others if one.provider not in NOT_ASKED]
    if others:
        try:
            invoices = catalog_invoices(sky_records(others, now), others, now)
            found.append(Findings(tuple(invoices), (), ()))
        except TesseraError as error:
            errors.append(error)
    return Reconciled(
        lines=tuple(_line(i, ledger, read.invoices) for each in found for i in each.invoices),
        unbilled=tuple(name for each in found for name in each.unbilled),
        idle=tuple(machine for each in found for machine in each.idle),
        damaged=tuple(str(error) for error in read.damaged.values()),
        errors=tuple(errors),
        idle_known=idle_known,
        note="" if errors else note,
    )


_NO_KEY = (
    "vast.ai was not asked, since there is no key here{}: what bills there is not known; "
    "`vastai set api-key KEY`, or VAST_API_KEY."
)


def _why_vast_matters(root: Root, on_vast: bool, *, asked: bool) -> str:
    """Why a root cannot be called clear while vast.ai is silent; empty if nothing speaks for it."""
    if on_vast:
        return "and runs of this root were there"
    if launches := may_bill(root, VAST):
        named = ", ".join(launches[:3]) + (", ..." if len(launches) > 3 else "")
        return f"and what was launched there may bill ({named})"
    return "and --provider names it" if asked else ""


def _no_bill_of(provider: str, known: Sequence[str], read: Histories) -> str:
    expected = f"leave --provider out, or give {' or '.join(known)}"
    if provider in NOT_ASKED:
        return f"Nobody sends a bill for machines of {provider!r}; {expected}."
    unread = f", as far as they can be read ({'; '.join(map(str, read.damaged.values()))})"
    return (
        f"No run of this root was on {provider!r}{unread if read.damaged else ''}, so there is no "
        f"bill to ask for; {expected}."
    )


def _line(invoice: Invoice, ledger: _Ledger, known: Mapping[Place, Invoice]) -> Line:
    place = (invoice.provider, invoice.instance)
    fresh = worth_recording(invoice, known.get(place))
    return Line(invoice, tuple(ledger.attempts[place]), ledger.usd[place], fresh)


def record(root: Root, lines: Sequence[Line]) -> int:
    """Write the invoices that say something new; how many those were."""
    fresh = [line.invoice for line in lines if line.fresh]
    for invoice in fresh:
        root.publish_json(invoice.path, asdict(invoice))
    return len(fresh)
