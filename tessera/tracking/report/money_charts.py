"""Where each dollar went, and when which attempt was on the clock at which price."""

from __future__ import annotations

from tessera.ledger.meter import CATEGORIES
from tessera.tracking.queries import TRAFFIC, AttemptSummary
from tessera.tracking.report import svg
from tessera.tracking.report.content import Report, Stay
from tessera.tracking.report.parts import Chart, Table
from tessera.tracking.report.words import (
    category,
    dollars,
    duration,
    listed,
    moment,
    percent,
    plural,
)

BARS = 40
"""Attempts in the drawing, at most; the table has all."""
_COLOURS = {
    "finished": svg.GOOD, "budget": svg.GOOD, "running": svg.LIVE, "failed": svg.BAD,
    "diverged": svg.BAD,
}  # fmt: skip
_USEFUL = frozenset({"train"})


def spent_chart(report: Report) -> Chart | None:
    """Dollars by category, or seconds where nobody told a price; None where nothing was billed."""
    usd, seconds = report.usd_by_category, report.summary.seconds
    figures = seconds if usd is None else dict(usd)
    total = sum(figures.values())
    if total <= 0:
        return None
    estimated = report.summary.cost_estimated
    rough = "~" if estimated and usd is not None else ""

    def words(value: float) -> str:
        return duration(value) if usd is None else dollars(value, estimated)

    order = [name for name in (*CATEGORIES, TRAFFIC) if figures.get(name, 0.0) > 0]
    parts = [f"{category(n)} {words(figures[n])} ({percent(figures[n] / total)})" for n in order]
    what = "Billed time" if usd is None else "Dollars"
    sentence = f"{what}: {words(total)} in all. Of it {listed(parts)}."
    title = "Billed time by category" if usd is None else "Dollars by category"
    with svg.drawing("spent"):
        canvas = svg.Canvas(0.25 + 0.34 * len(order))
        axes = canvas.axes
        shares = [figures[name] / total for name in order]
        colours = [
            svg.EVAL if n in _USEFUL else svg.BAD if n == "lost" else svg.TRAIN for n in order
        ]
        axes.barh(range(len(order)), shares, color=colours, height=0.62)
        for place, name in enumerate(order):
            label = f" {words(figures[name])} · {percent(shares[place])}"
            axes.text(shares[place], place, label, va="center", ha="left")
        axes.set_yticks(range(len(order)), [category(name) for name in order], color=svg.INK)
        axes.set_xlim(0, max(shares) * 1.75)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        drawing = svg.inline(canvas, "spent", title, sentence)
    notes = []
    if rough:
        notes.append(
            "~ marks dollars that rest on an estimated end or a price that nobody confirmed."
        )
    elif usd is None:
        notes.append("Nobody told the price of an hour, so there are no dollars.")
    if "lost" in order:
        notes.append(
            "Lost: steps that no checkpoint kept or a rollback gave up, to be computed again."
        )
    caption = " ".join(notes)
    return Chart("spent", title, "", sentence, caption, drawing, _spent_table(report))


def _spent_table(report: Report) -> Table:
    """All categories with time and dollars, and their sums."""
    usd, summary = report.usd_by_category, report.summary
    estimated = summary.cost_estimated
    total = None if usd is None else sum(usd.values())
    rows = []
    for name in (*CATEGORIES, TRAFFIC):
        spent = None if usd is None else usd.get(name, 0.0)
        time = "–" if name == TRAFFIC else duration(summary.seconds.get(name, 0.0))
        share = percent(spent / total) if spent is not None and total else "–"
        rows.append((category(name), time, dollars(spent, estimated), share))
    seconds = sum(summary.seconds.values())
    share = percent(1.0) if total else "–"
    rows.append(("total", duration(seconds), dollars(summary.cost_usd, estimated), share))
    return Table(
        "Time and dollars by category",
        ("category", "time", "dollars", "share"),
        tuple(rows),
        numeric=(1, 2, 3),
    )


def price_words(attempt: AttemptSummary) -> str:
    """The price of an hour, and whether it moved."""
    if attempt.usd_per_hour is None:
        return "price not known"
    moved = ", moved" if attempt.price_changes else ""
    sure = "" if attempt.price_source in ("provider", "TESSERA_USD_PER_HOUR") else "~"
    return f"{sure}${attempt.usd_per_hour:.4g}/h{moved}"


