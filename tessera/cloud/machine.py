"""Facts of the machine that an attempt runs on: provider, instance, device, price, bill.

Nothing is asked over the network here. A cloud host is recognised by the variables that its
provider or SkyPilot sets in the job. Where the bill began: ``TESSERA_BILLED_FROM``, else when the
container's first process started. A machine of one's own (provider ``local``) has been on since
it was booted, and nobody bills those hours: there it is when this process started.
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tessera.errors import InputError
from tessera.ledger.prices import (
    PRICE_VARIABLE,
    TRAFFIC_VARIABLE,
    HourlyPrice,
    TrafficPrice,
    choose_price,
    choose_traffic_price,
)

BILLED_FROM_VARIABLE = "TESSERA_BILLED_FROM"
SETUP_STARTED_VARIABLE = "TESSERA_SETUP_STARTED"
LOCAL = "local"
_EARLIEST = 1_577_836_800.0  # 2020: a bill from before is a slip (0, or a number of hours)
_CLOCK_SKEW_S = 3600.0


@dataclass(frozen=True)
class Machine:
    """Where an attempt runs; times in seconds since the epoch."""

    provider: str
    instance: str
    host: str
    device: str
    devices: int
    price: HourlyPrice
    traffic: TrafficPrice
    process_started_at: float
    billed_from: float
    billed_from_source: str
    setup_started_at: float | None


def describe_machine(
    *,
    experiment_price: float | None = None,
    experiment_traffic_price: float | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Machine:
    """This machine, as the environment and the hardware tell it.

    The experiment's prices, in US dollars an hour and for 10^9 bytes to the root, count where the
    environment has none. Raises ``InputError`` for a variable that is not the number it should be.
    """
    provider, instance = _provider(environ)
    device, devices = _device()
    started = psutil.Process().create_time()
    given = _epoch(environ, BILLED_FROM_VARIABLE)
    if given is not None:
        billed_from, source = given, BILLED_FROM_VARIABLE
    elif provider == LOCAL:
        billed_from, source = started, "start of this process"
    else:
        billed_from, source = psutil.Process(1).create_time(), "start of the first process"
    return Machine(
        provider=provider,
        instance=instance,
        host=socket.gethostname(),
        device=device,
        devices=devices,
        price=choose_price(variable=environ.get(PRICE_VARIABLE), experiment=experiment_price),
        traffic=choose_traffic_price(
            variable=environ.get(TRAFFIC_VARIABLE), experiment=experiment_traffic_price
        ),
        process_started_at=started,
        billed_from=billed_from,
        billed_from_source=source,
        setup_started_at=_epoch(environ, SETUP_STARTED_VARIABLE),
    )


def _provider(environ: Mapping[str, str]) -> tuple[str, str]:
    """Provider and the instance's own name; the container's word counts before SkyPilot's."""
    cluster, cloud = "", ""
    try:
        info = json.loads(environ.get("SKYPILOT_CLUSTER_INFO") or "{}")
        cluster, cloud = str(info.get("cluster_name", "")), str(info.get("cloud", "")).lower()
    except (ValueError, AttributeError):
        pass
    if label := environ.get("VAST_CONTAINERLABEL"):
        return "vast", label
    if pod := environ.get("RUNPOD_POD_ID"):
        return "runpod", pod
    if cloud:
        return cloud, f"{cluster}/{socket.gethostname()}"
    return LOCAL, f"{socket.gethostname()}/{_boot_id()}"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return f"{psutil.boot_time():.0f}"


def _device() -> tuple[str, int]:
    """Name of the accelerator and how many there are; a CPU's model and its cores."""
    import torch

    if torch.cuda.is_available():
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
