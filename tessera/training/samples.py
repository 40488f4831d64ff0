"""How busy the machine is: a thread that looks now and then and writes ``system/...`` points.

    cpu_percent, memory_percent    of the whole machine
    process_gib                    resident memory of this process
    gpu_percent, gpu_memory_gib, gpu_watts, gpu_celsius    of this worker's GPU, where there is one

It looks as often as the journal is uploaded, at the step that is done by then. It never holds the
loop up and never raises into it. MLflow's own monitor is not used: its thread ends for good at the
first call that fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from tessera.tracking.journal import Journal, heartbeat_s
from tessera.training.nvml import Gpu

_LAST_S = 1.0


class Machine:
    """Reads the figures; the first ``cpu_percent`` is since this was made."""

    def __init__(self, device: torch.device) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent(None)
        self._gpu: Gpu | None = None
        if device.type == "cuda":
            self._gpu = Gpu(str(torch.cuda.get_device_properties(device).uuid))

    def read(self) -> dict[str, float]:
        """The figures of now, by name."""
        return {
            "cpu_percent": psutil.cpu_percent(None),
            "memory_percent": psutil.virtual_memory().percent,
            "process_gib": self._process.memory_info().rss / 2**30,
            **(self._gpu.read() if self._gpu else {}),
        }


@contextmanager
def sampled(
    device: torch.device,
    journal: Journal,
    step: Callable[[], int],
    every_s: float | None = None,
) -> Iterator[None]:
    """While this lasts, write the machine's figures every so many seconds (None: a heartbeat)."""
    over = threading.Event()
    every = heartbeat_s() if every_s is None else every_s

    def keep_sampling() -> None:
        try:
            machine = Machine(device)
        except Exception:  # a container without /proc, say: training goes on
            return
        while not over.wait(every):
            try:
                at, found = step(), machine.read()
                for name, value in found.items():
                    if not over.is_set():
                        journal.metric(f"system/{name}", value, at)
            except Exception:
                continue

    thread = threading.Thread(target=keep_sampling, name="samples", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_LAST_S)  # no record may follow the journal's last
