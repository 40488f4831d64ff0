"""``tessera-exp compare``, ``best``, ``frontier``: which of these runs is worth its dollars."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import click

from tessera.cli.common import (
    epilog,
    json_option,
    plain,
    print_json,
    root_option,
    tell_damaged,
)
from tessera.cli.exp_list import document, filter_options, wanted_of
from tessera.cli.run_names import run_argument

if TYPE_CHECKING:
    from tessera.cli._exp_read import Everything
    from tessera.tracking.choose import Listed, Ranked
    from tessera.tracking.curves import Axis
    from tessera.tracking.history import RunHistory
    from tessera.tracking.queries import RunSummary

_RESULTS = (
    "status", "final", "best", "cost", "$/Mtok", "tokens", "wall", "tok/s", "lost", "note",
)  # fmt: skip
_BY = {"loss": "best_loss", "usd-per-mtok": "usd_per_mtok"}


@click.command(
    epilog=epilog(
        "tessera-exp compare smoke-1a2b3c4d smoke-5e6f7a8b",
        "tessera-exp compare base-a base-b --against usd --metric eval/loss",
    )
)
@run_argument(nargs=-1, required=True)
@click.option(
    "--metric", "metrics", multiple=True, metavar="KEY",
    help="Curve to draw; may be repeated. Default: train/loss and eval/loss.",
)  # fmt: skip
@click.option(
    "--against", type=click.Choice(["tokens", "step", "hours", "usd"]), default="tokens",
    show_default=True, help="What the curves are drawn against.",
)  # fmt: skip
@root_option
@json_option
def compare(
    run: tuple[str, ...], metrics: tuple[str, ...], against: str, root: str, as_json: bool
) -> None:
    """What differs between RUNs: config, data, code, results, and their curves.

    Hours and dollars count all that was billed until then, lost work too. Losses of runs on other
    data are not comparable, which is said.
    """
    from tessera.cli._exp_read import read_everything
    from tessera.errors import InputError
    from tessera.runs import find_run
    from tessera.storage import open_root
    from tessera.tracking.curves import differences

    store = open_root(root)
    names = list(dict.fromkeys(find_run(store, name).id for name in run))
    if len(names) < 2:
        raise InputError("Name two different runs or more; `tessera-exp show RUN` is for one.")
    read = read_everything(store)
    rows = {row.summary.run_id: row for row in read.rows}
    histories = {history.run.id: history for history in read.histories.whole}
    for name in names:
        if name not in histories:
            raise read.histories.damaged[name]
    chosen = [histories[name] for name in names]
    found = differences(chosen)
    curves = _curves(read, chosen, metrics or ("train/loss", "eval/loss"), cast("Axis", against))
    if as_json:
        results = [document(rows[name]) for name in names]
        told = [asdict(one) for one in found]
        drawn = {key: {n: {"x": c[0], "y": c[1]} for n, c in by.items()} for key, by in curves}
        print_json(plain({"differences": told, "results": results, "curves": drawn}))
        return
    _show_comparison(names, rows, found)
    _draw(curves, against)


Curves = list[tuple[str, dict[str, tuple[list[float], list[float]]]]]


def _curves(
    read: Everything, histories: list[RunHistory], keys: tuple[str, ...], against: Axis
) -> Curves:
    from tessera.tracking.curves import TOKENS, along, read_curves
    from tessera.tracking.history import bills_of

    found: Curves = [(key, {}) for key in keys]
    for history in histories:
        points = read_curves(history, {*keys, TOKENS})
        own = bills_of(history, read.histories.bills)
        for key, by_run in found:
            by_run[history.run.id] = along(points[key], against, tokens=points[TOKENS], own=own)
    return found


def _show_comparison(names: list[str], rows: dict[str, Listed], found: list[Any]) -> None:
    from tessera.cli._exp_table import COLUMNS
    from tessera.cli._exp_view import new_console, show_table

    console = new_console()
    cells = [[name, *(COLUMNS[name].text(rows[run]) for run in names)] for name in _RESULTS]
    show_table(console, "results", ("", *names), [line for line in cells if _differs(line)])
    for group in dict.fromkeys(one.group for one in found):
        lines = [
            [one.key, *("-" if v is None else v for v in one.values)]
            for one in found
            if one.group == group
        ]
        show_table(console, f"{group} that differs", ("", *names), lines)
    if not found:
        console.print("The same config, data, code and machine.")
    for one in found:
        if one.key == "commit" and len(names) == 2 and all(one.values):
            console.print(f"The code between them: git diff {' '.join(one.values)}")
    if any(one.key == "fingerprint" for one in found):
        console.print("Their data differ: losses on different text are not comparable.")


def _differs(line: list[str]) -> bool:
    return len(set(line[1:])) > 1


def _draw(curves: Curves, against: str) -> None:
    from tessera.cli._exp_chart import chart
    from tessera.cli._exp_view import new_console

    width = new_console().width
    for key, by_run in curves:
        text = chart(by_run, title=key, x=against, width=width)
        click.echo(text or f"None of them has {key}.")


@click.command(
    epilog=epilog(
        "tessera-exp best --by loss --kind sft",
        "tessera-exp best --by usd-to-loss --loss 3.3",
        "tessera-exp best --by usd-per-mtok --since 7d --json",
    )
)
@click.option(
    "--by", type=click.Choice(["loss", "usd-to-loss", "usd-per-mtok"]), default="loss",
    show_default=True, help="Lowest loss, fewest dollars to a loss, cheapest tokens.",
)  # fmt: skip
@click.option(
    "--loss", "target", type=float, metavar="NATS",
    help="For usd-to-loss; else the lowest that all of them reached.",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(1), default=5, show_default=True, metavar="N",
    help="The first N of each group.",
)  # fmt: skip
@filter_options
@root_option
@json_option
def best(
    by: str, target: float | None, limit: int, root: str, as_json: bool, **filters: Any
) -> int:
    """The best runs by one figure, best first; runs on other data or of another kind apart.

    usd-to-loss is what had been spent, lost work included, when an evaluation first reached it.
    """
    from tessera.cli._exp_read import read_everything
    from tessera.errors import InputError
    from tessera.storage import open_root
    from tessera.tracking.choose import peers

    if target is not None and by != "usd-to-loss":
        raise InputError("--loss belongs to --by usd-to-loss; give both or neither.")
    read = read_everything(open_root(root), fresh=filters.pop("fresh"))
    wanted = wanted_of(**filters)
    rows = {row.summary.run_id: row for row in read.rows if wanted.takes(row)}
    groups = peers(row.summary for row in rows.values())
    ranked = {key: _ranked(read, group, by, target) for key, group in groups.items()}
    if as_json:
        print_json([
            {**document(rows[one.summary.run_id]), "rank": place, "by": by,
             "figure": plain(one.figure), "loss_reached": plain(loss)}
            for found, loss in ranked.values()
            for place, one in enumerate(found[:limit], 1)
        ])  # fmt: skip
    else:
        _show_ranked(rows, ranked, by, limit)
    return tell_damaged(read.damaged)


def _ranked(
    read: Everything, group: list[RunSummary], by: str, target: float | None
) -> tuple[list[Ranked], float | None]:
    from tessera.tracking.choose import rank, reached_by_all, usd_to_loss

    if by in _BY:
        return rank(group, lambda row: cast("float | None", getattr(row, _BY[by]))), None
    loss = reached_by_all(group) if target is None else target
    histories = {history.run.id: history for history in read.histories.whole}
    bills = read.histories.bills

    def figure(row: RunSummary) -> float | None:
        return None if loss is None else usd_to_loss(histories[row.run_id], bills, loss)

    return rank(group, figure), loss


def _show_ranked(
    rows: dict[str, Listed],
    ranked: dict[tuple[str, str], tuple[list[Ranked], float | None]],
    by: str,
    limit: int,
) -> None:
    from tessera.cli._exp_figures import dollars, loss
    from tessera.cli._exp_table import COLUMNS
    from tessera.cli._exp_view import new_console, show_table

    console = new_console()
    if not ranked:
        click.echo("No run to choose from.")
    for (kind, fingerprint), (found, reached) in ranked.items():
        lines = []
        for place, one in enumerate(found[:limit], 1):
            row = rows[one.summary.run_id]
            figure = dollars(one.figure, one.summary.cost_estimated)
            if one.figure is None:
                figure = "-"
            elif by == "loss":
                figure = loss(one.figure)
            others = (COLUMNS[name].text(row) for name in ("best", "cost", "tokens", "status"))
            lines.append([str(place), COLUMNS["run"].text(row), figure, *others])
        to = by if reached is None else f"dollars to {reached:.4f}"
        title = f"{kind} on data {fingerprint[:12]}, best {to} first"
        show_table(console, title, ("", "run", to, "best", "cost", "tokens", "status"), lines)


@click.command(
    epilog=epilog("tessera-exp frontier", "tessera-exp frontier --kind pretrain --since 2w --json")
)
@filter_options
@root_option
@json_option
def frontier(root: str, as_json: bool, **filters: Any) -> int:
    """The runs that no other beats in both dollars and loss, cheapest first.

    Each group is of one kind on the same data, since only those losses can be compared.
    """
    from tessera.cli._exp_read import read_everything
    from tessera.storage import open_root
    from tessera.tracking.choose import frontier as front
    from tessera.tracking.choose import peers

    read = read_everything(open_root(root), fresh=filters.pop("fresh"))
    wanted = wanted_of(**filters)
    rows = {row.summary.run_id: row for row in read.rows if wanted.takes(row)}
    groups = peers(row.summary for row in rows.values())
    found = {key: front(group) for key, group in groups.items()}
    if as_json:
        print_json([document(rows[row.run_id]) for group in found.values() for row in group])
    else:
        _show_frontier(rows, groups, found)
    return tell_damaged(read.damaged)


def _show_frontier(
    rows: dict[str, Listed],
    groups: dict[tuple[str, str], list[RunSummary]],
    found: dict[tuple[str, str], list[RunSummary]],
) -> None:
    from tessera.cli._exp_chart import chart
    from tessera.cli._exp_figures import plural
    from tessera.cli._exp_table import COLUMNS
    from tessera.cli._exp_view import new_console, show_table

    console = new_console()
    shown = {key: group for key, group in found.items() if group}
    if not shown:
        click.echo("No run with both a cost and a loss.")
    names = ("run", "cost", "best", "$/Mtok", "tokens", "status")
    for (kind, fingerprint), group in shown.items():
        of = plural(len(groups[kind, fingerprint]), "run")
        lines = [[COLUMNS[name].text(rows[row.run_id]) for name in names] for row in group]
        title = f"{kind} on data {fingerprint[:12]}: {len(group)} of {of}"
        show_table(console, title, names, lines)
        if len(group) > 1:
            xs = [row.cost_usd or 0.0 for row in group]
            ys = [row.best_loss or 0.0 for row in group]
            text = chart({"frontier": (xs, ys)}, title="loss", x="dollars", width=console.width)
            click.echo(text)


COMMANDS = (compare, best, frontier)
