"""What ``nvidia-smi`` says about the GPUs of this machine; needs neither torch nor CUDA."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

_FIELDS = (
    "name", "uuid", "driver_version", "power.limit", "power.default_limit",
    "clocks.max.sm", "clocks.applications.graphics", "clocks.default_applications.graphics",
    "memory.total", "memory.used",
)  # fmt: skip
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Gpu:
    """One GPU. Watts, MHz and MiB; None where the driver tells none."""

    name: str
    uuid: str
    driver: str
    power_limit_w: float | None
    default_power_limit_w: float | None
    max_clock_mhz: float | None
    set_clock_mhz: float | None
    default_clock_mhz: float | None
    memory_mib: float | None
    used_mib: float | None


def list_gpus() -> tuple[list[Gpu], str]:
    """The GPUs that nvidia-smi lists, and, if it lists none, why: one clause."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except FileNotFoundError:
        return [], "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({type(error).__name__})"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    gpus = [_parse(row) for row in rows if len(row) == len(_FIELDS)]
    if done.returncode or not gpus:
        said = " ".join((done.stdout + done.stderr).split())[:200].rstrip(".")
        return [], f"nvidia-smi lists no GPU ({said or 'it says nothing'})"
    return gpus, ""


def summary(gpus: list[Gpu]) -> str:
    """``2 x NVIDIA H100 80GB HBM3``."""
    names = list(dict.fromkeys(gpu.name for gpu in gpus))
    counts = [f"{sum(gpu.name == name for gpu in gpus)} x {name}" for name in names]
    return " and ".join(counts) or "no GPU"


def _parse(row: list[str]) -> Gpu:
    return Gpu(row[0], row[1], row[2], *(_number(cell) for cell in row[3:]))


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # [N/A], [Not Supported]
        return None
