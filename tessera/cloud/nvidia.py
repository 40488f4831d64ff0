"""What ``nvidia-smi`` says about the GPUs of this machine; needs neither torch nor CUDA."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_FIELDS = (
    "name", "uuid", "driver_version", "memory.total", "power.limit", "power.default_limit",
    "clocks.max.sm",
)  # fmt: skip
_CLOCKS = ("clocks.applications.graphics", "clocks.default_applications.graphics")
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Gpu:
    """One GPU. MiB, watts and MHz; None where the driver tells none.

    ``set_clock_mhz`` is what its owner lets it run at, ``default_clock_mhz`` what the maker does.
    """

    name: str
    uuid: str
    driver: str
    memory_mib: float | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    max_clock_mhz: float | None = None
    set_clock_mhz: float | None = None
    default_clock_mhz: float | None = None


def list_gpus() -> tuple[list[Gpu], str]:
    """The GPUs that nvidia-smi lists, and, if it lists none, why: one clause."""
    rows, reason = _query(_FIELDS)
    if not rows:
        return [], reason
    # Not every driver knows these, and one that is asked for what it does not know tells nothing.
    clocks, _ = _query(_CLOCKS)
    if len(clocks) != len(rows):
        clocks = [["", ""] for _ in rows]
    gpus = [
        Gpu(row[0], row[1], row[2], *(_number(cell) for cell in (*row[3:], *more)))
        for row, more in zip(rows, clocks, strict=True)
    ]
    return gpus, ""


def summary(gpus: Sequence[Gpu]) -> str:
    """``2 x NVIDIA H100 80GB HBM3``."""
    names = list(dict.fromkeys(gpu.name for gpu in gpus))
    counts = [f"{sum(gpu.name == name for gpu in gpus)} x {name}" for name in names]
    return " and ".join(counts) or "no GPU"


def _query(fields: Sequence[str]) -> tuple[list[list[str]], str]:
    """A row of cells for each GPU; none, and why, where nvidia-smi does not answer with that."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except FileNotFoundError:
        return [], "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({type(error).__name__})"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(fields)]
    if done.returncode or not rows:
        said = " ".join((done.stdout + done.stderr).split())[:200].rstrip(".")
        return [], f"nvidia-smi lists no GPU ({said or 'it says nothing'})"
    return rows, ""


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # [N/A], [Not Supported]
        return None
