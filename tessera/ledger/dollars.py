"""A sum as people read it, the same wherever one is said."""

from __future__ import annotations

import math


def dollars(usd: float) -> str:
    """Cents from a dollar on, more digits for a smaller sum: ``$1,234.50``, ``$0.0531``."""
    if usd == 0 or abs(usd) >= 1:
        return f"${usd:,.2f}"
    if abs(usd) >= 0.001:
        return f"${usd:.4f}"
    two_digits = 1 - math.floor(math.log10(abs(usd)))
    return f"${usd:.{max(6, two_digits)}f}"


def as_typed(usd: float) -> str:
    """A price or a budget with the digits that somebody gave it: ``$315``, ``$0.1``."""
    text = f"{usd:,.10f}".rstrip("0").rstrip(".")
    return f"${text}"
