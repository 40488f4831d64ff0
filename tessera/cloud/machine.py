"""Facts of the machine that an attempt runs on: provider, instance, device, price, bill.

A cloud host is recognised by the variables that its provider or SkyPilot sets in the job. On
vast.ai the provider is asked, for ten seconds at most, what this instance costs and since when
(``tessera.cloud.billing``); nowhere else is anything asked over the network. Where the bill began:
the provider's figure, ``TESSERA_BILLED_FROM``, else when the container's first process started. A
machine of one's own (provider ``local``) has been on since it was booted, and nobody bills those
hours: there it is when this process started.
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tessera.cloud.billing import (
    PATIENCE_S,
    Rental,
    VastHost,
    first_environ,
    vast_container,
    within,
)
from tessera.errors import InputError, TesseraError
from tessera.ledger.prices import (
    CATALOG_VARIABLE,
    DOWN_VARIABLE,
    PRICE_VARIABLE,
    PROVIDER,
    UP_VARIABLE,
    AskPrice,
    HourlyPrice,
    TrafficPrice,
    choose_price,
    choose_traffic_price,
)

BILLED_FROM_VARIABLE = "TESSERA_BILLED_FROM"
SETUP_STARTED_VARIABLE = "TESSERA_SETUP_STARTED"
NODES_VARIABLE = "SKYPILOT_NUM_NODES"
LOCAL = "local"
_EARLIEST = 1_577_836_800.0  # 2020: a bill from before is a slip (0, or a number of hours)
_CLOCK_SKEW_S = 3600.0


@dataclass(frozen=True)
class Machine:
    """Where an attempt runs; times in seconds since the epoch.

    ``machine`` is the provider's name of the physical host, empty where it told none. ``ask_price``
    asks the provider again; None where there is nobody to ask. ``nodes`` machines work together on
    the job; ``devices`` and every price of an hour are those of this one.
    """

    provider: str
    instance: str
    machine: str
    host: str
    device: str
    devices: int
    price: HourlyPrice
    traffic: TrafficPrice
    traffic_down: TrafficPrice
    process_started_at: float
    billed_from: float
    billed_from_source: str
    setup_started_at: float | None
    nodes: int = 1
    ask_price: AskPrice | None = field(default=None, compare=False)


def describe_machine(
    *,
    experiment_price: float | None = None,
    experiment_traffic_price: float | None = None,
    experiment_down_price: float | None = None,
    environ: Mapping[str, str] = os.environ,
    ask: bool = True,
    hardware: tuple[str, int] | None = None,
) -> Machine:
    """This machine, as the environment, the hardware and its provider tell it.

    The experiment's prices, in US dollars an hour and for 10^9 bytes to the root and from it, count
    where nobody else tells one. Without ``ask`` the provider is not asked: one of several workers
    is enough. ``hardware``, name and number of the devices, saves loading torch. Raises
    ``InputError`` for a variable that is not the number it should be.
    """
    place = _place(environ)
    device, devices = hardware or _device()
    started = psutil.Process().create_time()
    rental, note = _rental(place) if ask else (None, "")
    quote = rental.quote if rental else None
    billed_from, source = _billed_from(environ, place.provider, started, rental)
    return Machine(
        provider=place.provider,
        instance=rental.instance if rental else place.instance,
        machine=rental.machine if rental else "",
        host=socket.gethostname(),
        device=device,
        devices=devices,
        price=choose_price(
            provider=quote.usd_per_hour if quote else None,
            variable=environ.get(PRICE_VARIABLE),
            catalog=environ.get(CATALOG_VARIABLE),
            experiment=experiment_price,
            note=note,
        ),
        traffic=choose_traffic_price(
            provider=quote.usd_per_gb_up if quote else None,
            variable=environ.get(UP_VARIABLE),
            experiment=experiment_traffic_price,
        ),
        traffic_down=choose_traffic_price(
            provider=quote.usd_per_gb_down if quote else None,
            variable=environ.get(DOWN_VARIABLE),
            experiment=experiment_down_price,
            name=DOWN_VARIABLE,
        ),
        process_started_at=started,
        billed_from=billed_from,
        billed_from_source=source,
        setup_started_at=_epoch(environ, SETUP_STARTED_VARIABLE),
        nodes=_nodes(environ),
        ask_price=place.vast.quote if place.vast and ask else None,
    )


def _billed_from(
    environ: Mapping[str, str], provider: str, started: float, rental: Rental | None
) -> tuple[float, str]:
    """When the bill began and who says so; never after this process started."""
    said = rental.billed_from if rental else None
    given = _epoch(environ, BILLED_FROM_VARIABLE)
    if said is not None and _EARLIEST < said < time.time() + _CLOCK_SKEW_S:
        return min(said, started), PROVIDER
    if given is not None:
        return given, BILLED_FROM_VARIABLE
    if provider == LOCAL:
        return started, "start of this process"
    return psutil.Process(1).create_time(), "start of the first process"


@dataclass(frozen=True)
class _Place:
    """Provider, the instance's own name, and whom to ask about it."""

    provider: str
    instance: str
    vast: VastHost | None = None


