"""What the loop asks of a training program; ``pretrain`` and ``sft`` each answer in a page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tessera.experiment import Experiment
from tessera.model.protogpt import ProtoGPT
from tessera.runs import Run


@dataclass(frozen=True)
class StepBatch:
    """One optimiser step: micro-batches of (inputs, targets), each (B, T) int64.

    ``tokens`` went through the model (padding not counted), ``targets`` of them count in the loss.
    """

    micro: list[tuple[Tensor, Tensor]]
    tokens: int
    targets: int


class Program(ABC):
    """One kind of training: its model, its data, when to evaluate, what to publish."""

    experiment: Experiment
    model: ProtoGPT
    trainable: dict[str, nn.Parameter]
    steps: int
    device: torch.device
    compute_dtype: torch.dtype
    flops_per_token: int

    @abstractmethod
    def batch(self, step: int) -> StepBatch:
        """The data of optimiser step ``step`` (0-based); a pure function, called from a thread."""

    @abstractmethod
    def evaluates_after(self, done: int) -> bool:
        """Whether to evaluate once ``done`` steps are done (0: before the first)."""

    @abstractmethod
    def evaluate(self, done: int) -> dict[str, float]:
        """The evaluation's figures, under the journal's names."""

    @abstractmethod
    def publishes_after(self, done: int) -> bool:
        """Whether something for others is due once ``done`` steps are done."""

    @abstractmethod
    def publish(self, run: Run, done: int) -> tuple[str, dict[str, Any]]:
        """Publish it; returns the key and the details of its journal event."""


class Prefetcher:
    """Prepares the next step's data in a thread while the device works on the present one."""

    def __init__(self, program: Program, first: int) -> None:
        self._program = program
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._next: Future[StepBatch] = self._pool.submit(program.batch, first)

    def take(self, step: int) -> StepBatch:
        """The data of ``step``; steps are taken one after the other."""
        batch = self._next.result()
        if step + 1 < self._program.steps:
            self._next = self._pool.submit(self._program.batch, step + 1)
        return batch

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
