"""Offers made up for tests of plans and launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tessera.cloud.cards import card_named
from tessera.cloud.offers import Offer

H100 = Offer(
    provider="Vast",
    gpu="H100 SXM",
    card=card_named("H100 SXM"),
    gpus=1,
    usd_per_hour=2.0,
    source="live",
    region="Texas, US",
    instance_type="1x-H100_SXM-32-65536",
    accelerators="H100:1",
    storage_usd_per_hour=0.05,
    usd_per_gb_up=0.01,
    usd_per_gb_down=0.02,
    reliability=0.995,
    catalog_usd_per_hour=1.87,
)
H200 = replace(
    H100, provider="RunPod", gpu="H200", card=card_named("H200"), usd_per_hour=3.0,
    source="catalog", region="US", instance_type="1x_H200_SECURE", accelerators="H200:1",
    storage_usd_per_hour=None, usd_per_gb_up=0.0, usd_per_gb_down=0.0, reliability=None,
    catalog_usd_per_hour=3.0,
)  # fmt: skip


def other(offer: Offer, **changes: Any) -> Offer:
    """The offer with other fields; ``gpu`` brings its card along."""
    if "gpu" in changes:
        changes.setdefault("card", card_named(changes["gpu"]))
    return replace(offer, **changes)
