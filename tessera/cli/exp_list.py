"""``tessera-exp list``: one row a run."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from tessera.cli.common import (
    Seconds,
    epilog,
    json_option,
    place_named,
    plain,
    print_json,
    root_option,
    tell_damaged,
)

if TYPE_CHECKING:
    from tessera.cli._exp_read import Everything
    from tessera.storage import Root
    from tessera.tracking.choose import Listed, Wanted

SORT_KEYS = (
    "created_at", "run_id", "status", "tokens", "final_loss", "best_loss", "cost_usd",
    "usd_per_mtok", "wall_s", "tokens_per_s",
)  # fmt: skip
_SHORT = {"created": "created_at", "name": "run_id", "loss": "best_loss", "cost": "cost_usd"}
STATUSES = ("finished", "budget", "running", "died", "failed", "diverged", "preempted")
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


@dataclass(frozen=True)
class Shape:
    """In which form, and how much of it; ``columns`` None: the usual ones."""

    sort: str
    reverse: bool
    limit: int | None
    tree: bool
    columns: tuple[str, ...] | None
    form: str


def filter_options(function: Any) -> Any:
    """The options by which runs are chosen."""
    options = [
        click.option("--kind", type=click.Choice(["pretrain", "sft"]), help="Only this kind."),
        click.option(
            "--status", "statuses", multiple=True, type=click.Choice(STATUSES),
            help="Only this status; may be repeated.",
        ),
        click.option("--run", "name", metavar="ID", help="Ids that begin so, or match ID with *."),
        click.option("--base", metavar="RUN", help="Only fine-tunings of that base."),
        click.option(
            "--tag", "tags", multiple=True, metavar="KEY[=VALUE]",
            help="Only runs with that tag; may be repeated.",
        ),
        click.option("--max-cost", type=float, metavar="USD", help="Cost at most so much."),
        click.option("--under-loss", type=float, metavar="NATS", help="Best loss below that."),
        click.option("--since", metavar="AGO", help="Created since then: 90m, 36h, 7d, 2w."),
        click.option("--archived", is_flag=True, help="Archived runs too."),
        click.option("--fresh", is_flag=True, help="Read everything again, nothing from memory."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    "list",
    epilog=epilog(
        "tessera-exp list --sort cost",
        "tessera-exp list --kind sft --max-cost 50 --under-loss 3.3 --tree",
        "tessera-exp list --columns run,cost,best,eval/bits_per_byte,note --md",
        "tessera-exp list --watch",
        "tessera-exp list --json | jq '.[].cost_usd'",
    ),
)
@root_option
@click.option(
    "--sort", "sort_key", type=click.Choice([*SORT_KEYS, *_SHORT]), default="created_at",
    show_default=True, help="Smallest first; unknown last.",
)  # fmt: skip
@click.option("--reverse", is_flag=True, help="Greatest first; unknown last.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N rows.")
@filter_options
@click.option("--tree", is_flag=True, help="Fine-tunings under their bases.")
@click.option(
    "--columns", metavar="NAMES",
    help="Comma-separated; a metric's key such as eval/loss is one too. Wrong names list all.",
)  # fmt: skip
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: dollars, nats, seconds.")
@click.option("--md", "as_md", is_flag=True, help="Print a Markdown table.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, on a terminal.")
@click.option(
    "--every", type=Seconds(1.0), default=10.0, show_default=True, metavar="S",
    help="Seconds between two looks of --watch.",
)  # fmt: skip
def list_(
    root: str, sort_key: str, reverse: bool, limit: int | None, tree: bool, columns: str | None,
    as_json: bool, as_csv: bool, as_md: bool, watch: bool, every: float, **filters: Any,
) -> int:  # fmt: skip
    """One row a run: losses, dollars, time; a star marks what carries an alias.

    Losses are nats a token of the surviving lineage; "~" marks dollars that rest on an estimate.
    Damaged runs are left out and named on stderr (exit 2). What is over is not read again; a
    memory of it is kept in the cache folder and can be deleted at any time.
    """
    from tessera.cli._exp_read import read_everything
    from tessera.errors import InputError
    from tessera.storage import open_root

    forms = [name for name, on in (("json", as_json), ("csv", as_csv), ("md", as_md)) if on]
    if len(forms) > 1 or (forms and watch):
        raise InputError("Give one of --json, --csv, --md and --watch.")
    fresh = filters.pop("fresh")
    wanted = wanted_of(**filters)
    named = tuple(name.strip() for name in columns.split(",")) if columns is not None else None
    shape = Shape(sort_key, reverse, limit, tree, named, forms[0] if forms else "table")
    store = open_root(root)
    if watch:
        return _watch(store, wanted, shape, every)
    found = read_everything(store, fresh=fresh)
    _show(store, found, wanted, shape)
    return tell_damaged(found.damaged)


def wanted_of(
    *, kind: str | None, statuses: tuple[str, ...], name: str | None, base: str | None,
    tags: tuple[str, ...], max_cost: float | None, under_loss: float | None, since: str | None,
    archived: bool,
) -> Wanted:  # fmt: skip
    """The filter that the options ask for."""
    from tessera.tracking.choose import Wanted

    pairs: dict[str, str | None] = {}
    for tag in tags:
        key, equals, value = tag.partition("=")
        pairs[key] = value if equals else None
    after = None if since is None else time.time() - _ago(since)
    return Wanted(kind, statuses, name, base, pairs, max_cost, under_loss, after, archived)


def _ago(text: str) -> float:
    from tessera.errors import InputError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())
    if match is None:
        raise InputError(
            f"--since {text!r} should be a number and m, h, d or w (minutes, hours, days, weeks), "
            "such as 36h."
        )
    return float(match[1]) * _UNITS[match[2]]


def _chosen(rows: tuple[Listed, ...], wanted: Wanted, shape: Shape) -> list[Listed]:
    key = _SHORT.get(shape.sort, shape.sort)
    found = [row for row in rows if wanted.takes(row)]
    known = [row for row in found if not _is_unknown(getattr(row.summary, key))]
    unknown = [row for row in found if _is_unknown(getattr(row.summary, key))]
    known.sort(key=lambda row: getattr(row.summary, key), reverse=shape.reverse)
    return [*known, *unknown][: shape.limit]


def _is_unknown(value: Any) -> bool:
    return value is None or value != value  # NaN differs from itself


def _show(store: Root, found: Everything, wanted: Wanted, shape: Shape) -> None:
    from tessera.cli import _exp_table as tables

    rows = _chosen(found.rows, wanted, shape)
    if shape.form == "json":
        print_json([document(row) for row in rows])
        return
    columns = tables.columns_for(shape.columns, rows)
    if shape.form == "csv":
        click.echo(tables.as_csv(rows, columns))
    elif not rows:
        if not found.damaged or found.rows:
            click.echo(_nothing(store, found, wanted))
    elif shape.form == "md":
        click.echo(tables.as_markdown(_placed(rows, shape), columns))
    else:
        from tessera.cli._exp_view import new_console

        _print_table(new_console(), found, rows, shape)
        _tell_rest(store, found, rows, wanted)


def _placed(rows: list[Listed], shape: Shape) -> list[tuple[int, Listed]]:
    from tessera.cli._exp_table import as_tree

    return as_tree(rows) if shape.tree else [(0, row) for row in rows]


def _print_table(console: Any, found: Everything, rows: list[Listed], shape: Shape) -> None:
    from tessera.cli import _exp_table as tables

    columns = tables.columns_for(shape.columns, rows)
    chosen = shape.columns is not None
    table, hidden = tables.table_for(console.width, _placed(rows, shape), columns, chosen=chosen)
    console.print(table)
    if hidden:
        console.print(tables.left_out(hidden))


def _tell_rest(store: Root, found: Everything, rows: list[Listed], wanted: Wanted) -> None:
    """What the table does not hold: runs that were left out, what happened, refused machines."""
    from tessera.cli._exp_figures import dollars, plural
    from tessera.cli._exp_table import how_many

    hidden = 0 if wanted.archived else sum(row.annotated.archived for row in found.rows)
    if text := how_many(len(rows), len(found.rows), hidden):
        click.echo(f"{text}.")
    if line := _alerts_line(found):
        click.echo(line)
    if not wanted.is_any or not found.refusals:
        return
    from tessera.cli._refused import refused_machines

    refused = refused_machines(store, found.histories, found.refusals)
    if refused is not None:
        unpriced = f", {refused.unknown} without a price" if refused.unknown else ""
        click.echo(
            f"Not in these: {plural(refused.machines, 'refused machine')}, "
            f"{dollars(refused.usd, refused.estimated)}{unpriced}."
        )


def _alerts_line(found: Everything) -> str | None:
    """What happened in the last day, recorded by somebody or not yet."""
    from tessera.cli._exp_alerts_view import DAY_S, last_alerts_line
    from tessera.tracking.alerts import alerts_of

    now = time.time()
    alerts = list(found.alerts)
    rows = {row.summary.run_id: row.summary for row in found.rows}
    for history in found.histories.whole:
        if any(now - item.ended_at <= DAY_S for item in history.attempts):
            alerts += alerts_of(history, rows[history.run.id], now)
    return last_alerts_line(alerts, now)


def _nothing(store: Root, found: Everything, wanted: Wanted) -> str:
    from tessera.cloud.credentials import root_written

    if found.rows:
        hidden = sum(row.annotated.archived for row in found.rows)
        also = f" ({hidden:,} archived: --archived)" if hidden and not wanted.archived else ""
        what = "" if wanted.is_any else " is like that"
        of = f"None of the {len(found.rows):,} runs in {store.url}"
        return f"{of}{what or ' is to be shown'}{also}."
    if store.is_absent():
        where = f"{place_named(store)}; correct --root or TESSERA_ROOT, or"
    else:
        where = f"{store.url}{root_written(store.url)} yet;"
    return f"No runs in {where} start one with `tessera train`."


def document(row: Listed) -> dict[str, Any]:
    """A run as ``--json`` prints it."""
    said = {
        "aliases": dict(row.aliases),
        "note": row.annotated.note,
        "tags": dict(row.annotated.tags),
        "archived": row.annotated.archived,
    }
    found: dict[str, Any] = plain(asdict(row.summary) | said)
    return found


def _watch(store: Root, wanted: Wanted, shape: Shape, every: float) -> int:
    """The table again and again in place, until Ctrl-C."""
    import sys

    from rich.live import Live

    from tessera.cli import _exp_table as tables
    from tessera.cli._exp_read import read_everything
    from tessera.cli._exp_view import new_console
    from tessera.errors import InputError, TesseraError

    if not sys.stdout.isatty():
        raise InputError("--watch needs a terminal; without one, ask again with `list --json`.")
    console = new_console()
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            at = time.strftime("%H:%M:%S")
            try:
                found = read_everything(store)
                rows = _chosen(found.rows, wanted, shape)
                columns = tables.columns_for(shape.columns, rows)
                placed = _placed(rows[: max(1, console.height - 5)], shape)
                table, _ = tables.table_for(
                    console.width, placed, columns, chosen=shape.columns is not None
                )
                table.caption = f"{len(rows)} runs at {at}, every {every:g} s; Ctrl-C ends"
                live.update(table, refresh=True)
            except TesseraError as error:  # the table before stays, and the next look may do
                console.print(f"{at}: {error}")
            time.sleep(every)
