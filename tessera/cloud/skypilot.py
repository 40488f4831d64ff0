"""SkyPilot's task files and catalogs, read in this process: no API server, no cloud is asked.

A provider counts here if a task file names it, whether or not ``sky check`` has enabled it: a plan
may show what another key would give. Catalogs that are missing are fetched by SkyPilot; if that
fails, that provider's offers are missing, and a sentence says so.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tessera.cloud.cards import Card, card_of_offer
from tessera.cloud.offers import VAST, Market, Needs, Offer
from tessera.errors import InputError

_ANYWHERE = ("Vast", "RunPod", "Lambda")  # where a task that names no provider may be rented
_GB_FOR_PRICE = 100.0  # egress prices come in tiers; a run sends more than the free first ones


def require_skypilot() -> Any:
    """The ``sky`` module; ``InputError`` with what to install where it is missing."""
    os.environ.setdefault("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    try:
        import sky
    except ImportError as error:
        raise InputError(
            "SkyPilot is not installed here, which knows prices and rents machines; install it "
            "with `pip install 'tessera[cloud]'`."
        ) from error
    return sky


def first_line(error: BaseException) -> str:
    """What SkyPilot says, in one line that can stand in a sentence."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # SkyPilot colours its sentences
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:120].rstrip(".: (")


class TaskFile:
    """One task YAML, and the tasks and offers that SkyPilot makes of it."""

    def __init__(self, path: Path) -> None:
        """Raises ``InputError`` if it is not there or no YAML."""
        self.path = path
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{path} does not exist; run this in the repository's root, or name a task file "
                "with --task."
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(
                f"{path} cannot be read ({first_line(error)}); expected a SkyPilot task."
            ) from error
        if not isinstance(loaded, dict) or not isinstance(loaded.get("resources"), dict):
            raise InputError(f"{path} is no SkyPilot task with resources; name another by --task.")
        self.config: dict[str, Any] = loaded
        self.bid_given = False
        """Whether a person gave another bid than the file's."""

    @property
    def envs(self) -> dict[str, str]:
        """Its environment; a variable without a value is empty."""
        found = self.config.get("envs") or {}
        return {str(k): "" if v is None else str(v) for k, v in found.items()}

    @property
    def builds_corpus(self) -> bool:
        """Whether its job builds the corpus before it trains."""
        return bool(self.envs.get("TESSERA_MANIFEST"))

    @property
    def nodes(self) -> int:
        """Machines."""
        return int(self.config.get("num_nodes") or 1)

    @property
    def bid(self) -> float | None:
        """What it offers vast.ai an hour for a machine that can be taken away; None: no bid."""
        price = self._vast_kwargs().get("bid_price")
        return None if price is None else float(price)

    @bid.setter
    def bid(self, usd_per_hour: float) -> None:
        vast = self.config.setdefault("config", {}).setdefault("vast", {})
        vast.setdefault("create_instance_kwargs", {})["bid_price"] = usd_per_hour
        self.bid_given = True

    def _vast_kwargs(self) -> dict[str, Any]:
        vast = (self.config.get("config") or {}).get("vast") or {}
        return vast.get("create_instance_kwargs") or {}

    def entries(self) -> list[dict[str, Any]]:
        """Its resources, one set of fields for each alternative, in its order."""
        common = dict(self.config["resources"])
        choices = common.pop("ordered", None) or common.pop("any_of", None) or [{}]
        common.pop("any_of", None)
        return [{**common, **choice} for choice in choices]

    def needs(self, card: Card | None) -> Needs:
        """What it asks of a machine; with ``card`` that GPU instead of the one it names."""
        entry = self.entries()[0]
        limit = entry.get("max_hourly_cost")
        return Needs(
            card=card,
            reported="" if card else self.envs.get("TESSERA_GPU", ""),
            gpus=self._gpus(),
            disk_gb=_at_least(entry.get("disk_size")) or 256.0,
            cpus=_at_least(entry.get("cpus")),
            memory_gb=_at_least(entry.get("memory")),
            max_usd_per_hour=None if limit is None else float(limit),
        )

    def _gpus(self) -> int:
        """GPUs of one machine; 0 where none is asked for."""
        if said := self.envs.get("TESSERA_GPUS"):
            return int(said)
        names = [str(entry.get("accelerators") or "") for entry in self.entries()]
        counts = [int(name.partition(":")[2] or 1) for name in names if name]
        return max(counts, default=0)

    def task(
        self,
        resources: Mapping[str, Any],
        envs: Mapping[str, str],
        *,
        name: str | None = None,
        whole: bool = True,
    ) -> Any:
        """A ``sky.Task`` on these resources; without ``whole`` only to be planned, not launched.

        Raises ``InputError`` for what SkyPilot refuses.
        """
        sky = require_skypilot()
        config = copy.deepcopy(self.config)
        config["resources"] = dict(resources)
        config["name"] = name or config.get("name")
        config["envs"] = {**self.envs, **envs}
        if not whole:  # the credentials file and the keys may not be there yet
            config.pop("file_mounts", None)
            config.pop("secrets", None)
        try:
            return sky.Task.from_yaml_config(config)
        except Exception as error:  # SkyPilot raises a dozen kinds, pandas' and requests' too
            raise InputError(
                f"SkyPilot refuses {self.path} ({first_line(error)}); correct it, or name another "
                "with --task."
            ) from error


