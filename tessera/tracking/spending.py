"""What a run had cost at a moment: the dollars that stand behind each of its points."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.ledger.meter import Bill, time_usd
from tessera.ledger.traffic import plus_traffic
from tessera.tracking.history import AttemptHistory


def spent_at(own: Sequence[tuple[AttemptHistory, Bill]], at: float) -> float | None:
    """US dollars of a run's attempts up to ``at`` (seconds since the epoch).

    ``own`` are ``bills_of`` the run. Work that was lost before is in it, since it was paid for. The
    machine's dollars follow its price; those of traffic, and what a bill says beyond the ledger,
    are spread evenly over the attempt. None where a price is not known.
    """
    total = 0.0
    for item, bill in own:
        begun = [(start, min(end, at)) for start, end in bill.intervals if start < at]
        if not begun:
            continue
        usage = item.usage
        machine = time_usd(begun, usage.usd_per_hour, usage.prices)
        seconds = sum(end - start for start, end in begun)
        share = seconds / bill.seconds if bill.seconds > 0 else 1.0
        by_ledger = plus_traffic(bill.usd, item.traffic_usd)
        if machine is None or by_ledger is None:
            return None
        spent = machine + item.traffic_usd * share
        if bill.billed_usd is not None:
            spent = spent * bill.billed_usd / by_ledger if by_ledger else bill.billed_usd * share
        total += spent
    return total
