"""What ``tessera bench`` shows: a bar on stderr, tables and sentences on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

FLOAT8_LOSS = (
    "as it comes it cost 0.015 and 0.021 nats against bf16 at 136M parameters, with the float8: of "
    "experiments/tessera_1b_fp8.yaml 0.004 and 0.012"
)
"""What benchmarks/throughput.md says; two seeds."""
_GIB = 2**30
_LINE_EVERY_S = 5.0


@contextmanager
def progress_view() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with a remaining time on a terminal; elsewhere a plain line, at most one in 5 s."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            print(f"bench: {what}, {done} of {total}", file=sys.stderr, flush=True)

    return show


def print_document(document: dict[str, Any]) -> None:
    """Card, ceilings, ladder, and what to put into the experiment."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    for line in _heading(document):
        console.print(line, markup=False)
    if document["ceilings"]["copy_bytes_per_s"] is not None:
        console.print(_ceilings(document))
    if document["rows"]:
        console.print(_rows(document))
        for line in _formulas(document):
            console.print(line, markup=False)
    if document["interrupted"]:
        console.print("Interrupted; this is what was measured until then.")
    for line in _verdict(document):
        console.print(line, markup=False)


def _heading(document: dict[str, Any]) -> Iterator[str]:
    card, experiment = document["card"], document["experiment"]
    power = f", {card['power_limit_w']:.0f} W limit" if card["power_limit_w"] else ""
    clock = f", {card['clock_mhz']:.0f} MHz" if card["clock_mhz"] else ""
    yield f"{card['name']}, {card['memory_bytes'] / _GIB:.0f} GiB{power}{clock}"
    versions = [f"torch {card['torch']}", f"Python {card['python']}"]
    known = (("CUDA", card["cuda"]), ("driver", card["driver"]), ("Triton", card["triton"]))
    versions += [f"{name} {value}" for name, value in known if value]
    yield ", ".join(versions)
    yield (
        f"{experiment['name']} ({experiment['source']}): {experiment['parameters']:,} parameters, "
        f"{experiment['layers']} x {experiment['d_model']}, {experiment['sequence']} tokens a "
        f"sample, {experiment['tokens_per_step']:,} a step, {experiment['tokens']:,} in all"
    )
    yield f"Data: {document['data']}"


def _ceilings(document: dict[str, Any]) -> Table:
    """Rates alone: FLOP/s of the products of the blocks together, of the head, of attention."""
    found = document["ceilings"]
    table = Table(title="Ceilings, each measured alone", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("what")
    table.add_column("rate", justify="right")
    table.add_row("copy in memory, read + written", f"{found['copy_bytes_per_s'] / 1e9:,.0f} GB/s")
    rates = found["matrix_flops_per_s"]
    if rates is not None:
        dtype = found["products"][0]["dtype"]
        table.add_row(f"{dtype} products of the blocks", _tera(rates["blocks"]))
        table.add_row(f"{dtype} products of the head", _tera(rates["head"]))
    eight = found["float8_flops_per_s"]
    if eight is not None or found["float8_missing"]:
        shown = _tera(eight) if eight is not None else f"({found['float8_missing']})"
        table.add_row("float8 products of the blocks", shown)
    for entry in found["attention"]:
        shown = f"({entry['reason']})"
        if entry["reason"] is None:
            shown = (
                f"{_tera(entry['forward_flops_per_s'])} forward, "
                f"{_tera(entry['backward_flops_per_s'])} backward"
            )
        table.add_row(f"attention {entry['backend']}", shown)
    return table


def _rows(document: dict[str, Any]) -> Table:
    table = Table(
        title="Whole training steps: forward, loss, backward, clip, AdamW, zero",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),  # all columns fit a terminal of 80
        pad_edge=False,
    )
    table.add_column("row", no_wrap=True)
    heads = ("tokens/s", "ms (p10-p90)", "MFU", "GiB", "ceiling", "hours", "dollars")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in document["rows"]:
        if row["step_s"] is None:
            table.add_row(row["name"], *["-"] * len(heads))
            continue
        peak = row["peak_memory_bytes"]
        fraction = row["ceiling_fraction"]
        table.add_row(
            "projected" if row["projected_from_layers"] else row["name"],
            f"{row['tokens_per_s']:,.0f}",
            _step(row["step_s"]),
            f"{row['mfu']:.1%}",
            "-" if peak is None else f"{peak / _GIB:.1f}",
            "-" if fraction is None else f"{fraction:.1%}",
            _hours(row["hours"]),
            _usd(row["usd"]),
        )
    return table


