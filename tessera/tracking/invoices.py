"""Reading the invoices of a root, and giving each attempt its part of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter, ValidationError

from tessera.errors import DamagedError
from tessera.ledger.invoices import FOLDER, Invoice, share_out
from tessera.ledger.meter import Bill
from tessera.ledger.traffic import plus_traffic
from tessera.runs import what_is_wrong
from tessera.storage import Root

_INVOICE = TypeAdapter(Invoice)


@dataclass(frozen=True)
class Invoices:
    """Invoices by provider and instance, and what is wrong with those that cannot be read."""

    found: Mapping[tuple[str, str], Invoice] = field(default_factory=dict)
    damaged: Mapping[str, DamagedError] = field(default_factory=dict)


def read_invoices(root: Root) -> Invoices:
    """All of a root; empty where nothing was ever reconciled."""
    return parse_invoices(root, {path: root.read_bytes(path) for path in root.files(FOLDER)})


def parse_invoices(root: Root, contents: Mapping[str, bytes]) -> Invoices:
    """Invoices from their bytes, by path in the root."""
    found: dict[tuple[str, str], Invoice] = {}
    damaged: dict[str, DamagedError] = {}
    for path, data in contents.items():
        try:
            invoice = _INVOICE.validate_python(json.loads(data))
            found[invoice.provider, invoice.instance] = invoice
        except ValueError as error:  # a ValidationError is one too
            why = what_is_wrong(error) if isinstance(error, ValidationError) else "it is no JSON"
            damaged[path] = DamagedError(
                f"{path} in {root.url} is not an invoice that this version of tessera writes "
                f"({why}); remove it and run `tessera-exp reconcile` again."
            )
    return Invoices(found, damaged)


@dataclass(frozen=True)
class Stay:
    """An attempt on an instance, by the ledger: its bill and its traffic's dollars."""

    provider: str
    instance: str
    bill: Bill
    traffic_usd: float


def with_invoices(
    stays: Mapping[str, Stay], invoices: Mapping[tuple[str, str], Invoice]
) -> dict[str, Bill]:
    """The bills, by the keys of ``stays``, with the part of an invoice that each has.

    Only invoices that count: whole, and not a price list's.
    """
    by_instance: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, stay in stays.items():
        by_instance[stay.provider, stay.instance].append(name)
    bills = {name: stay.bill for name, stay in stays.items()}
    for place, names in by_instance.items():
        invoice = invoices.get(place)
        if invoice is None or not invoice.counts:
            continue
        for name, usd in share_out(invoice.usd, _parts(stays, names)).items():
            bills[name] = replace(bills[name], billed_usd=usd)
    return bills


def _parts(
    stays: Mapping[str, Stay], names: Iterable[str]
) -> dict[str, tuple[float | None, float]]:
    return {
        name: (
            plus_traffic(stays[name].bill.usd, stays[name].traffic_usd),
            stays[name].bill.seconds,
        )
        for name in names
    }