def catalog_market(file: TaskFile, card: Card | None) -> Market:
    """What SkyPilot's catalogs offer for the task; the cheapest region of each instance type."""
    require_skypilot()
    with contextlib.redirect_stdout(io.StringIO()), _log_on_stderr():
        return _catalog_market(file, card)  # neither its spinners nor its log may spoil --json


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """SkyPilot's log, which it writes to stdout, as it was when the module was imported."""
    handlers = [
        handler
        for handler in logging.getLogger("sky").handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:  # it was another one
                handler.setStream(stream)


def _catalog_market(file: TaskFile, card: Card | None) -> Market:
    needs, enabled = file.needs(card), enabled_providers()
    offers: dict[tuple[str, str], Offer] = {}
    notes: list[str] = []
    missing: list[str] = []
    for entry in file.entries():
        for provider, one in _for_each_provider(entry, enabled):
            try:
                for offer in _feasible(file, provider, one, needs):
                    known = None if enabled is None else provider in enabled
                    if needs.suits(offer):
                        key = provider, offer.instance_type
                        offers.setdefault(key, replace(offer, enabled=known))
            except Exception as error:  # a catalog that is missing or damaged costs one provider
                if _is_of_network(error):
                    missing.append(provider)
                    continue
                notes.append(
                    f"SkyPilot's catalog of {provider} gives nothing ({first_line(error)}), so its "
                    "offers are missing."
                )
    left_out = tuple(dict.fromkeys(missing))
    if left_out:
        notes.append(
            f"{not_fetched(left_out)} {'Its' if len(left_out) == 1 else 'Their'} offers "
            "are missing."
        )
    return Market(tuple(offers.values()), tuple(dict.fromkeys(notes)), left_out)


def _is_of_network(error: BaseException | None) -> bool:
    """Whether a request that was not answered is behind it; SkyPilot downloads with requests."""
    from requests.exceptions import RequestException

    while error is not None and not isinstance(error, RequestException):
        error = error.__cause__ or error.__context__
    return error is not None


def not_fetched(providers: Sequence[str]) -> str:
    """That catalogs are not here, and what may help."""
    what = "catalog" if len(providers) == 1 else "catalogs"
    return (
        f"SkyPilot's {what} of {', '.join(providers)} could not be fetched, which it does at the "
        "first use; is this machine online?"
    )


def age_note(offers: Sequence[Offer]) -> str | None:
    """A sentence if prices of vast.ai among these are SkyPilot's, which it fetches only once."""
    if not any(offer.provider == VAST and offer.source == "catalog" for offer in offers):
        return None
    path = _catalog_path("vast")
    day = _day_of(path)
    if day is None:
        return None
    return (
        f"SkyPilot's catalog of vast.ai is of {day} and never renews itself; remove {path}, and "
        "the next plan fetches today's."
    )


def enabled_providers() -> set[str] | None:
    """Providers that ``sky check`` has enabled on this machine; None where it never ran.

    An empty set is an answer too: it ran and enabled nothing. What it was allowed to ask is kept
    beside what it found, and tells the two apart.
    """
    require_skypilot()
    from sky import global_user_state
    from sky.clouds.cloud import CloudCapability

    try:
        found = global_user_state.get_cached_enabled_clouds(CloudCapability.COMPUTE, "default")
        ran = bool(global_user_state.get_allowed_clouds("default"))
    except Exception:  # a state of another SkyPilot, or of none: then nobody knows
        return None
    return {str(cloud) for cloud in found} if found or ran else None


def _for_each_provider(
    entry: dict[str, Any], enabled: set[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entry for the provider that it names, else for every one where it may be rented."""
    from sky.utils import registry

    named = entry.get("infra") or entry.get("cloud")
    names = [str(named).split("/")[0]] if named else sorted(enabled or _ANYWHERE)
    for name in names:
        rest = {k: v for k, v in entry.items() if k != "cloud"}
        infra = str(named) if entry.get("infra") else name.lower()
        try:
            provider = str(registry.CLOUD_REGISTRY.from_str(name))
        except ValueError:
            provider = name
        yield provider, {**rest, "infra": infra}


def _feasible(
    file: TaskFile, provider: str, entry: dict[str, Any], needs: Needs
) -> Iterator[Offer]:
    """Every instance type of a provider that fits the entry, at its cheapest region's price."""
    for one in _of_card(provider, entry, needs):
        for wanted in file.task(one, {}, whole=False).resources:
            cloud = wanted.cloud
            for found in cloud.get_feasible_launchable_resources(wanted, file.nodes).resources_list:
                region, price = _cheapest_region(found)
                accelerators = found.accelerators or {}
                name = next(iter(accelerators), "")
                count = int(accelerators.get(name, 0))
                card = card_of_offer(provider, found.instance_type, name)
                billed = provider != VAST  # SkyPilot takes vast.ai's traffic for free: it is not
                yield Offer(
                    provider=provider,
                    gpu=card.name if card else name or "no GPU",
                    card=card,
                    gpus=count,
                    usd_per_hour=price,
                    source="catalog",
                    region=region,
                    instance_type=found.instance_type,
                    accelerators=f"{name}:{count}" if name else "",
                    nodes=file.nodes,
                    usd_per_gb_up=_egress(cloud) if billed else None,
                    usd_per_gb_down=0.0 if billed else None,
                    catalog_usd_per_hour=price,
                )


def _of_card(provider: str, entry: dict[str, Any], needs: Needs) -> Iterator[dict[str, Any]]:
    """The entry with each accelerator name under which the provider has the wanted card."""
    if needs.card is None:
        yield entry
        return
    from sky import catalog

    family, count = needs.card.family, max(1, needs.gpus)
    rows = catalog.list_accelerators(
        name_filter=f"^{family}", quantity_filter=count, clouds=provider.lower(),
        case_sensitive=False,
    )  # fmt: skip
    plain = {k: v for k, v in entry.items() if k != "instance_type"}
    for name, infos in rows.items():
        if any(card_of_offer(provider, i.instance_type or "", name) == needs.card for i in infos):
            yield {**plain, "accelerators": f"{name}:{count}"}


def _cheapest_region(found: Any) -> tuple[str, float]:
    """Name and hourly price of the region where this instance type costs least."""
    regions = found.cloud.regions_with_offering(
        found.instance_type, found.accelerators, found.use_spot, found.region, found.zone
    )
    priced = [(float(found.copy(region=r.name).get_cost(3600)), r.name) for r in regions]
    price, region = min(priced)
    return region, price


def _egress(cloud: Any) -> float:
    """Dollars for 10^9 bytes that leave the provider, by SkyPilot."""
    return float(cloud.get_egress_cost(_GB_FOR_PRICE)) / _GB_FOR_PRICE


def _catalog_path(provider: str) -> Path:
    from sky.catalog import common

    return Path(common.get_catalog_path(f"{provider}/vms.csv"))


def _day_of(path: Path) -> datetime.date | None:
    try:
        seconds = path.stat().st_mtime
    except OSError:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date()


def _at_least(text: Any) -> float | None:
    """The number in SkyPilot's ``8+`` or ``200``; None where there is none."""
    try:
        return float(str(text).rstrip("+xGBgb"))
    except ValueError:
        return None
