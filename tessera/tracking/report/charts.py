"""The charts of the page, each with a sentence that says its figures and a table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tessera.tracking.report import svg
from tessera.tracking.report.content import Curve, Point, Report
from tessera.tracking.report.curves import BEYOND, BITS, EVAL, MFU, SPEED, TRAIN
from tessera.tracking.report.parts import (
    DOLLARS,
    TOKENS,
    Axis,
    Chart,
    Table,
    sample,
    time_axis,
)
from tessera.tracking.report.words import count, figure, listed, percent, plural, tick

NOT_SAVED = "training, not saved"
"""The curve above the lineage."""
_EARLY = 0.03  # share of the axis whose points may lie above the frame


@dataclass(frozen=True)
class _Subject:
    """A chart's value: its curves by name and how a value is written."""

    id: str
    title: str
    unit: str
    curves: Mapping[str, Curve]
    words: Callable[[float | None], str]
    reference: tuple[str, float] | None = None
    from_zero: bool = False


def loss_charts(report: Report) -> list[Chart]:
    """Loss against tokens, billed hours and dollars; empty where no loss is recorded."""
    named = {"training": TRAIN, NOT_SAVED: BEYOND, "evaluation": EVAL}
    curves = {name: report.curves[key] for name, key in named.items() if key in report.curves}
    summary, reference = report.summary, None
    if summary.base_loss is not None:
        reference = ("base model", summary.base_loss)
    elif summary.unigram_entropy is not None:
        reference = ("unigram entropy", summary.unigram_entropy)
    subject = _Subject("loss", "Loss", "nats a token", curves, figure, reference)
    return _against_all(subject)


def bits_charts(report: Report) -> list[Chart]:
    """Bits per byte against tokens, billed hours and dollars; empty where none are recorded."""
    curves = {"evaluation": report.curves[BITS]} if BITS in report.curves else {}
    return _against_all(_Subject("bits", "Bits per byte", "", curves, figure))


def speed_charts(report: Report) -> list[Chart]:
    """Throughput and MFU over billed hours, as far as they are recorded."""
    found = []
    for key, name, unit, words in (
        (SPEED, "Throughput", "tokens/s", count),
        (MFU, "MFU", "of the peak", percent),
    ):
        if key in report.curves:
            curves = {name: report.curves[key]}
            subject = _Subject(name.lower(), name, unit, curves, words, from_zero=True)
            found += _chart(subject, time_axis(curves))
    return found


def _against_all(subject: _Subject) -> list[Chart]:
    axes = (TOKENS, time_axis(subject.curves), DOLLARS)
    return [chart for axis in axes for chart in _chart(subject, axis)]


def _chart(subject: _Subject, axis: Axis) -> list[Chart]:
    """The chart, or none where nothing can be placed on the axis."""
    placed = {
        name: curve
        for name, curve in subject.curves.items()
        if any(axis.of(point) is not None for point in curve.points)
    }
    if not placed:
        return []
    name = f"{subject.id}-{axis.id}"
    title = f"{subject.title} against {axis.label}"
    told = [_sentence(n, curve, subject, axis) for n, curve in placed.items()]
    sentence = " ".join(told)
    if subject.reference:
        sentence += f" {subject.reference[0].capitalize()}: {subject.words(subject.reference[1])}."
    with svg.drawing(name):
        canvas, above = _draw(subject, placed, axis)
        drawing = svg.inline(canvas, name, title, sentence)
    table = _table(title, subject, placed, axis)
    (shown, curve), *_ = reversed(placed.items())
    caption = " ".join([_short(shown, curve, subject, axis), *_notes(placed, above, subject)])
    return [Chart(name, title, subject.unit, sentence, caption, drawing, table)]


def _sentence(name: str, curve: Curve, subject: _Subject, axis: Axis) -> str:
    def at(point: Point) -> str:
        place = axis.of(point)
        where = "" if place is None else f" at {axis.words(place)}"
        return f"{subject.words(point.value)}{where}"

    first, last, lowest, highest = curve.first, curve.last, curve.lowest, curve.highest
    if first is None or last is None or lowest is None or highest is None:
        return f"{_capital(name)}: no number among {plural(curve.total, 'point')}."
    if first is last:
        return f"{_capital(name)}: {at(first)}, the only number."
    return (
        f"{_capital(name)}: from {at(first)} to {at(last)}; lowest {at(lowest)}, "
        f"highest {at(highest)}."
    )


