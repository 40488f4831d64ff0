"""One figure as people read it."""

from __future__ import annotations

from tessera.ledger.dollars import dollars as known_dollars


def loss(value: float | None) -> str:
    """Nats a token, four decimals."""
    return "-" if value is None else f"{value:.4f}"


def dollars(value: float | None, estimated: bool) -> str:
    """Dollars with cents, more digits for a smaller sum; "~" where an estimate is in it."""
    if value is None:
        return "?"
    return f"{'~' if estimated else ''}{known_dollars(value)}"


def duration(seconds: float) -> str:
    """Such as ``41 s``, ``12 min 05 s``, ``7 h 31 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def plural(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count(value: int | None) -> str:
    """A whole number with commas."""
    return "-" if value is None else f"{value:,}"


def short(value: float) -> str:
    """Such as ``950``, ``1.6M``, ``20.0B``."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.1f}{letter}"
    return f"{value:.0f}"
