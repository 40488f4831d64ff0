"""What the loop asks of a training program; ``pretrain`` and ``sft`` each answer in a page."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tessera.evaluation.fixed import Scorer
from tessera.experiment import Experiment
from tessera.ledger.budget import Plan
from tessera.model.protogpt import ProtoGPT
from tessera.runs import Attempt, Run
from tessera.training.parallel import World


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of an optimiser step: micro-batches of (inputs, targets), (B, T) int64 each.

    ``tokens`` go through the model on all ranks together (padding not counted), ``targets`` of them
    count in the loss. Every rank has the same number of micro-batches.
    """

    micro: list[tuple[Tensor, Tensor]]
    tokens: int
    targets: int


class Program(ABC):
    """One kind of training: its model, its data, when to evaluate, what to publish."""

    experiment: Experiment
    model: ProtoGPT
    trainable: dict[str, nn.Parameter]
    plan: Plan
    """Where the training ends; where a budget ends it the loop moves it, on every rank alike."""
    evaluates_every: int
    """Steps between two evaluations."""
    samples_per_step: int
    micro_batch: int
    world: World
    device: torch.device
    compute_dtype: torch.dtype
    flops_per_token: int
    fused = False
    """Whether the fused operations compute the steps instead of torch under autograd."""

    @abstractmethod
    def batch(self, first: int) -> StepBatch:
        """The step's data from global sample ``first`` on; a pure function, called from a thread.

        ``first`` is a multiple of ``samples_per_step``.
        """

    @abstractmethod
    def dummy(self, size: int) -> tuple[Tensor, Tensor]:
        """A micro-batch of ``size`` sequences as long as they come: (size, T) inputs, targets."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training by the present plan."""
        return self.plan.end_step

    @property
    def samples_per_rank(self) -> int:
        """Sequences of one optimiser step on one rank."""
        return -(-self.samples_per_step // self.world.size)

    @abstractmethod
    def evaluates_after(self, done: int) -> bool:
        """Whether to evaluate once ``done`` steps are done (0: before the first)."""

    @abstractmethod
    def evaluate(self, done: int, score: Scorer) -> dict[str, float]:
        """The evaluation's figures, under the journal's names; every rank calls it."""

    @abstractmethod
    def publishes_after(self, done: int) -> bool:
        """Whether something for others is due once ``done`` steps are done."""

    @abstractmethod
    def publish(
        self, run: Run, attempt: Attempt, done: int, weights: dict[str, Tensor]
    ) -> tuple[str, dict[str, Any]]:
        """Publish it; returns the key and the details of its journal event.

        ``weights`` are those of the whole model, float32 on the CPU, under the model's names.
        """

    @abstractmethod
    def estimate_bytes(self, size: int) -> int:
        """Peak memory of a training step in micro-batches of ``size``, by arithmetic."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and threads."""


class Prefetcher:
    """Prepares the next step's data in a thread while the device works on the present one.

    ``first_sample`` says where a step (0-based) begins; a pure function.
    """

    def __init__(self, program: Program, step: int, first_sample: Callable[[int], int]) -> None:
        self._program, self._first_sample = program, first_sample
        self._next: Future[StepBatch] = self._order(step)

    def take(self, step: int, give_up: Callable[[], bool] = lambda: False) -> StepBatch | None:
        """The data of ``step``; steps are taken one after the other.

        None if ``give_up`` says so while a slow store is waited for.
        """
        while not wait((self._next,), timeout=0.1).done:
            if give_up():
                return None
        batch = self._next.result()
        if step + 1 < self._program.steps:
            self._next = self._order(step + 1)
        return batch

    def _order(self, step: int) -> Future[StepBatch]:
        """A daemon thread a step: leaving the process must not wait for a store that hangs."""
        order: Future[StepBatch] = Future()
        first = self._first_sample(step)

        def load() -> None:
            try:
                order.set_result(self._program.batch(first))
            except BaseException as error:
                order.set_exception(error)

        threading.Thread(target=load, name="loader", daemon=True).start()
        return order


def compiles(program: Program) -> bool:
    """Whether the blocks are compiled: as the experiment says, ``auto`` meaning on a GPU.

    Under autograd, that is; the fused operations are their own.
    """
    if program.fused:
        return False
    setting = program.experiment.compile
    return setting == "on" or (setting == "auto" and program.device.type == "cuda")
