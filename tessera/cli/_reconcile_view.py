"""What ``tessera-exp reconcile`` shows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from tessera.cli._exp_figures import dollars, plural
from tessera.cli._exp_view import new_console, show_table
from tessera.cli._reconcile import Line, Reconciled
from tessera.ledger.invoices import CATALOG


def as_document(found: Reconciled, *, recorded: bool) -> dict[str, Any]:
    """The JSON form: every invoice beside the ledger's figure, and the idle machines."""
    return {
        "invoices": [
            asdict(line.invoice)
            | {
                "attempts": list(line.attempts),
                "ledger_usd": line.ledger_usd,
                "recorded": recorded or not line.fresh,
            }
            for line in found.lines
        ],
        "unbilled": list(found.unbilled),
        "idle": [asdict(machine) for machine in found.idle],
        "idle_usd_per_hour": _idle_usd_per_hour(found) if found.idle_known else None,
        "errors": [str(error) for error in found.errors],
    }


def show(found: Reconciled) -> None:
    """The invoices and the idle machines, as tables on stdout."""
    console = new_console()
    show_table(
        console,
        "what was billed",
        ("instance", "runs", "ledger", "billed", "difference", "of it", "state"),
        [_cells(line) for line in found.lines],
    )
    if not found.lines and not found.errors:
        click.echo("No provider tells a bill for a run of this root.")
    if found.note:
        click.echo(found.note)
    for name in found.unbilled:
        click.echo(f"{name}: no charge is told yet; ask again in some hours.")
    show_table(
        console,
        "billing although no run uses them",
        ("machine", "label", "GPU", "status", "$/hour", "why", "stop it with"),
        [
            [
                f"{one.provider}/{one.instance}", one.label or "-", one.gpu or "-", one.status,
                "?" if one.usd_per_hour is None else f"{one.usd_per_hour:.3f}", one.why, one.stop,
            ]
            for one in found.idle
        ],
    )  # fmt: skip
    if found.idle:
        click.echo(
            f"{plural(len(found.idle), 'machine')} for nobody: "
            f"{dollars(_idle_usd_per_hour(found), False)} an hour."
        )


def _idle_usd_per_hour(found: Reconciled) -> float:
    return sum(one.usd_per_hour or 0.0 for one in found.idle)


def _cells(line: Line) -> list[str]:
    invoice = line.invoice
    runs = dict.fromkeys(name.split("/")[0] for name in line.attempts)
    kinds = [f"{name} {dollars(usd, False)}" for name, usd in invoice.by_category.items() if usd]
    return [
        f"{invoice.provider}/{invoice.instance}",
        ", ".join(runs),
        dollars(line.ledger_usd, True),
        dollars(invoice.usd, not invoice.counts),
        _difference(line),
        ", ".join(kinds) if len(kinds) > 1 else "-",
        _state(line),
    ]


def _difference(line: Line) -> str:
    if line.ledger_usd is None or line.ledger_usd <= 0 or not line.invoice.counts:
        return "-"
    return f"{100 * (line.invoice.usd / line.ledger_usd - 1):+.1f} %"


def _state(line: Line) -> str:
    if line.invoice.source == CATALOG:
        return "catalog, not a bill"
    if line.invoice.partial:
        return "partial: goes on"
    return "new" if line.fresh else "recorded"
