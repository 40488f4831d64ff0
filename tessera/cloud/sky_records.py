"""SkyPilot's own records of clusters: hours times the catalog's price, for want of a bill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tessera.cloud.reconcile import Lodger
from tessera.errors import ProviderError
from tessera.ledger.invoices import CATALOG, OTHER, Invoice

NOT_ASKED = frozenset({"vast", "local"})
"""vast.ai tells its bill itself; a machine of one's own has none."""


def sky_records(lodgers: Sequence[Lodger], now: float) -> list[Mapping[str, Any]]:
    """The cost report of SkyPilot, back to the first of ``lodgers``; starts its local API server.

    Raises ``ProviderError`` where SkyPilot is not installed or does not answer.
    """
    oldest = min((lodger.billed_from for lodger in lodgers), default=now)
    try:
        import sky

        return list(sky.get(sky.cost_report(days=int((now - oldest) / 86_400) + 2)))
    except ImportError as error:
        raise ProviderError(
            "SkyPilot is not installed here, so its records of other providers cannot be read; "
            "install tessera[cloud] where the runs were launched."
        ) from error
    except Exception as error:  # its API server's errors are of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".")
        raise ProviderError(
            f"SkyPilot's records cannot be read ({reason}); see `sky api status`, then try again."
        ) from error


def catalog_invoices(
    records: Sequence[Mapping[str, Any]], lodgers: Sequence[Lodger], now: float
) -> list[Invoice]:
    """One invoice an instance of ``lodgers`` whose cluster is in the records; no bills, though."""
    found = []
    for instance in sorted({(one.provider, one.instance) for one in lodgers}):
        group = [one for one in lodgers if (one.provider, one.instance) == instance]
        if group[0].provider in NOT_ASKED:
            continue
        lines = [record for record in records if _is_of(record, group)]
        usd = [float(line["total_cost"]) for line in lines if line.get("total_cost") is not None]
        if not usd:
            continue
        spans = [span for line in lines for span in line.get("usage_intervals") or ()]
        open_ = any(end is None for _, end in spans)
        found.append(
            Invoice(
                provider=instance[0], instance=instance[1], label=str(lines[0].get("name")),
                usd=sum(usd), by_category={OTHER: sum(usd)},
                started_at=min((float(start) for start, _ in spans), default=None),
                ended_at=max((float(end) for _, end in spans if end), default=None),
                fetched_at=now, source=CATALOG, partial=open_,
                lines=[_plain(line) for line in lines],
            )
        )  # fmt: skip
    return found


def _is_of(record: Mapping[str, Any], group: Sequence[Lodger]) -> bool:
    """Whether the cluster is the one that the attempts named, at that time."""
    cluster = group[0].instance.rsplit("/", 1)[0]
    if record.get("name") != cluster:
        return False
    first = min(one.billed_from for one in group)
    last = max(one.ended_at for one in group)
    spans = record.get("usage_intervals") or ()
    return any(start <= last and (end is None or end >= first) for start, end in spans)


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a record that JSON can say."""
    wanted = ("name", "duration", "num_nodes", "cluster_hash", "usage_intervals", "total_cost",
              "cloud", "region", "resources_str")  # fmt: skip
    return {name: line[name] for name in wanted if name in line}
