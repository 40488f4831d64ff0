"""What ``tessera-exp`` shows: tables on stdout that fit the terminal, progress on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tessera.cli._exp_detail import Detail
from tessera.cli._exp_events import worded
from tessera.cli._exp_figures import count, dollars, duration, loss, plural
from tessera.cli._exp_table import reference, step
from tessera.ledger.dollars import as_typed
from tessera.ledger.invoices import CATALOG
from tessera.ledger.traffic import size
from tessera.tracking.choose import Listed
from tessera.tracking.queries import TRAFFIC, RunSummary

_LOG_WIDTH = 240  # cut to 80 columns in a log, figures would be lost
_EVENTS_SHOWN = 20
STOPPED = "budget/stopped"


def show_detail(detail: Detail) -> None:
    """Everything about one run, in blocks."""
    console, row, rest = new_console(), detail.summary, detail.rest
    console.print(f"[bold]{escape(row.run_id)}[/bold]  {row.kind}, {row.status}")
    if detail.rest["annotations"]["archived"]:
        console.print("  archived: tessera-exp list --archived shows it")
    if note := detail.rest["annotations"]["note"]:
        console.print(f"  [italic]{escape(note)}[/italic]")
    listed = Listed(row)
    _pairs(
        console,
        {
            "step": step(listed),
            "tokens": count(row.tokens),
            "loss": f"final {loss(row.final_loss)}, best {loss(row.best_loss)}, "
            f"{reference(listed)}",
            "cost": _cost(row),
            **_billed(row, rest),
            **_budget(row, rest),
            "checkpoints": _checkpoints(row, rest["checkpoints"]),
            "time": f"{duration(row.wall_s)} in {plural(row.attempts, 'attempt')}",
            "speed": "-" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f} tokens/s",
            "base": row.base or "-",
            "data": f"{rest['fingerprint'][:12]}",
            "commit": rest["commit"] or "-",
            **_tags(rest["annotations"]["tags"]),
        },
    )
    show_table(
        console,
        "attempts",
        ("attempt", "status", "device", "instance", "$/hour", "source", "time", "cost", "from"),
        [_attempt_cells(attempt) for attempt in rest["attempt_list"]],
    )
    show_table(console, "where it went", ("category", "time", "cost"), _spent_cells(detail))
    show_table(
        console,
        "events" if len(rest["events"]) <= _EVENTS_SHOWN else f"last {_EVENTS_SHOWN} events",
        ("attempt", "step", "what happened"),
        [
            [
                event["attempt"],
                count(event["step"]),
                worded(event["event"], event["details"], event["step"]),
            ]
            for event in rest["events"][-_EVENTS_SHOWN:]
        ],
    )
    show_table(
        console,
        "evaluations",
        ("step", "loss"),
        [[count(point["step"]), loss(point["loss"])] for point in rest["losses"][-12:]],
    )
    show_table(
        console,
        "adapters",
        ("adapter", "step", "weights", "alias", "interviews"),
        [_adapter_cells(adapter) for adapter in rest["adapters"]],
    )
    console.print("[bold]settings[/bold]")
    _pairs(console, dict(_flat(rest["experiment"])))


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    found = ", ".join(key if value == "" else f"{key}={value}" for key, value in tags.items())
    return {"tags": found} if found else {}


def _cost(row: RunSummary) -> str:
    text = (
        f"{dollars(row.cost_usd, row.cost_estimated)} "
        f"({dollars(row.usd_per_mtok, row.cost_estimated)} per million tokens)"
    )
    if row.traffic_usd > 0:
        traffic = dollars(row.traffic_usd, row.cost_estimated)
        moved = size(row.traffic_bytes + row.traffic_down_bytes)
        text += f", {traffic} of it for {moved} of traffic"
    return text


def _billed(row: RunSummary, rest: Mapping[str, Any]) -> dict[str, str]:
    """Both figures: the provider's and the ledger's, and what is not settled yet.

    Nothing for a run that never left machines of one's own.
    """
    if all(attempt["provider"] == "local" for attempt in rest["attempt_list"]):
        return {}
    parts = []
    if row.billed_usd is not None:
        parts.append(
            f"{dollars(row.billed_usd, False)} by the provider; the ledger's estimate was "
            f"{dollars(row.ledger_usd, True)}"
        )
    for one in rest["invoices"]:
        if one["source"] == CATALOG:
            told = f"{dollars(one['usd'], True)} by the catalog, which is no bill"
        elif one["partial"]:
            told = f"{dollars(one['usd'], True)} so far"
        else:
            continue
        parts.append(f"{one['provider']}/{one['instance']}: {told}")
    return {"billed": "; ".join(parts) or "not reconciled"}


def _budget(row: RunSummary, rest: Mapping[str, Any]) -> dict[str, str]:
    """The budget of a run that has one: what is kept back of it, and where it ends the run."""
    usd = rest["experiment"].get("budget_usd")
    if usd is None:
        return {}
    plans = [event for event in rest["events"] if event["event"] in ("budget/planned", STOPPED)]
    if not plans:
        return {"budget": f"{as_typed(usd)}, no end planned yet"}
    last, step = plans[-1]["details"], row.total_steps
    done = row.status in ("finished", "budget")
    tokens = step is not None and step == _steps_of_tokens(rest["experiment"])
    whose = "the tokens" if tokens and not any(e["event"] == STOPPED for e in plans) else "it"
    told = f"{as_typed(usd)}, {dollars(last['reserve_usd'], False)} kept back"
    if step is not None:
        told += f"; {whose} {'ended' if done else 'ends'} the run at step {step:,}"
    return {"budget": told}


def _steps_of_tokens(experiment: Mapping[str, Any]) -> int | None:
    tokens = experiment.get("tokens")
    return None if tokens is None else int(tokens // experiment["batch"]["tokens_per_step"])


def _checkpoints(row: RunSummary, saved: Mapping[str, Any]) -> str:
    parts = [f"{saved['published']:,} published"]
    if saved["bytes"]:
        parts.append(size(saved["bytes"]))
    stall = saved["stall_s"]
    parts.append(f"stall {f'{stall:.2f} s' if stall < 10 else duration(stall)}")
    if saved["stall_share"] is not None:
        parts[-1] += f" ({100 * saved['stall_share']:.2f} % of training)"
    if saved["usd"] > 0:
        parts.append(f"{dollars(saved['usd'], row.cost_estimated)} traffic")
    return ", ".join(parts)


def _spent_cells(detail: Detail) -> list[list[str]]:
    row, usd = detail.summary, detail.rest["usd_by_category"] or {}
    cells = [
        [name, duration(seconds), dollars(usd.get(name), row.cost_estimated)]
        for name, seconds in row.seconds.items()
        if seconds > 0
    ]
    if row.traffic_usd > 0:
        traffic = usd.get(TRAFFIC, row.traffic_usd)
        cells.append([TRAFFIC, "-", dollars(traffic, row.cost_estimated)])
    return cells


def _attempt_cells(attempt: dict[str, Any]) -> list[str]:
    price = attempt["usd_per_hour"]
    return [
        attempt["attempt"],
        attempt["status"].replace("_", " ") + (" (end estimated)" if attempt["estimated"] else ""),
        attempt["device"],
        f"{attempt['provider']}/{attempt['instance']}",
        "-" if price is None else f"{price:.3f}" + (" moved" if attempt["price_changes"] else ""),
        attempt["price_source"],
        duration(attempt["ended_at"] - attempt["started_at"]),
        dollars(attempt["usd"], attempt["usd_estimated"]),
        "start" if attempt["resumed_from"] is None else f"step {attempt['resumed_from']:,}",
    ]


def _adapter_cells(adapter: dict[str, Any]) -> list[str]:
    interviews = []
    for held in adapter["interviews"]:
        verdicts = ", ".join(f"{n} {name}" for name, n in held["verdicts"].items() if n)
        other = "" if held["of_these_weights"] else ", of other weights"
        interviews.append(f"{held['suite']}: {held['score']:.2f} ({verdicts}{other})")
    return [
        adapter["name"],
        count(adapter["step"]),
        (adapter["weights_digest"] or "-")[:12],
        ", ".join(adapter["aliases"]) or "-",
        "\n".join(interviews) or "none held",
    ]


def show_table(
    console: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table with a title; nothing where there are no rows."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _pairs(console: Console, pairs: Mapping[str, str]) -> None:
    width = max(map(len, pairs))
    for name, value in pairs.items():
        console.print(f"  {name:<{width}}  {escape(value)}")


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, ""):
            yield f"{prefix}{key}", str(value)


def new_console() -> Console:
    """As wide as the terminal; wide enough for figures where there is none."""
    columns = os.environ.get("COLUMNS", "")
    told = columns.isdigit() and int(columns) > 0  # rich reads it where it is given no width
    return Console(width=None if told or sys.stdout.isatty() else _LOG_WIDTH, highlight=False)
