"""Traffic: bytes between an attempt and the root, their dollars, and the words for them.

Every upload of a checkpoint leaves one journal record of its bytes, and every log point one of what
was downloaded since the last. All of them are paid for, those of attempts whose work was lost too:
no lineage is asked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

UP_BYTES = "traffic/up_bytes"
"""The journal metric: bytes sent to a root that is not a folder of this machine, once an upload."""

DOWN_BYTES = "traffic/down_bytes"
"""The journal metric: bytes fetched from such a root since the record before."""

BYTES_PER_GB = 10**9
_UNITS = ("kB", "MB", "GB", "TB")


def count_bytes(transfers: Iterable[float]) -> int:
    """The sum of transfers in bytes; a figure that cannot be (NaN, negative) counts as nothing."""
    return sum(round(size) for size in transfers if math.isfinite(size) and size > 0)


def traffic_usd(transferred: int, usd_per_gb: float) -> float:
    """US dollars of so many bytes at a price for 10^9 of them."""
    return transferred * usd_per_gb / BYTES_PER_GB


def plus_traffic(instance_usd: float | None, usd: float) -> float | None:
    """Dollars of the machine and of its traffic; None while the machine's are not known."""
    return None if instance_usd is None else instance_usd + usd


def checkpoint_sentence(*, step: int, sent: int, seconds: float, usd: float = 0.0) -> str:
    """What a person reads once a checkpoint of ``sent`` bytes is in the root.

    Such as ``checkpoint of step 2000 is in the root: 12.2 GB in 95 s (128 MB/s, $0.12 of
    traffic)``; without the dollars where traffic is not billed.
    """
    took = f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:,.0f} s"
    notes = [f"{size(sent / seconds)}/s"] if seconds > 0 else []
    notes += [f"{_dollars(usd)} of traffic"] if usd > 0 else []
    aside = f" ({', '.join(notes)})" if notes else ""
    return f"checkpoint of step {step} is in the root: {size(sent)} in {took}{aside}"


def size(number: float) -> str:
    """Bytes for a person, in powers of 1,000: ``950 B``, ``12.2 GB``, ``128 MB``."""
    shown, unit = number, "B"
    for larger in _UNITS:
        if shown < 999.5:
            break
        shown, unit = shown / 1000, larger
    whole = unit == "B" or shown >= 99.95
    return f"{shown:,.0f} {unit}" if whole else f"{shown:,.1f} {unit}"


def _dollars(usd: float) -> str:
    """With cents, and for less than ten of them with the first two digits that say something."""
    decimals = 2 if usd >= 0.1 else min(8, 1 - math.floor(math.log10(usd)))
    return f"${usd:,.{decimals}f}"
