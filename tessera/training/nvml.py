"""One GPU's load, memory, power and temperature, from the driver's own library (NVML).

Through ctypes, since the few calls need no package: ``libnvidia-ml.so.1`` comes with the driver.
Where it does not, or refuses a question, there are fewer figures, and never an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_TEMPERATURE_OF_GPU = 0


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong),
    )  # fmt: skip


class Gpu:
    """The GPU with this UUID (``torch.cuda.get_device_properties(device).uuid``)."""

    def __init__(self, uuid: str) -> None:
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            name = (uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}").encode()
            ok = not library.nvmlInit_v2()
            if ok and not library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._handle)):
                self._library = library
        except (OSError, AttributeError):
            pass  # no driver, or one without these calls

    def read(self) -> dict[str, float]:
        """Load in percent, used memory in GiB, power in W, temperature in degrees Celsius."""
        if self._library is None:
            return {}
        load, memory = _Utilization(), _Memory()
        power, heat = ctypes.c_uint(), ctypes.c_uint()
        sensor = ctypes.c_uint(_TEMPERATURE_OF_GPU)
        asked: tuple[tuple[str, str, tuple[Any, ...], Callable[[], float]], ...] = (
            ("gpu_percent", "nvmlDeviceGetUtilizationRates", (load,), lambda: float(load.gpu)),
            ("gpu_memory_gib", "nvmlDeviceGetMemoryInfo", (memory,), lambda: memory.used / 2**30),
            ("gpu_watts", "nvmlDeviceGetPowerUsage", (power,), lambda: power.value / 1000),
            ("gpu_celsius", "nvmlDeviceGetTemperature", (sensor, heat), lambda: float(heat.value)),
        )
        found = {}
        for key, call, (*given, answer), value in asked:
            function = getattr(self._library, call, None)
            if function is not None and not function(self._handle, *given, ctypes.byref(answer)):
                found[key] = value()
        return found
