"""The table of ``tessera-exp list`` and its kin: which columns, as text, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tessera.cli._exp_figures import count, dollars, duration, loss, plural, short
from tessera.errors import InputError
from tessera.tracking.choose import Listed

# Never out: what it is, what it reached, against what, for how much.
_FIRST_TO_GO = (
    "base", "step", "best", "kind", "$/Mtok", "note", "tok/s", "tokens", "status", "wall",
)  # fmt: skip
_LEFT = frozenset({"run", "kind", "status", "base", "note", "tags", "device", "aliases"})
_NOTE_CELLS = 40
_MARKDOWN_WIDTH = 10_000


@dataclass(frozen=True)
class Column:
    """What stands in a cell, as text for people and as the bare figure for programs."""

    text: Callable[[Listed], str]
    bare: Callable[[Listed], Any]


def _run(row: Listed) -> str:
    stars = "".join(f" ★ {adapter} {alias}" for alias, adapter in sorted(row.aliases.items()))
    return row.summary.run_id + (" (archived)" if row.annotated.archived else "") + stars


def _step(row: Listed) -> str:
    found = row.summary
    step = count(found.step if found.live_step is None else found.live_step)
    step += "" if found.total_steps is None else f"/{count(found.total_steps)}"
    return step if found.live_step is None else f"{step} live"


def reference(row: Listed) -> str:
    """What a loss is to be seen beside: the base's own, or the unigram entropy."""
    found = row.summary
    if found.base_loss is not None:
        return f"base {loss(found.base_loss)}"
    return "-" if found.unigram_entropy is None else f"unigram {loss(found.unigram_entropy)}"


def step(row: Listed) -> str:
    """Such as ``20/100`` or ``23/100 live``."""
    return _step(row)


def _note(row: Listed) -> str:
    first = (row.annotated.note or "").strip().split("\n")[0]
    return first if len(first) <= _NOTE_CELLS else first[: _NOTE_CELLS - 1] + "…"


def _tags(row: Listed) -> str:
    pairs = row.annotated.tags.items()
    return ", ".join(key if value == "" else f"{key}={value}" for key, value in pairs)


def _devices(row: Listed) -> str:
    return ", ".join(row.summary.devices)


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _usd(value: float | None, row: Listed) -> str:
    return dollars(value, row.summary.cost_estimated)


COLUMNS: dict[str, Column] = {
    "run": Column(_run, lambda r: r.summary.run_id),
    "kind": Column(lambda r: r.summary.kind, lambda r: r.summary.kind),
    "status": Column(lambda r: r.summary.status, lambda r: r.summary.status),
    "step": Column(_step, lambda r: r.summary.step),
    "tokens": Column(
        lambda r: "-" if r.summary.tokens is None else short(r.summary.tokens),
        lambda r: r.summary.tokens,
    ),
    "final": Column(lambda r: loss(r.summary.final_loss), lambda r: r.summary.final_loss),
    "best": Column(lambda r: loss(r.summary.best_loss), lambda r: r.summary.best_loss),
    "reference": Column(reference, lambda r: r.summary.base_loss or r.summary.unigram_entropy),
    "cost": Column(lambda r: _usd(r.summary.cost_usd, r), lambda r: r.summary.cost_usd),
    "$/Mtok": Column(lambda r: _usd(r.summary.usd_per_mtok, r), lambda r: r.summary.usd_per_mtok),
    "wall": Column(lambda r: duration(r.summary.wall_s), lambda r: r.summary.wall_s),
    "tok/s": Column(
        lambda r: "-" if r.summary.tokens_per_s is None else f"{r.summary.tokens_per_s:,.0f}",
        lambda r: r.summary.tokens_per_s,
    ),
    "base": Column(lambda r: r.summary.base or "-", lambda r: r.summary.base),
    "note": Column(_note, lambda r: r.annotated.note),
    "tags": Column(_tags, _tags),
    "aliases": Column(
        lambda r: ", ".join(sorted(r.aliases)) or "-", lambda r: ", ".join(sorted(r.aliases))
    ),
    "device": Column(_devices, _devices),
    "attempts": Column(lambda r: count(r.summary.attempts), lambda r: r.summary.attempts),
    "created": Column(lambda r: _when(r.summary.created_at), lambda r: r.summary.created_at),
    "base loss": Column(lambda r: loss(r.summary.base_loss), lambda r: r.summary.base_loss),
    "lost": Column(
        lambda r: duration(r.summary.seconds["lost"]), lambda r: r.summary.seconds["lost"]
    ),
}  # fmt: skip
"""By name; a metric's own key, such as ``eval/loss``, names a column too."""
USUAL = tuple(COLUMNS)[: tuple(COLUMNS).index("note")]


