"""A ``Report`` out of a root: one pass over the run, and its neighbours for the bill."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from tessera.runs import Run
from tessera.storage import Root
from tessera.tracking.annotations import Annotated, read_annotations
from tessera.tracking.checkpoints import summarise_checkpoints
from tessera.tracking.history import bill_all, bills_of, read_neighbours
from tessera.tracking.invoices import read_invoices
from tessera.tracking.queries import summarise_attempts, summarise_history, usd_by_category
from tessera.tracking.records import Record
from tessera.tracking.report.content import Extras, Happening, Report, Stay
from tessera.tracking.report.curves import DRAWN, TOKENS, curves_of
from tessera.tracking.report.reading import read_run
from tessera.tracking.report.spend import Spending

Worded = Callable[[str, Any, int | None], str]
"""An event's name, details and step in one clause."""


def gather(
    root: Root,
    run: Run,
    extras: Extras | None = None,
    *,
    events: Collection[str] = (),
    worded: Worded = lambda key, details, step: f"{key}: {details}",
    now: float | None = None,
) -> Report:
    """Read ``run``; ``events`` are the journal's events that are told, ``worded`` says how.

    ``now`` (seconds since the epoch) decides what is alive. Raises ``DamagedError`` for a record
    that cannot be read.
    """
    found = read_run(run, (*DRAWN, TOKENS), now=now)
    history = found.history
    others = read_neighbours(run, now=now)
    bills = bill_all([history, *others], read_invoices(root).found)
    own = bills_of(history, bills)
    attempts = summarise_attempts(history, bills)
    record, said = run.record, Annotated.of(read_annotations(root, run.id))
    return Report(
        root_url=without_secrets(root.url),
        summary=summarise_history(history, bills, now=now),
        stays=tuple(
            Stay(attempt, bill.intervals) for attempt, (_, bill) in zip(attempts, own, strict=True)
        ),
        usd_by_category=usd_by_category(attempts),
        curves=curves_of(found.tracks, found.beyond, Spending(own)),
        checkpoints=summarise_checkpoints(history),
        happenings=_happenings(found.events, events, worded),
        experiment=record.experiment,
        commit=record.commit,
        fingerprint=record.fingerprint,
        base=record.base,
        note=said.note,
        tags=said.tags,
        archived=said.archived,
        last_record_at=max((i.ended_at for i in history.attempts), default=record.created_at),
        extras=extras or Extras(),
    )


def _happenings(
    recorded: Sequence[Record], events: Collection[str], worded: Worded
) -> tuple[Happening, ...]:
    """What happened, oldest first, in attempts whose work was lost too."""
    found = [record for record in recorded if record.key in events]
    found.sort(key=lambda record: (record.time, record.attempt, record.seq))
    return tuple(
        Happening(r.time, r.attempt, r.step, worded(r.key, r.value, r.step)) for r in found
    )


def without_secrets(url: str) -> str:
    """The root's address without a name and password in it: the page is made to be sent around."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return parts._replace(netloc=parts.netloc.rsplit("@", 1)[1]).geturl()
