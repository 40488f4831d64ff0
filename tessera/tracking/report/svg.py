"""Drawings by matplotlib as SVG that lives inside a page: its colours, its fonts, its words.

matplotlib draws with stand-in colours that are replaced by the page's CSS variables, so one drawing
is right in light, in dark and on paper. Text stays text. The same data give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, FAINT, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
TRAIN, EVAL, REFERENCE = "#010207", "#010208", "#010209"
GOOD, WARN, BAD, LIVE = "#01020a", "#01020b", "#01020c", "#01020d"
_CSS = {
    INK: "--ink", FAINT: "--faint", GRID: "--grid", PAPER: "--card", TRAIN: "--thin",
    EVAL: "--strong", REFERENCE: "--reference", GOOD: "--good", WARN: "--warn", BAD: "--bad",
    LIVE: "--live",
}  # fmt: skip
WIDTH_IN = 4.7
"""Width of every drawing: 338 points, which a phone shows about as large as they are."""
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.5, "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "text.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.8,
    "ytick.major.size": 0.0, "xtick.major.size": 3.0, "axes.axisbelow": True,
    "axes.linewidth": 0.8, "legend.frameon": False, "legend.fontsize": 10.0,
    "axes.titlesize": 10.5, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "path.simplify": True, "path.simplify_threshold": 0.3,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
}  # fmt: skip


class Canvas:
    """A figure with one pair of axes, to be drawn on."""

    def __init__(self, height_in: float) -> None:
        self.figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasSVG(self.figure)
        self.axes: Axes = self.figure.add_subplot()


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Inside, matplotlib draws in our style; ``name`` keeps the ids of several drawings apart."""
    settings = {**_STYLE, "svg.hashsalt": f"tessera-{name}"}
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # not what a matplotlibrc of this machine says
        mpl.rcParams.update(settings)  # type: ignore[arg-type]
        warnings.simplefilter("ignore")  # such as a letter of a device's name that a font lacks
        yield


def inline(canvas: Canvas, name: str, title: str, description: str) -> str:
    """The drawing as an ``<svg>`` for a page, named and described for those who do not see it."""
    written = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    canvas.figure.savefig(written, format="svg", metadata=nothing)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for stand_in, variable in _CSS.items():
        text = text.replace(stand_in, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = (
        f'<svg {box[0]} role="img" aria-labelledby="{name}-title {name}-desc" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    return head + text[text.index(">") + 1 :].rstrip()


def plain(text: str, most: int) -> str:
    """Text that a drawing can hold: one line, printable, at most so many characters."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= most else line[: most - 1] + "…"
