"""What can be rented for a task, at which price: SkyPilot's catalogs, vast.ai's live offers.

A catalog knows prices of instances only; on vast.ai it is fetched once and ages. Live offers have
prices of disk and traffic too. SkyPilot rents by instance type, never a chosen offer, so a live
offer is what the market asks at the moment, and the command beside it names the type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tessera.cloud.cards import Card, card_named
from tessera.cloud.vast import VastClient, VastOffer, find_key
from tessera.errors import InputError, ProviderError

VAST = "Vast"
KEY_COMMAND = "vastai set api-key KEY"
_HOURS_A_MONTH = 730.0


@dataclass(frozen=True)
class Offer:
    """A machine that can be rented. US dollars; None where nobody tells the price.

    ``provider`` is spelled as ``sky check`` does; ``accelerators`` and ``instance_type`` are what
    SkyPilot rents it by (an empty type: it has none for this). ``usd_per_hour`` is without the disk
    unless ``storage_usd_per_hour`` is None. ``nodes`` machines of ``gpus`` GPUs each are rented,
    and every price is for one of them. A ``bid`` can be taken away at any moment.
    """

    provider: str
    gpu: str
    card: Card | None
    gpus: int
    usd_per_hour: float
    source: Literal["live", "catalog"]
    region: str
    instance_type: str
    accelerators: str
    nodes: int = 1
    storage_usd_per_hour: float | None = None
    usd_per_gb_up: float | None = None
    usd_per_gb_down: float | None = None
    reliability: float | None = None
    bid: bool = False
    catalog_usd_per_hour: float | None = None
    enabled: bool | None = None
    number: int | None = None

    @property
    def all_gpus(self) -> int:
        """Of all machines together."""
        return self.gpus * self.nodes

    @property
    def billed_usd_per_hour(self) -> float:
        """What is billed an hour while the machines run, the disks included where known."""
        return (self.usd_per_hour + (self.storage_usd_per_hour or 0.0)) * self.nodes


def how_to_enable(provider: str) -> str:
    """That SkyPilot may not rent there, and what changes it."""
    first = f"{KEY_COMMAND} && " if provider == VAST else ""
    return f"{provider} is not enabled: `{first}sky check {provider.lower()}`"


@dataclass(frozen=True)
class Needs:
    """What the task asks of a machine; GB, dollars an hour; None: no limit."""

    card: Card | None
    reported: str
    gpus: int
    disk_gb: float
    cpus: float | None
    memory_gb: float | None
    max_usd_per_hour: float | None

    def suits(self, offer: Offer) -> bool:
        """Whether the guard on the rented machine would let it train, as far as one knows."""
        if self.card is not None:
            return offer.card == self.card
        return not self.reported or offer.card is None or self.reported in offer.card.reported


@dataclass(frozen=True)
class Market:
    """Offers, and sentences about what could not be asked.

    ``missing``: providers whose catalog could not be fetched.
    """

    offers: tuple[Offer, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()


def with_live(
    catalog: Sequence[Offer],
    needs: Needs,
    *,
    bid: float | None = None,
    client: Callable[[], VastClient] = VastClient,
) -> Market:
    """The catalog's offers, those of vast.ai replaced by what it offers now, if it answers.

    Without a key, or when vast.ai fails, the catalog's prices remain and a sentence says why.
    ``bid`` takes the interruptible offers that such a price (dollars an hour) wins; where vast.ai
    does not tell them, the bid is the price, and nobody knows whether it wins.
    """
    catalog = [_at_bid(offer, bid) for offer in catalog]
    of_vast = [offer for offer in catalog if offer.provider == VAST and offer.card is not None]
    if not of_vast or needs.gpus == 0:  # who needs no GPU takes what is cheapest
        return Market(tuple(catalog), ())
    kept = "the catalog's" if bid is None else f"your bid of ${bid:.2f}/h, won or not"
    if find_key() is None:
        note = f"No vast.ai key here (`{KEY_COMMAND}`): its prices are {kept}."
        return Market(tuple(catalog), (note,))
    try:
        with client() as vast:
            live = _ask(vast, of_vast, needs, bid)
    except (ProviderError, InputError) as error:
        note = f"{str(error).rstrip('.')}. The prices of vast.ai below are {kept}."
        return Market(tuple(catalog), (note,))
    notes: tuple[str, ...] = ()
    if not live:
        at = "" if bid is None else f" at a bid of ${bid:.2f}/h"
        notes = (f"vast.ai has no machine now that fits{at}; its catalog's offers are left out.",)
    rest = [offer for offer in catalog if offer.provider != VAST]
    return Market((*live, *rest), notes)


def _at_bid(offer: Offer, bid: float | None) -> Offer:
    """What is bid for vast.ai's machine is what its hour costs, whatever the catalog says."""
    if bid is None or offer.provider != VAST:
        return offer
    return replace(offer, usd_per_hour=bid, catalog_usd_per_hour=bid, bid=True)


