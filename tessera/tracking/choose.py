"""Which runs, and which of them is best: filters, the frontier of dollars and loss, rankings.

Losses can be compared only where the same text was evaluated in the same way, so runs are compared
within their ``peers``: one kind, one data fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tessera.ledger.meter import Bill
from tessera.tracking.annotations import NOTHING, Annotated
from tessera.tracking.condense import EVALUATED
from tessera.tracking.history import RunHistory, bills_of
from tessera.tracking.queries import RunSummary
from tessera.tracking.spending import spent_at


@dataclass(frozen=True)
class Listed:
    """A run's figures, what people said of it, and the aliases that its adapters carry."""

    summary: RunSummary
    annotated: Annotated = NOTHING
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """A filter; None and empty mean any. Dollars and nats are upper bounds, ``under_loss`` strict.

    ``name`` is a run id, its beginning, or a pattern with ``*``; ``base`` likewise. ``tags`` maps a
    key to a value (None: any value). ``since`` is in seconds since the epoch, of creation. Runs
    whose figure is not known do not pass a bound.
    """

    kind: str | None = None
    statuses: tuple[str, ...] = ()
    name: str | None = None
    base: str | None = None
    tags: Mapping[str, str | None] = field(default_factory=dict)
    max_cost: float | None = None
    under_loss: float | None = None
    since: float | None = None
    archived: bool = False

    def takes(self, row: Listed) -> bool:
        """Whether the run passes."""
        found, said = row.summary, row.annotated
        return (
            (self.archived or not said.archived)
            and self.kind in (None, found.kind)
            and (not self.statuses or found.status in self.statuses)
            and (self.name is None or _is_named(found.run_id, self.name))
            and (self.base is None or (found.base is not None and _is_named(found.base, self.base)))
            and all(_has(said, key, value) for key, value in self.tags.items())
            and (self.max_cost is None or _at_most(found.cost_usd, self.max_cost))
            and (self.under_loss is None or _below(found.best_loss, self.under_loss))
            and (self.since is None or found.created_at >= self.since)
        )

    @property
    def is_any(self) -> bool:
        """Whether every run that is not archived passes."""
        return self == Wanted(archived=self.archived)


def _is_named(run_id: str, text: str) -> bool:
    return fnmatchcase(run_id, text if "*" in text else f"{text}*")


def _has(said: Annotated, key: str, value: str | None) -> bool:
    return key in said.tags and value in (None, said.tags[key])


def _at_most(figure: float | None, bound: float) -> bool:
    return figure is not None and figure <= bound


def _below(figure: float | None, bound: float) -> bool:
    return figure is not None and figure < bound


def peers(rows: Iterable[RunSummary]) -> dict[tuple[str, str], list[RunSummary]]:
    """Runs whose losses can be compared, by kind and data fingerprint."""
    found: dict[tuple[str, str], list[RunSummary]] = {}
    for row in rows:
        found.setdefault((row.kind, row.fingerprint), []).append(row)
    return found


def frontier(rows: Iterable[RunSummary]) -> list[RunSummary]:
    """The runs that no other beats in both dollars and loss, cheapest first.

    One beats another if it is no worse in either and better in one. Runs whose cost or loss is not
    known, or no number, are left out. Give it ``peers`` only.
    """
    known = [
        (row.cost_usd, row.best_loss, row)
        for row in rows
        if row.cost_usd is not None and row.best_loss is not None and math.isfinite(row.best_loss)
    ]
    return [
        row
        for usd, loss, row in sorted(known, key=lambda each: (each[0], each[1], each[2].run_id))
        if not any(u <= usd and n <= loss and (u, n) != (usd, loss) for u, n, _ in known)
    ]


@dataclass(frozen=True)
class Ranked:
    """A run and the figure it was ranked by; None where it has none (it comes last)."""

    summary: RunSummary
    figure: float | None


def rank(rows: Iterable[RunSummary], figure: Callable[[RunSummary], float | None]) -> list[Ranked]:
    """Smallest figure first; those without one last, by age."""
    found = [Ranked(row, _number(figure(row))) for row in rows]
    return sorted(found, key=lambda each: (each.figure is None, each.figure or 0.0))


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def reached_by_all(rows: Sequence[RunSummary]) -> float | None:
    """The lowest loss that every one of them reached; those without a loss are passed over."""
    found = [row.best_loss for row in rows if _number(row.best_loss) is not None]
    return max((loss for loss in found if loss is not None), default=None)


def usd_to_loss(history: RunHistory, bills: dict[str, Bill], loss: float) -> float | None:
    """US dollars that were spent when an evaluation first gave ``loss`` nats or less.

    The base's own evaluation at step 0 of a fine-tuning does not count. None where it never did, or
    where a price is not known.
    """
    own = bills_of(history, bills)
    is_base = history.run.record.kind == "pretrain"
    for point in sorted(history.points, key=lambda point: point.step):
        counts = point.key == EVALUATED and (is_base or point.step > 0)
        if counts and point.number <= loss:
            return spent_at(own, point.time)
    return None
