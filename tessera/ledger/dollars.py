"""A sum as people read it, the same wherever one is said."""

from __future__ import annotations


def dollars(usd: float) -> str:
    """Cents from a dollar on, more digits for a smaller sum: ``$1,234.50``, ``$0.0531``."""
    if usd == 0 or abs(usd) >= 1:
        return f"${usd:,.2f}"
    return f"${usd:.4f}" if abs(usd) >= 0.001 else f"${usd:.6f}"


def as_typed(usd: float) -> str:
    """A price or a budget with the digits that somebody gave it: ``$315``, ``$0.1``."""
    text = f"{usd:,.10f}".rstrip("0").rstrip(".")
    return f"${text}"