def _rental(place: _Place) -> tuple[Rental | None, str]:
    """What the provider says about this instance, or why there is nothing: one clause."""
    if place.vast is None:
        return None, ""
    try:
        return within(PATIENCE_S, place.vast.rental), ""
    except TesseraError as error:
        said = str(error)
        return None, said.rpartition("; ")[0] or said.rstrip(".")


def _place(environ: Mapping[str, str]) -> _Place:
    """Where this is; the container's word counts before SkyPilot's.

    In an ssh session, and so in SkyPilot's jobs, the container's variables are those of its first
    process.
    """
    cluster, cloud = "", ""
    try:
        info = json.loads(environ.get("SKYPILOT_CLUSTER_INFO") or "{}")
        cluster, cloud = str(info.get("cluster_name", "")), str(info.get("cloud", "")).lower()
    except (ValueError, AttributeError):
        pass
    container = vast_container(environ, cloud)
    if container is None and cloud == "vast":
        container = vast_container(first_environ(), cloud)
    if container is not None:
        return _Place("vast", container, VastHost(container, environ))
    if pod := environ.get("RUNPOD_POD_ID"):
        return _Place("runpod", pod)
    if cloud:
        vast = VastHost(cluster, environ) if cloud == "vast" and cluster else None
        return _Place(cloud, f"{cluster}/{socket.gethostname()}", vast)
    return _Place(LOCAL, f"{socket.gethostname()}/{_boot_id()}")


def _nodes(environ: Mapping[str, str]) -> int:
    """How many machines the job has: SkyPilot's word, else torchrun's, else 1."""
    for name in (NODES_VARIABLE, "GROUP_WORLD_SIZE"):
        text = environ.get(name)
        if not text:
            continue
        if not text.isdecimal() or int(text) < 1:
            raise InputError(
                f"{name} is {text!r}; expected how many machines work on this job, at least 1."
            )
        return int(text)
    return 1


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return f"{psutil.boot_time():.0f}"


def _device() -> tuple[str, int]:
    """Name of the accelerator and how many there are; a CPU's model and its cores."""
    import torch

    from tessera.model.device import best_device

    if best_device().type == "cuda":
        return torch.cuda.get_device_name(), torch.cuda.device_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except (OSError, IndexError):
        names = []
    return f"CPU {names[0] if names else platform.machine()}", os.cpu_count() or 1


def _epoch(environ: Mapping[str, str], name: str) -> float | None:
    text = environ.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not _EARLIEST < value < time.time() + _CLOCK_SKEW_S:
        raise InputError(
            f"{name} is {text!r}; expected seconds since the epoch (date +%s), not in the future."
        )
    return value