def _ask(
    vast: VastClient, catalog: Sequence[Offer], needs: Needs, bid: float | None
) -> list[Offer]:
    """Live offers for every kind of GPU that the catalog's offers of vast.ai have."""
    found: dict[int, Offer] = {}
    for family in sorted({offer.card.family for offer in catalog if offer.card is not None}):
        rows = vast.offers(family, needs.gpus, disk_gb=needs.disk_gb, bid=bid is not None)
        for row in rows:
            offer = _offer(row, needs, bid)
            if offer is not None and _fits(row, offer, needs):
                found[row.id] = _rented_as(offer, catalog)
    return sorted(found.values(), key=lambda offer: offer.billed_usd_per_hour)


def _offer(row: VastOffer, needs: Needs, bid: float | None) -> Offer | None:
    """A row of vast.ai's answer; None if its price is missing or above the bid."""
    if row.dph_total is None:
        return None
    storage = row.storage_total_cost
    if storage is None and row.storage_cost is not None:
        storage = row.storage_cost * needs.disk_gb / _HOURS_A_MONTH
    base = row.dph_total - (row.storage_total_cost or 0.0)
    if bid is not None:
        if row.min_bid is None or row.min_bid > bid:
            return None
        base = bid
    return Offer(
        provider=VAST,
        gpu=row.gpu_name,
        card=card_named(row.gpu_name),
        gpus=row.num_gpus,
        usd_per_hour=base,
        source="live",
        region=row.geolocation,
        instance_type="",
        accelerators="",
        storage_usd_per_hour=storage,
        usd_per_gb_up=row.inet_up_cost,
        usd_per_gb_down=row.inet_down_cost,
        reliability=row.reliability,
        bid=bid is not None,
        number=row.id,
    )


def _fits(row: VastOffer, offer: Offer, needs: Needs) -> bool:
    memory = None if row.cpu_ram is None else row.cpu_ram / 1024
    enough = (
        (row.cpu_cores, needs.cpus),
        (memory, needs.memory_gb),
        (row.disk_space, needs.disk_gb),
    )
    return (
        needs.suits(offer)
        and all(has is None or wants is None or has >= wants for has, wants in enough)
        and (needs.max_usd_per_hour is None or offer.usd_per_hour <= needs.max_usd_per_hour)
    )


def _rented_as(offer: Offer, catalog: Iterable[Offer]) -> Offer:
    """With the instance type by which SkyPilot rents such a card: the catalog's cheapest."""
    offer = replace(offer, enabled=next((other.enabled for other in catalog), None))
    same = [other for other in catalog if other.card == offer.card and other.gpus == offer.gpus]
    if not same:
        return offer
    best = min(same, key=lambda other: other.usd_per_hour)
    return replace(
        offer,
        instance_type=best.instance_type,
        accelerators=best.accelerators,
        nodes=best.nodes,
        catalog_usd_per_hour=best.usd_per_hour,
    )
