from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tessera.tracking.history import read_history
from tessera.training import samples
from tessera.training.nvml import Gpu
from tessera.training.samples import sampled

if TYPE_CHECKING:
    from tests.training.conftest import Bench

CPU = torch.device("cpu")


class Book:
    """What a journal was given."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def metric(self, key: str, value: float, step: int) -> None:
        self.points.append((key, value, step))


def until(reached: Any) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_machine_is_looked_at_at_the_step_that_is_done() -> None:
    book: Any = Book()
    done = [7]
    with sampled(CPU, book, lambda: done[0], every_s=0.02):
        until(lambda: len(book.points) >= 3)
        done[0] = 8
        until(lambda: any(step == 8 for _, _, step in book.points))
    names = {key for key, _, _ in book.points}
    assert names == {"system/cpu_percent", "system/memory_percent", "system/process_gib"}
    assert {step for _, _, step in book.points} == {7, 8}
    assert all(value > 0 for key, value, _ in book.points if key != "system/cpu_percent")
    time.sleep(0.1)
    count = len(book.points)
    time.sleep(0.1)
    assert len(book.points) == count


def test_a_machine_that_cannot_be_read_is_nobodys_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    book: Any = Book()
    tries = threading.Event()

    def fail(self: Any) -> dict[str, float]:
        tries.set()
        raise OSError("no /proc here")

    monkeypatch.setattr(samples.Machine, "read", fail)
    with sampled(CPU, book, lambda: 1, every_s=0.01):
        assert tries.wait(10)
    assert book.points == []


def test_without_a_driver_there_are_no_figures_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: (_ for _ in ()).throw(OSError("not found")))
    assert Gpu("GPU-0").read() == {}


def test_a_run_has_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_HEARTBEAT_S", "0.05")
    assert bench.train("log_every_steps=1").exit_code == 0
    points = read_history(bench.runs()[0]).points
    assert any(point.key == "system/cpu_percent" for point in points)


class Driver:
    """What ``libnvidia-ml.so.1`` looks like from here; power is not told."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:  # noqa: N802
        return int(name != b"GPU-11")

    def nvmlDeviceGetUtilizationRates(self, handle: Any, load: Any) -> int:  # noqa: N802
        load._obj.gpu = 93
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.used = 3 << 30
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: Any, power: Any) -> int:  # noqa: N802
        return 3  # not supported

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, heat: Any) -> int:  # noqa: N802
        heat._obj.value = 61
        return 0


def test_figures_that_a_driver_does_not_tell_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: Driver())
    assert Gpu("11").read() == {"gpu_percent": 93, "gpu_memory_gib": 3, "gpu_celsius": 61}
    assert Gpu("GPU-12").read() == {}