def timeline_chart(report: Report) -> Chart | None:
    """One bar an attempt over the hours since the first was billed; None without attempts."""
    stays = report.stays
    if not stays:
        return None
    began = min(_begin(stay) for stay in stays)
    shown = stays[-BARS:]
    sentence = f"{plural(len(stays), 'attempt')}: " + "; ".join(map(_told, shown)) + "."
    with svg.drawing("timeline"):
        drawing = svg.inline(_draw(shown, began), "timeline", "Attempts over time", sentence)
    notes = []
    if any(start < stay.attempt.started_at - 1 for stay in stays for start, _ in stay.billed):
        notes.append("Pale: billed before the process started.")
    if len(stays) > BARS:
        notes.append(f"The last {BARS} of {len(stays)} attempts are drawn.")
    if any(stay.attempt.estimated for stay in stays):
        notes.append("~ marks an end that nobody told: the last sign of life counts.")
    title, caption = "Attempts over time", " ".join(notes)
    return Chart("timeline", title, "", sentence, caption, drawing, attempts_table(stays))


def _begin(stay: Stay) -> float:
    return min([stay.attempt.started_at, *(start for start, _ in stay.billed)])


def _told(stay: Stay) -> str:
    a = stay.attempt
    length = duration(sum(end - start for start, end in stay.billed))
    return (
        f"{a.attempt.split('-')[0]} on {svg.plain(a.device, 60)} at {price_words(a)}, {length}, "
        f"{dollars(a.usd, a.usd_estimated)}, {a.status.replace('_', ' ')}"
    )


def _draw(shown: tuple[Stay, ...], began: float) -> svg.Canvas:
    canvas = svg.Canvas(0.75 + 0.5 * len(shown))
    axes = canvas.axes
    ends = [end for stay in shown for _, end in stay.billed] or [began]
    whole = max(max(ends) - began, 1e-9)
    unit, name = (3600.0, "hours") if whole >= 3600 else (60.0, "minutes")
    for row, stay in enumerate(shown):
        a = stay.attempt
        colour = _COLOURS.get(a.status, svg.WARN)
        pieces = []
        for start, end in stay.billed:
            middle = min(max(a.started_at, start), end)
            pieces += [(start, middle, 0.4), (middle, end, 1.0)]
        for start, end, alpha in pieces:
            width = (end - start) / unit
            axes.broken_barh(
                [((start - began) / unit, max(width, 0.004 * whole / unit if alpha == 1 else 0))],
                (row + 0.05, 0.34), facecolors=colour, alpha=alpha,
            )  # fmt: skip
        rough = "~" if a.estimated else ""
        number = a.attempt.split("-")[0]
        label = f"{number}  {price_words(a)} · {rough}{a.status.replace('_', ' ')}"
        left = f"{label} · {dollars(a.usd, a.usd_estimated)}"
        axes.text(0.0, row - 0.16, left, transform=axes.get_yaxis_transform(), va="center")
        device = svg.plain(a.device.replace("NVIDIA ", ""), 20)
        axes.text(
            1.0, row - 0.16, device, transform=axes.get_yaxis_transform(), va="center", ha="right",
            color=svg.FAINT,
        )  # fmt: skip
    axes.set_ylim(len(shown) - 0.45, -0.5)
    axes.set_xlim(0, whole / unit * 1.005)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    axes.set_xlabel(f"{name} since the first attempt was billed")
    return canvas


def attempts_table(stays: tuple[Stay, ...]) -> Table:
    """What became of each attempt, and what it cost."""
    rows = []
    for stay in stays:
        a = stay.attempt
        rows.append(
            (
                a.attempt,
                a.status.replace("_", " ") + (f": {a.reason}" if a.reason else ""),
                "start" if a.resumed_from is None else f"step {a.resumed_from:,}",
                price_words(a),
                duration(sum(end - start for start, end in stay.billed)),
                dollars(a.usd, a.usd_estimated),
            )
        )
    columns = ("attempt", "outcome", "continues", "price", "billed", "dollars")
    return Table("Attempts", columns, tuple(rows), numeric=(3, 4, 5), whole=(0, 2))


def machines_table(stays: tuple[Stay, ...]) -> Table:
    """Where each attempt ran and when, and who told its price."""
    rows = []
    for stay in stays:
        a = stay.attempt
        end = f"{'~' if a.estimated else ''}{moment(a.ended_at)}"
        rows.append(
            (
                a.attempt,
                a.device,
                f"{a.provider}/{a.instance}" + (f" ({a.machine})" if a.machine else ""),
                a.price_source + (f": {a.price_note}" if a.price_note else ""),
                a.billed_from_source,
                moment(a.started_at),
                "running" if a.status == "running" else end,
            )
        )
    columns = (
        "attempt", "device", "instance", "price told by", "bill's start told by", "started",
        "ended",
    )  # fmt: skip
    return Table("Machines", columns, tuple(rows), whole=(0, 5, 6))
