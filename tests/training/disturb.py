"""Ways to disturb a training from inside: data that cannot be learnt from, a kill -9 on the spot.

A test installs them for a training in its own process; the launcher does so in a child, from an
order. The samples are what is bad, not a step: who
leaves them out meets them no more.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.model.loss import IGNORE
from tessera.runs import Rollback, Run
from tessera.training.checkpoint.saver import Saver
from tessera.training.fused import FusedReplica
from tessera.training.loop import Loop
from tessera.training.pretrain import PretrainProgram
from tessera.training.program import Program, StepBatch
from tessera.training.replica import Replica
from tessera.training.sft import SftProgram
from tests.training.simulated import Simulation

Setter = Callable[[Any, str, Any], None]
RARE = 1
"""Nothing is ever followed by this token, so a batch of it alone has a huge loss."""

PER_STEP = 8
"""Samples of a step of the tiny experiment."""
# At its usual learning rate the tiny run spikes by itself, at step 11.
CALM = (
    "optimizer.lr=0.005", "stability.window=16", "stability.sigma=20", "stability.max_skips=2",
)  # fmt: skip


def at(*steps: int) -> tuple[int, ...]:
    """The first samples of these steps (1-based) of a run that leaves nothing out."""
    return tuple((step - 1) * PER_STEP for step in steps)


@dataclass(frozen=True)
class Disturbance:
    """What is wrong.

    ``nan`` and ``spike`` are the first samples of steps whose loss is not a number, or huge. Before
    step ``die_before`` (1-based) of attempt ``die_in`` the process kills itself, once all that was
    to be saved is saved; with ``die_after_rollback`` it does so when it has decided to go back.
    Before step ``halt_before`` it stands still until it is told to stop: a run of milliseconds a
    step is interrupted in its middle however slow the store is.
    Every step takes ``step_s`` seconds longer, so that a fast machine too is met between two
    checkpoints. With ``keep_up`` every save is over before the next step: steps here take
    milliseconds, and which of the checkpoints a slow store gets would depend on the hour.
    ``simulated`` are the arguments of the ``Simulation`` that a launched process runs in.
    """

    nan: tuple[int, ...] = ()
    spike: tuple[int, ...] = ()
    die_before: int = 0
    die_in: int = 1
    die_after_rollback: bool = False
    keep_up: bool = False
    halt_before: int = 0
    step_s: float = 0.0
    simulated: dict[str, Any] | None = None

    def order(self) -> dict[str, Any]:
        """As JSON values for the launcher."""
        return asdict(self)

    def but(self, **changes: Any) -> Disturbance:
        """The same with something else."""
        return replace(self, **changes)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Trainings of this process meet it meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            self.install(patch.setattr)
            yield

    def install(self, set_: Setter) -> None:
        """Disturb every training of this process from now on."""
        if self.nan or self.spike:
            for kind in (PretrainProgram, SftProgram):
                self._poison(kind, set_)
            set_(Replica, "_local_loss", _with_nan(Replica._local_loss))
            set_(FusedReplica, "micro_step", _with_nan(FusedReplica.micro_step))
        if self.keep_up:
            set_(Saver, "save", and_finish(Saver.save))
        if self.simulated is not None:
            Simulation(**self.simulated).install(set_)
        if self.die_before:
            self._die_before_step(set_)
        if self.halt_before:
            self._halt_before_step(set_)
        if self.step_s:
            self._lengthen_steps(set_)
        if self.die_after_rollback:
            set_(Run, "publish_rollback", _then_die(Run.publish_rollback))

    def _poison(self, kind: type[Program], set_: Setter) -> None:
        plain = kind.batch

        def batch(program: Any, first: int) -> StepBatch:
            data: StepBatch = plain(program, first)
            if first not in self.nan and first not in self.spike:
                return data
            mark = RARE if first in self.spike else RARE + 1
            bad = [(i, torch.where(t == IGNORE, IGNORE, mark)) for i, t in data.micro]
            return replace(data, micro=bad)

        set_(kind, "batch", batch)

    def _die_before_step(self, set_: Setter) -> None:
        plain = Loop._step

        def step(loop: Loop, batch: StepBatch) -> bool:
            number = loop.session.attempt.number
            if loop.done + 1 == self.die_before and number == self.die_in:
                loop.saver.finish()
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(loop, batch)

        set_(Loop, "_step", step)

    def _halt_before_step(self, set_: Setter) -> None:
        plain = Loop._step

        def step(loop: Loop, batch: StepBatch) -> bool:
            while loop.done + 1 == self.halt_before and loop.session.stop.signal is None:
                time.sleep(0.01)
            return plain(loop, batch)

        set_(Loop, "_step", step)

    def _lengthen_steps(self, set_: Setter) -> None:
        plain = Loop._step

        def step(loop: Loop, batch: StepBatch) -> bool:
            time.sleep(self.step_s)
            return plain(loop, batch)

        set_(Loop, "_step", step)


UNDISTURBED = Disturbance()


def _with_nan(plain: Callable[..., Tensor]) -> Any:
    def local_loss(replica: Replica, inputs: Tensor, targets: Tensor, *given: Any) -> Tensor:
        loss = plain(replica, inputs, targets, *given)
        bad = bool(((targets == IGNORE) | (targets == RARE + 1)).all())
        return loss * float("nan") if bad else loss

    return local_loss


def and_finish(plain: Callable[..., bool]) -> Callable[..., bool]:
    """``Saver.save`` that waits until everything is written and uploaded."""

    def save(saver: Saver, *arguments: Any) -> bool:
        taken = plain(saver, *arguments)
        saver.finish()
        return taken

    return save


def _then_die(plain: Callable[[Run, Rollback], None]) -> Any:
    def publish_rollback(run: Run, rollback: Rollback) -> None:
        plain(run, rollback)
        os.kill(os.getpid(), signal.SIGKILL)

    return publish_rollback
