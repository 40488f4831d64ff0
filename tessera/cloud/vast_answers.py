"""What vast.ai answers, as far as Tessera reads it.

Every model leaves out what it does not know and takes a figure that cannot be a number of dollars
(missing, NaN, negative, a word) as None, so one odd field never hides the rest of an answer.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

RUNNING = frozenset({"running", "frozen"})
"""States (``actual_status``) in which the GPU is billed; in all others the disk alone is."""
_STARTING = frozenset({"", "created", "loading", "rebooting", "unknown"})


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_number(value: Any) -> float | None:
    """A finite, non-negative number, or None."""
    number = _finite(value)
    return number if number is not None and number >= 0 else None


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


Figure = Annotated[float | None, BeforeValidator(as_number)]
"""Dollars, seconds or a size; None where vast.ai tells no usable one."""
Amount = Annotated[float | None, BeforeValidator(_finite)]
"""Dollars of a bill, which may be negative (a credit)."""
Text = Annotated[str, BeforeValidator(_text)]


class VastModel(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class VastInstance(VastModel):
    """An instance of the account. Dollars an hour, dollars for 10^9 bytes, seconds of the epoch."""

    id: int
    machine_id: int | None = None
    host_id: int | None = None
    label: Text = ""
    gpu_name: Text = ""
    num_gpus: int | None = None
    actual_status: Text = ""
    geolocation: Text = ""
    public_ipaddr: Text = ""
    is_bid: bool | None = None
    dph_total: Figure = None
    dph_base: Figure = None
    min_bid: Figure = None
    storage_total_cost: Figure = None
    inet_up_cost: Figure = None
    inet_down_cost: Figure = None
    start_date: Figure = None

    @property
    def usd_per_hour(self) -> float | None:
        """What an hour costs in its present state: a stopped instance pays for its disk alone."""
        if self.actual_status in RUNNING | _STARTING:
            return self.dph_total
        return self.storage_total_cost


class VastOffer(VastModel):
    """A machine that can be rented. Dollars an hour with the asked storage in ``dph_total``."""

    id: int
    machine_id: int | None = None
    host_id: int | None = None
    gpu_name: Text = ""
    num_gpus: int = 1
    gpu_ram: Figure = None
    """MiB of one GPU."""
    dph_total: Figure = None
    dph_base: Figure = None
    min_bid: Figure = None
    storage_cost: Figure = None
    """Dollars a month for 10^9 bytes of disk."""
    storage_total_cost: Figure = None
    inet_up_cost: Figure = None
    inet_down_cost: Figure = None
    inet_up: Figure = None
    """Mbit/s, as measured by vast.ai."""
    inet_down: Figure = None
    disk_space: Figure = None
    """GB that can be had."""
    cpu_cores: Figure = None
    cpu_ram: Figure = None
    """MiB."""
    reliability: Figure = None
    cuda_max_good: Figure = None
    geolocation: Text = ""
    verified: bool | None = None
    datacenter: bool | None = None
    rentable: bool | None = None


class VastChargeItem(VastModel):
    """A part of a charge: ``type`` is gpu, disk, bandwidth or the like."""

    model_config = ConfigDict(extra="allow", frozen=True)  # a bill is kept as it came

    type: Text = ""
    description: Text = ""
    amount: Amount = None


class VastCharge(VastModel):
    """What vast.ai billed for one contract; times in seconds of the epoch, dollars."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Text = ""
    source: Text = ""
    description: Text = ""
    start: Figure = None
    end: Figure = None
    amount: Amount = None
    metadata: dict[str, Any] | None = None
    items: list[VastChargeItem] | None = None

    @property
    def label(self) -> str:
        """The instance's label, as far as the charge tells it."""
        return _text((self.metadata or {}).get("label"))

    @property
    def instance(self) -> int | None:
        """The instance's id, out of ``instance-12345678``."""
        match = re.fullmatch(r"(?:instance-)?(\d+)", self.source)
        return int(match[1]) if match else None


class VastUser(VastModel):
    """The account of the key; dollars."""

    id: int
    username: Text = ""
    credit: Figure = None


def is_model(name: str, wanted: str) -> bool:
    """Whether the GPU ``name`` is the model ``wanted`` or a variant (``H100 SXM`` of ``H100``).

    Case does not count, nor whether words are parted by a space or an underscore.
    """
    have, want = (re.split(r"[\s_]+", text.strip().upper()) for text in (name, wanted))
    return have[: len(want)] == want
