"""Figures for a person: the units and digits of the page, the same in charts, tables and text."""

from __future__ import annotations

import math
from datetime import UTC, datetime

CATEGORY_WORDS = {
    "provision": "provision",
    "setup": "setup",
    "compile": "compile",
    "data_wait": "data wait",
    "train": "train",
    "evaluate": "evaluate",
    "checkpoint": "checkpoint",
    "idle": "idle",
    "lost": "lost to preemption",
    "traffic": "traffic",
}
"""How the ledger's categories are called on the page."""


def category(name: str) -> str:
    """The category in words."""
    return CATEGORY_WORDS.get(name, name)


def dollars(value: float | None, estimated: bool = False) -> str:
    """Dollars with cents, more digits for less than one; "~" where an estimate is in it."""
    if value is None:
        return "not known"
    small = f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.6f}"
    shown = f"{value:,.2f}" if abs(value) >= 1 else small
    return f"{'~' if estimated else ''}${shown}"


def duration(seconds: float) -> str:
    """Such as ``41 s``, ``12 min 05 s``, ``7 h 31 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def long_hours(seconds: float) -> str:
    """Hours with one decimal from ten on, else as ``duration``."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 36_000 else duration(seconds)


def hours(value: float) -> str:
    """Hours as a length of time."""
    return duration(value * 3600)


def figure(value: float | None) -> str:
    """A loss or bits per byte, four decimals; what is no number by its name."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    return f"{value:.4f}" if math.isfinite(value) else "infinite"


def percent(share: float | None) -> str:
    """A share of 1 in percent, one decimal; two significant digits below one percent."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.1f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2g} %"


def count(value: float | None) -> str:
    """A whole number with commas."""
    return "–" if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """Such as ``950``, ``1.6 M``, ``20.0 B``."""
    if value is None:
        return "–"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.1f} {letter}"
    return f"{value:.0f}"


def tick(value: float) -> str:
    """A mark on an axis: ``2.5``, ``400 k``, ``24 B``, ``0.00006``; no exponents."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g} {letter}"
    return f"{value:.8f}".rstrip("0").rstrip(".") or "0"


def moment(seconds: float) -> str:
    """A time in UTC, to the minute."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def plural(number: int, noun: str) -> str:
    """``1 attempt``, ``2 attempts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