def _short(name: str, curve: Curve, subject: _Subject, axis: Axis) -> str:
    """What a reader wants to know of the curve first: its end, and its best if that is another."""
    last = curve.last
    best = curve.highest if subject.from_zero else curve.lowest
    if last is None or best is None:
        return f"{_capital(name)}: no number."
    text = f"{_capital(name)}: {subject.words(last.value)} at the end"
    place = axis.of(best)
    if best is not last and place is not None:
        which = "highest" if subject.from_zero else "lowest"
        text += f", {which} {subject.words(best.value)} at {axis.words(place)}"
    return f"{text}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _notes(placed: Mapping[str, Curve], above: Mapping[str, float], subject: _Subject) -> list[str]:
    """What a reader should know of the drawing."""
    parts = []
    if NOT_SAVED in placed:
        parts.append("Dotted: no checkpoint covers it, so it may have to be done again.")
    for name, curve in placed.items():
        if curve.not_finite:
            are = "is" if curve.not_finite == 1 else "are"
            what = plural(curve.not_finite, "point")
            parts.append(f"{what} of {name} {are} no number, marked × at the upper edge.")
        if len(curve.points) < curve.total:
            parts.append(
                f"{_capital(name)}: {len(curve.points):,} of {curve.total:,} points, the lowest "
                "and the highest of each stretch."
            )
    if above:
        outside = [f"{what} {subject.words(value)}" for what, value in above.items()]
        parts.append(f"Above the frame: {listed(outside)}.")
    return parts


def _draw(
    subject: _Subject, placed: Mapping[str, Curve], axis: Axis
) -> tuple[svg.Canvas, dict[str, float]]:
    canvas = svg.Canvas(3.1)
    axes = canvas.axes
    for name, curve in placed.items():
        background = name != "evaluation" and len(placed) > 1
        shown = [(x / axis.unit, p.value) for p in curve.numbers if (x := axis.of(p)) is not None]
        axes.plot(
            [x for x, _ in shown], [y for _, y in shown], label=name,
            color=svg.TRAIN if background else svg.EVAL,
            linewidth=1.8 if len(shown) <= 300 else 1.1,
            linestyle=":" if name == NOT_SAVED else "-",
            marker="o" if len(shown) == 1 or (name == "evaluation" and len(shown) <= 40) else "",
            markersize=3.6, zorder=2 if background else 3,
        )  # fmt: skip
        odd = [
            x / axis.unit for p in curve.points if not p.finite and (x := axis.of(p)) is not None
        ]
        if odd:
            axes.plot(
                odd, [0.97] * len(odd), transform=axes.get_xaxis_transform(), linestyle="",
                marker="x", color=svg.BAD, markersize=7, label=f"{name}: no number",
            )  # fmt: skip
    above = _frame(canvas, subject, placed, axis)
    if subject.reference and subject.reference[0] not in above:
        name, level = subject.reference
        axes.axhline(
            level, color=svg.REFERENCE, linewidth=1.2, linestyle=(0, (4, 3)), label=name, zorder=1
        )
    _label(axes, subject, axis)
    return canvas, above


def _label(axes: Axes, subject: _Subject, axis: Axis) -> None:
    axes.set_xlabel(axis.label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: axis.tick(v)))
    if subject.id == "mfu":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))
    elif subject.id == "throughput":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: tick(v)))
    named = len(axes.get_legend_handles_labels()[0])
    if named > 1:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2 if named > 3 else 3,
            handlelength=1.2, columnspacing=1.0, handletextpad=0.5, borderaxespad=0.1,
            borderpad=0.2,
        )  # fmt: skip


def _frame(
    canvas: svg.Canvas, subject: _Subject, placed: Mapping[str, Curve], axis: Axis
) -> dict[str, float]:
    """Fit the frame to what follows the first steps; returns what lies above it, by name."""
    points = [
        (x, p.value) for c in placed.values() for p in c.numbers if (x := axis.of(p)) is not None
    ]
    if not points:
        return {}
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    later = [y for x, y in points if x >= left + _EARLY * (right - left)] or [y for _, y in points]
    top, low, high = max(y for _, y in points), min(y for _, y in points), max(later)
    if subject.from_zero:
        canvas.axes.set_ylim(0, top * 1.08 if top > 0 else 1)
        return {}
    above = {}
    if subject.reference is not None:
        name, level = subject.reference
        if level - low > 2.5 * max(high - low, 1e-9):
            above[name] = level
        else:
            low, high = min(low, level), max(high, level)
    if top - low > 1.25 * (high - low) and high > low:
        above = {"the first steps, up to": top} | above
    else:
        high = top
    if above and high > low:
        canvas.axes.set_ylim(low - 0.05 * (high - low), high + 0.12 * (high - low))
    return above


def _table(title: str, subject: _Subject, placed: Mapping[str, Curve], axis: Axis) -> Table:
    rows = []
    for name, curve in placed.items():
        for point in sample(curve):
            place = axis.of(point)
            rows.append(
                (
                    name,
                    count(point.step),
                    "–" if place is None else axis.words(place).removesuffix(" tokens"),
                    subject.words(point.value),
                )
            )
    columns = ("curve", "step", axis.label, subject.unit)
    return Table(title, columns, tuple(rows), numeric=(1, 2, 3))