def _step(step: dict[str, Any]) -> str:
    """Milliseconds with three figures or more."""
    digits = 0 if step["median"] >= 0.1 else 1
    text = f"{step['median'] * 1e3:,.{digits}f}"
    if step["p10"] is None:
        return text
    return f"{text} ({step['p10'] * 1e3:,.{digits}f}-{step['p90'] * 1e3:,.{digits}f})"


def _formulas(document: dict[str, Any]) -> Iterator[str]:
    mfu, experiment = document["mfu"], document["experiment"]
    for row in document["rows"]:
        if row["reason"] is not None:
            yield f"{row['name']} was not measured: {row['reason']}."
    yield (
        f"MFU = {mfu['formula']}: {mfu['flops_per_token'] / 1e9:,.3g} GFLOP a token, peak "
        f"{mfu['peak_flops_per_s'] / 1e12:,.4g} TFLOP/s ({mfu['peak_source']}). FLOPs a token = "
        f"{mfu['flops_formula']}."
    )
    yield f"GiB: peak of what torch allocated. Ceiling: {document['floor']['formula']}."
    for row in document["rows"]:
        if row["projected_from_layers"]:
            few, more = row["projected_from_layers"]
            yield (
                f"Projected from {few} and {more} layers to {experiment['layers']}, along a line; "
                "`tessera bench` measures all of them."
            )
    price = document["price"]
    if price["usd_per_hour"] is None:
        yield "Dollars: no price known; give --price or set TESSERA_USD_PER_HOUR."
        return
    guess = ", a guess: give --price" if price["source"] == "experiment" else ""
    yield (
        f"Hours and dollars: {_size(experiment)} at ${price['usd_per_hour']:g}/h "
        f"({price['source']}{guess}), training steps alone."
    )


def _size(experiment: dict[str, Any]) -> str:
    tokens, budget = experiment["tokens"], experiment["budget_usd"]
    parts = [] if tokens is None else [f"{tokens:,} tokens"]
    parts += [] if budget is None else [f"a budget of ${budget:,.2f}"]
    return " or ".join(parts) or "neither tokens nor a budget"


def _verdict(document: dict[str, Any]) -> Iterator[str]:
    if document["best"] is None:
        return
    row = next(row for row in document["rows"] if row["name"] == document["best"])
    settings = ", ".join(
        f"{key}: {'null' if value is None else value}" for key, value in row["settings"].items()
    )
    put = f"; in the experiment: {settings}" if settings else ""
    what = f"Best: {row['name']}" if settings else "The experiment as it is"
    usd = "" if row["usd"] is None else f", {_usd(row['usd'])}"
    hours = "" if row["hours"] is None else f", {_hours(row['hours'])} h"
    yield f"{what}: {row['tokens_per_s']:,.0f} tokens/s{hours}{usd}{put}."
    if "fp8" in (row["settings"].get("precision"), document["experiment"]["precision"]):
        yield _float8_caveat(document["rows"])
    reference = document["reference"]
    if reference is not None:
        yield (
            f"The reference run made {reference['tokens_per_s']:,} tokens/s "
            f"({reference['note']}): {reference['hours']:,.1f} h and ${reference['usd']:,.0f} "
            f"for these tokens; here {row['tokens_per_s'] / reference['tokens_per_s']:.2f}x."
        )


def _float8_caveat(rows: Sequence[dict[str, Any]]) -> str:
    """What float8 costs beside dollars, and what is fastest without it."""
    plain = [
        row
        for row in rows
        if row["tokens_per_s"] and row["name"] != "experiment" and "fp8" not in row["name"]
    ]
    fastest = max(plain, key=lambda row: float(row["tokens_per_s"]), default=None)
    without = f"; without it {fastest['name']} is the fastest" if fastest else ""
    return f"fp8 is no free speed: {FLOAT8_LOSS} (docs/speed.md){without}."


def _tera(rate: float) -> str:
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.2f} GFLOP/s"


def _hours(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def _usd(value: float | None) -> str:
    if value is None:
        return "-"
    return f"${value:,.0f}" if value >= 100 else f"${value:,.2f}" if value >= 1 else f"${value:.4f}"
