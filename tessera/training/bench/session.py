"""A whole ``tessera bench``: ceilings first, then the ladder or, with ``quick``, a projection."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from tessera.experiment import Pretrain
from tessera.ledger.prices import HourlyPrice
from tessera.model import probe
from tessera.model.fused.attention import NAMES, available_backends
from tessera.model.peak import peak_flops
from tessera.training.bench.document import (
    Basis,
    Document,
    attention_entry,
    floor_entry,
    ladder_row,
    opening,
    product_entry,
    quick_row,
)
from tessera.training.bench.floor import Ceilings
from tessera.training.bench.ladder import (
    WARM_UP,
    Measured,
    Technique,
    best_of,
    measure,
    reason_of,
    same_as,
)
from tessera.training.bench.quick import WARM_UP as QUICK_WARM_UP
from tessera.training.bench.quick import depths, measure_quickly, with_micro_batch
from tessera.training.bench.runner import attention_of_training
from tessera.training.bench.tokens import Batches, samples_per_step
from tessera.training.prepare import be_deterministic, compute_dtype
from tessera.training.pretrain import model_shape

STEPS, QUICK_STEPS = 20, 5
_REPETITIONS, _QUICK_REPETITIONS = 20, 3
_PRODUCTS, _PRODUCTS8 = 15, 12

_LIBRARIES = tuple(name for name in NAMES if name != "math")

Told = Callable[[str, int, int], None]
"""What is being measured, and how much of how much is done."""


@dataclass(frozen=True)
class Subject:
    """What is measured, on which data, on which device and at which price."""

    experiment: Pretrain
    source: str
    batches: Batches
    device: torch.device
    device_name: str
    price: HourlyPrice


class _CtrlC:
    """Ctrl-C as something to look at between two units of work; a second one interrupts at once.

    An exception out of the blue can be lost: libraries swallow one that comes while they import or
    clean up.
    """

    def __init__(self) -> None:
        self._pressed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread can be told; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def look(self) -> None:
        """``KeyboardInterrupt`` if it was pressed."""
        if self._pressed:
            raise KeyboardInterrupt

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.look()
        self._pressed = True


class _Count:
    """How far it is."""

    def __init__(self, told: Told, ctrl_c: _CtrlC) -> None:
        self._told, self._what, self._ctrl_c = told, "", ctrl_c
        self.total = self._done = 0

    def begin(self, what: str, units: int = 0) -> None:
        """``what`` is being measured from now on, ``units`` of work more than were known."""
        self._ctrl_c.look()
        self._what, self.total = what, self.total + units
        self._told(what, self._done, self.total)

    def tick(self, what: str | None = None) -> None:
        """One unit is done."""
        self.reach(self._done + 1, what)

    def reach(self, done: int, what: str | None = None) -> None:
        """All units up to ``done`` are done, or will not be."""
        self._ctrl_c.look()
        self._done = done
        self._told(what or self._what, self._done, self.total)


class Bench:
    """Measures one subject; ``document`` holds what has been measured so far, at any moment."""

    def __init__(self, subject: Subject, told: Told, *, quick: bool = False) -> None:
        self._ctrl_c = _CtrlC()
        self._subject, self._count = subject, _Count(told, self._ctrl_c)
        self._experiment, self._device = subject.experiment, subject.device
        if self._experiment.deterministic:
            be_deterministic()
        self._dtype = compute_dtype(self._experiment.precision, self._device)
        self._basis = Basis(
            self._experiment,
            model_shape(self._experiment.model),
            torch.finfo(self._dtype).bits // 8,
            peak_flops(self._device, self._dtype),
            subject.price,
            attention_of_training(self._experiment, self._device, light=quick),
        )
        card = probe.describe_card(self._device, subject.device_name)
        self._rows: list[Measured] = []
        self.document: Document = opening(
            self._basis, subject.source, subject.batches.source, card, quick
        )

    def ladder(self, techniques: Sequence[Technique], steps: int) -> None:
        """Every technique in turn, ``steps`` measured steps each; Ctrl-C ends it early."""
        try:
            with self._ctrl_c.listening():
                self._ladder(techniques, steps)
        except KeyboardInterrupt:
            self.document["interrupted"] = True
        best = best_of(self._rows)
        self.document["best"] = best.technique.name if best else None

    def quick(self, steps: int) -> None:
        """The experiment's own settings, projected from few layers; Ctrl-C ends it early."""
        try:
            with self._ctrl_c.listening():
                self._quick(steps)
        except KeyboardInterrupt:
            self.document["interrupted"] = True

    def _ladder(self, techniques: Sequence[Technique], steps: int) -> None:
        each = WARM_UP + steps
        self._measure_ceilings(_REPETITIONS, others=True, rows=each * len(techniques))
        for left, technique in zip(reversed(range(len(techniques))), techniques, strict=True):
            self._count.begin(technique.name)
            row = self._measure(technique, techniques, steps)
            self._count.reach(self._count.total - each * left)
            self._rows.append(row)
            self.document["rows"].append(ladder_row(self._basis, row))

    def _measure(
        self, technique: Technique, techniques: Sequence[Technique], steps: int
    ) -> Measured:
        own = self._basis.own_attention
        if same := same_as(technique, techniques, own):
            return Measured(technique, None, None, None, f"{same} takes {own} anyway")
        return measure(
            technique, self._experiment, self._subject.batches, self._device, steps,
            self._count.tick,
        )  # fmt: skip

    def _quick(self, steps: int) -> None:
        experiment = with_micro_batch(self._experiment, self._device)
        measured = depths(experiment.model.layers, experiment.kept_in_bf16)
        each = (QUICK_WARM_UP + steps) * len(measured)
        self._measure_ceilings(_QUICK_REPETITIONS, others=False, rows=each)
        self._count.begin("training steps")
        projection, reason = measure_quickly(
            experiment, self._subject.batches, self._device, steps, self._count.tick
        )
        self._count.reach(self._count.total)
        self.document["rows"].append(quick_row(self._basis, experiment, projection, reason))
        if projection is not None:
            self.document["best"] = "experiment"

    # -- ceilings ----------------------------------------------------------------------------------

    def _measure_ceilings(self, repetitions: int, *, others: bool, rows: int) -> None:
        """Copy, products and attention; ``others``: attention by more than training's choice.

        ``rows``: units of work that follow.
        """
        shape, device, dtype = self._basis.shape, self._device, self._dtype
        size = self._experiment.batch.micro_batch
        batch = min(8, samples_per_step(self._experiment)) if size == "auto" else size
        tokens = batch * self._experiment.sequence
        missing = probe.float8_missing(device)
        if missing is None and (tokens % 16 or shape.d_model % 16):
            missing = "sizes are no multiples of 16"
        backends = self._backends(others)
        units = 1 + _PRODUCTS + (0 if missing else _PRODUCTS8) + len(backends)
        self._count.begin("copy", units + rows)
        found = self.document["ceilings"]
        found["copy_bytes_per_s"] = copy = probe.copy_speed(device, repetitions)
        self._count.tick()
        told = self._count.tick
        plain = probe.matrix_products(shape, tokens, dtype, device, repetitions, told)
        found["products"] = [product_entry(product) for product in plain]
        rates = probe.rates(plain)
        found["matrix_flops_per_s"] = dataclasses.asdict(rates)
        found["float8_missing"] = missing
        rates8 = None
        if missing is None:
            kind = torch.float8_e4m3fn
            eight = probe.matrix_products(shape, tokens, kind, device, repetitions, told)
            found["products"] += [product_entry(product) for product in eight]
            rates8 = probe.rates(eight)
            found["float8_flops_per_s"] = rates8.blocks
        speeds = []
        for name, reason in backends.items():
            self._count.begin(f"attention {name}")
            speed, why = (None, reason) if reason else self._attention(name, batch, repetitions)
            speeds += [speed] if speed else []
            found["attention"].append(attention_entry(name, speed, why))
            self._count.tick()
        self._basis.ceilings = Ceilings(copy, rates, rates8, speeds)
        for key, float8 in (("plain", False), ("float8", True)):
            self.document["floor"][key] = floor_entry(self._basis.floor(float8))

    def _backends(self, others: bool) -> dict[str, str | None]:
        """Attention backends to measure, or why not; torch's plain one only where nothing else."""
        own = self._basis.own_attention
        if not others:
            return {own: None}
        known = available_backends(self._device, self._dtype, self._basis.shape.head_dim)
        return {name: why for name, why in known.items() if name in (own, *_LIBRARIES)}

    def _attention(
        self, name: str, batch: int, repetitions: int
    ) -> tuple[probe.AttentionSpeed | None, str | None]:
        sequence, shape = self._experiment.sequence, self._basis.shape
        try:
            speed = probe.attention_speed(
                name, shape, batch, sequence, self._dtype, self._device, repetitions
            )
        except Exception as error:  # a library that is there may still fail on this card
            return None, reason_of(error)
        return speed, None
