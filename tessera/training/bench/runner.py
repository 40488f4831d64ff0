"""One technique's training steps: model, replica and optimiser as an attempt builds them.

The steps are those of ``loop.Loop`` without what a loop does between steps: micro-batches through
``Replica.micro_step``, clip, judge, optimiser, zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from tessera.experiment import Pretrain
from tessera.ledger.budget import OPEN
from tessera.model.fused.attention import choose_backend
from tessera.model.loss import summed_cross_entropy
from tessera.model.probe import Stopwatch
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import training_memory
from tessera.training.bench.tokens import Batches, samples_per_step
from tessera.training.checkpoint.state import allocate_moments
from tessera.training.fused import FusedReplica, attention_backend, wants_fused
from tessera.training.memory import resolve_micro_batch
from tessera.training.optim import set_learning_rate
from tessera.training.parallel import World
from tessera.training.prepare import compute_dtype
from tessera.training.pretrain import model_shape
from tessera.training.replica import Loss, Replica
from tessera.training.schedule import learning_rate
from tessera.training.stability import Watch


@dataclass(frozen=True)
class Timing:
    """Seconds of each measured step, of the first (with all compiling), and peak bytes if known.

    ``attention`` is the backend that the fused operations took; None where torch computed.
    """

    seconds: list[float]
    first_s: float
    peak_bytes: int | None
    losses: list[float]
    attention: str | None = None


class StepRunner:
    """Takes optimiser steps of one experiment on one device."""

    def __init__(
        self,
        experiment: Pretrain,
        device: torch.device,
        convert: Callable[[ProtoGPT], object] | None = None,
    ) -> None:
        """``convert`` changes the new model in place before anything is built around it.

        Raises ``InputError`` or ``ValueError``, a sentence, for what does not run here, and
        ``torch.OutOfMemoryError``.
        """
        self._experiment, self._device = experiment, device
        self._world = _alone(device)
        dtype = compute_dtype(experiment.precision, device)
        fused = is_fused(experiment, device)
        model = _model(experiment, device)
        if convert is not None:
            convert(model)
        loss: Loss = summed_cross_entropy
        compiled = experiment.compile == "on" or (
            experiment.compile == "auto" and device.type == "cuda"
        )
        if compiled and not fused:
            for block in model.blocks:
                block.compile()
            loss = torch.compile(summed_cross_entropy)
        model.train()
        self.replica: Replica
        if fused:
            self.replica = FusedReplica(model, self._world, dtype, loss, experiment)
        else:
            self.replica = Replica.build(model, "auto", self._world, dtype, loss)
        self._optimizer = self.replica.optimizer(experiment.optimizer)
        allocate_moments(self.replica.trainable, self._optimizer)
        self._watch = Watch(experiment.stability, device)
        self._steps = max(1, experiment.steps or OPEN)
        self._divisor = experiment.batch.tokens_per_step
        self._done = 0
        self.micro_batch = self._choose_micro_batch()

    def step(self, batches: Batches) -> None:
        """The next optimiser step; the host does not wait for the device."""
        settings = self._experiment.optimizer
        lr = learning_rate(self._experiment.schedule, settings.lr, self._done, self._steps)
        set_learning_rate(self._optimizer, lr)
        micro = batches.micro_batches(self._done, self.micro_batch)
        total = torch.zeros((), device=self._device)
        for number, (inputs, targets) in enumerate(micro, 1):
            inputs = inputs.to(self._device, non_blocking=True)
            targets = targets.to(self._device, non_blocking=True)
            total += self.replica.micro_step(inputs, targets, self._divisor, number == len(micro))
        norm = self.replica.clip(settings.clip_norm)
        bad = self._watch.judge(self._done + 1, total, norm)
        self.replica.apply(self._optimizer, bad)
        self._done += 1

    def time(
        self, batches: Batches, steps: int, warm_up: int, ticked: Callable[[], None]
    ) -> Timing:
        """``warm_up`` steps, then ``steps`` measured ones; ``ticked`` after each.

        The first pass over the model compiles whatever is compiled. Raises ``RuntimeError`` if the
        steps computed something that is not a number: such a figure says nothing.
        """
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        first = Stopwatch(self._device)
        first.mark()
        watch = Stopwatch(self._device)
        for number in range(warm_up + steps):
            if number == warm_up:
                watch.mark()
            self.step(batches)
            if number >= warm_up:
                watch.mark()
            if number == 0:
                first.mark()
            ticked()
        seconds = watch.intervals()
        losses = [verdict.loss for verdict in self._watch.read()]
        if not all(math.isfinite(loss) for loss in losses):
            raise RuntimeError("the loss is not a number")
        peak = None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        attention = self.replica.attention if isinstance(self.replica, FusedReplica) else None
        return Timing(seconds, first.intervals()[0], peak, losses, attention)

    def _choose_micro_batch(self) -> int:
        experiment, device = self._experiment, self._device

        def step(size: int) -> None:
            ids = torch.zeros(size, experiment.sequence, dtype=torch.int64, device=device)
            self.replica.micro_step(ids, ids, 1, last=False)

        return resolve_micro_batch(
            experiment.batch.micro_batch,
            samples=samples_per_step(experiment),
            step=step,
            device=device,
            estimate=lambda size: estimate_bytes(experiment, size, device),
            remembered=None,
            release=self.replica.discard,
        ).size


def is_fused(experiment: Pretrain, device: torch.device) -> bool:
    """Whether the fused operations compute the experiment's steps on ``device``."""
    return wants_fused(experiment, _alone(device))


def estimate_bytes(experiment: Pretrain, size: int, device: torch.device) -> int:
    """Peak memory of a step in micro-batches of ``size``, by arithmetic."""
    low = compute_dtype(experiment.precision, device) != torch.float32
    shape = model_shape(experiment.model)
    return sum(training_memory(shape, size, low, experiment.sequence).values())


def _alone(device: torch.device) -> World:
    return World(0, 1, 0, 1, device)


def _model(experiment: Pretrain, device: torch.device) -> ProtoGPT:
    """With the weights that training draws."""
    model = ProtoGPT.unset(model_shape(experiment.model))
    model.initialize(experiment.seed, experiment.model.init_std)
    model.to(device)
    model.recompute = experiment.recompute
    return model


def attention_of_training(experiment: Pretrain, device: torch.device, *, light: bool) -> str:
    """The attention backend of the fused operations, as the experiment has it.

    ``light``: where torch computes the steps, without flash4, whose import takes seconds. Raises
    ``InputError`` if the experiment names one that cannot be used on ``device``.
    """
    dtype = compute_dtype(experiment.precision, device)
    if not light or is_fused(experiment, device):
        return attention_backend(experiment, device, dtype).name
    for name in ("cudnn", "flash"):
        with suppress(ValueError):
            return choose_backend(name, device, dtype, model_shape(experiment.model).head_dim).name
    return "math"