def columns_for(names: Sequence[str] | None, rows: Sequence[Listed]) -> dict[str, Column]:
    """The columns of those names; the usual ones, and the notes if there are any, for None.

    Raises ``InputError`` for a name that is neither a column nor a metric of any of the runs.
    """
    if names is None:
        noted = any(row.annotated.note for row in rows)
        return {name: COLUMNS[name] for name in (*USUAL, *(["note"] if noted else []))}
    found: dict[str, Column] = {}
    metrics = {key for row in rows for key in row.summary.metrics}
    for name in names:
        if name not in COLUMNS and rows and name not in metrics:
            raise InputError(
                f"There is no column {name!r}; give some of {', '.join(COLUMNS)}, or a metric's "
                f"key such as {next(iter(sorted(metrics)), 'eval/loss')}."
            )
        found[name] = COLUMNS.get(name) or _metric(name)
    return found


def _metric(key: str) -> Column:
    def bare(row: Listed) -> float | None:
        return row.summary.metrics.get(key)

    return Column(lambda row: "-" if (v := bare(row)) is None else f"{v:.6g}", bare)


def as_tree(rows: Sequence[Listed]) -> list[tuple[int, Listed]]:
    """Fine-tunings under their bases, each with its depth; the order of ``rows`` otherwise."""
    ids = {row.summary.run_id for row in rows}
    below: dict[str | None, list[Listed]] = {}
    for row in rows:
        base = row.summary.base
        below.setdefault(base if base in ids and base != row.summary.run_id else None, []).append(
            row
        )
    found: list[tuple[int, Listed]] = []

    def walk(parent: str | None, depth: int) -> None:
        for row in below.pop(parent, []):
            found.append((depth, row))
            walk(row.summary.run_id, depth + 1)

    walk(None, 0)
    return found


def table_for(
    console_width: int, rows: Sequence[tuple[int, Listed]], columns: Mapping[str, Column], *,
    chosen: bool,
) -> tuple[Table, list[str]]:  # fmt: skip
    """The table, and the columns that were left out for want of width (none if ``chosen``)."""
    cells = [_indented(depth, {n: c.text(row) for n, c in columns.items()}) for depth, row in rows]
    names = list(columns)
    hidden = []
    for name in () if chosen else (n for n in _FIRST_TO_GO if n in names):
        width = sum(max([cell_len(n), *(cell_len(c[n]) for c in cells)]) + 2 for n in names)
        if width <= console_width:
            break
        names.remove(name)
        hidden.append(name)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(
            escape(name),
            justify="left" if name in _LEFT else "right",
            no_wrap=name not in ("run", "note", "tags"),
            overflow="fold" if name in ("run", "note", "tags") else "ellipsis",
        )
    for line in cells:
        table.add_row(*(escape(line[name]) for name in names))
    return table, hidden


def _indented(depth: int, cells: dict[str, str]) -> dict[str, str]:
    if depth and "run" in cells:
        cells["run"] = f"{'   ' * (depth - 1)}└─ {cells['run']}"
    return cells


def as_csv(rows: Iterable[Listed], columns: Mapping[str, Column]) -> str:
    """Bare figures: dollars, nats, seconds; an unknown one is empty. Ends without a newline."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow("" if (v := c.bare(row)) is None else v for c in columns.values())
    return out.getvalue().rstrip("\n")


def as_markdown(rows: Iterable[tuple[int, Listed]], columns: Mapping[str, Column]) -> str:
    """A table for an issue or a README."""
    table = Table(box=MARKDOWN, show_edge=True, pad_edge=True)
    for name in columns:
        table.add_column(escape(name), justify="left" if name in _LEFT else "right", no_wrap=True)
    for depth, row in rows:
        cells = _indented(depth, {n: c.text(row) for n, c in columns.items()})
        table.add_row(*(escape(cells[name].replace("|", "\\|")) for name in columns))
    console = Console(width=_MARKDOWN_WIDTH, color_system=None, highlight=False, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().split("\n"))
    return "\n".join(line for line in lines if line)


def left_out(hidden: Sequence[str]) -> str:
    """The sentence about columns for which there is no room."""
    return f"Left out for want of width: {', '.join(hidden)} (all of it: --json)."


def how_many(shown: int, of: int, archived: int) -> str:
    """The sentence under a table that does not show every run; empty if it does."""
    parts = [] if shown == of - archived else [f"{shown:,} of {plural(of - archived, 'run')}"]
    parts += [f"{archived:,} archived not shown (--archived)"] if archived else []
    return "; ".join(parts)
