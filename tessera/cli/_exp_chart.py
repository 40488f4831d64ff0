"""Curves as a chart of characters; plotext draws it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

_LEAST_WIDTH, _MOST_WIDTH, _HEIGHT = 40, 110, 18
_MARKERS = ("braille", "hd", "sd")
Curve = tuple[Sequence[float], Sequence[float]]


def chart(curves: Mapping[str, Curve], *, title: str, x: str, width: int) -> str:
    """A chart of x against y by name; colours only on a terminal. Empty without points."""
    import plotext

    shown = {name: curve for name, curve in curves.items() if curve[0]}
    if not shown:
        return ""
    plotext.clear_figure()
    plotext.theme("clear")
    colour = sys.stdout.isatty()
    for number, (name, (xs, ys)) in enumerate(shown.items()):
        # Without colours the curves are told apart by how they are drawn.
        marker = "braille" if colour else _MARKERS[number % len(_MARKERS)]
        how = {"color": number + 1} if colour else {}
        plotext.plot(list(xs), list(ys), label=name, marker=marker, **how)
    plotext.title(title)
    plotext.xlabel(x)
    plotext.plotsize(max(_LEAST_WIDTH, min(_MOST_WIDTH, width)), _HEIGHT)
    text: str = plotext.build()
    return text if colour else str(plotext.uncolorize(text))
