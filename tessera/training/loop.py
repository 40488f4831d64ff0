"""The one training loop, for any ``Program``.

Order of a step: take the data, forward and backward in micro-batches, clip, step the optimiser.
Then, where due: evaluate, publish what the program publishes, checkpoint. An evaluation comes
before the checkpoint of the same step, so that what a checkpoint covers includes it.

The host looks at the device only when something is due (a log point, an evaluation, a
checkpoint): losses are summed on the device in between, so that a GPU never waits for a print. At
each such point a loss that is not a number ends the run before anything is published from it, and
so do weights that are not numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tessera.errors import DivergedError, StoreError
from tessera.ledger.forecast import forecast
from tessera.model.loss import summed_cross_entropy
from tessera.model.peak import Peak
from tessera.runs import Attempt, Run
from tessera.storage import Root
from tessera.tracking.journal import Journal
from tessera.training.checkpoint import guard_publication, save_checkpoint, training_state
from tessera.training.clock import SpanClock
from tessera.training.cost import RunningCost
from tessera.training.optim import set_learning_rate
from tessera.training.program import Prefetcher, Program, StepBatch
from tessera.training.progress import ProgressLine, Standing
from tessera.training.schedule import learning_rate


@dataclass
class StopRequest:
    """Set from a signal handler: finish the step, save, leave."""

    signal: str | None = None


@dataclass
class Session:
    """What one attempt works with."""

    root: Root
    run: Run
    attempt: Attempt
    journal: Journal
    line: ProgressLine
    peak: Peak
    stop: StopRequest


@dataclass
class _Interval:
    """What has happened since the last log point: the sum of the losses, and how fast it went.

    Loss and steps travel with a checkpoint, so that the mean at the next log point is the one of an
    undisturbed run; the clock starts anew with each attempt and after a compilation.
    """

    loss: Tensor
    steps: int = 0
    timed_steps: int = 0
    timed_tokens: int = 0
    since: float = field(default_factory=time.monotonic)

    def restart_clock(self) -> None:
        """What came before does not count as speed."""
        self.timed_steps = self.timed_tokens = 0
        self.since = time.monotonic()


class Loop:
    """Trains a program from step ``done`` to its end; ``run`` returns the last step reached."""

    def __init__(
        self,
        session: Session,
        program: Program,
        optimizer: torch.optim.Optimizer,
        *,
        done: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """``state`` is what the checkpoint of step ``done`` recorded beside its tensors."""
        self._s, self._program, self._optimizer = session, program, optimizer
        self._experiment = program.experiment
        self.done, self.tokens = done, int(state["tokens"]) if state else 0
        self.saved_at = done
        self._compiles = compiles(program)
        # Compiled, the soft-max needs no float32 copy of the logits: 4 GB a micro-batch at 1B.
        self._loss = torch.compile(summed_cross_entropy) if self._compiles else summed_cross_entropy
        self._clock = SpanClock(session.journal)
        self._cost = RunningCost(session.run, session.attempt)
        self._interval = self._fresh_interval()
        if state:
            self._interval.loss += state["interval"]["loss"]
            self._interval.steps = int(state["interval"]["steps"])
        self._grad_norm: Tensor | None = None
        self._began, self._began_at = time.monotonic(), done

    def run(self) -> int:
        """Train until the last step or a stop request; everything due is published on the way."""
        self._s.journal.span("setup", time.time() - self._s.attempt.started_at, self.done)
        if self.done == 0:
            self._evaluate_if_due()
        data = Prefetcher(self._program, self.done) if self.done < self._program.steps else None
        first = True
        try:
            while data is not None and self.done < self._program.steps and not self._s.stop.signal:
                with self._clock.filing("data_wait"):
                    batch = data.take(self.done)
                if first and self._compiles:
                    with self._clock.filing("compile"):
                        self._step(batch)
                        self._settle()
                    self._interval.restart_clock()
                    self._began, self._began_at = time.monotonic(), self.done
                else:
                    self._step(batch)
                first = False
                self._after_step()
        finally:
            if data is not None:
                data.close()
        if self._s.stop.signal and self.saved_at < self.done < self._program.steps:
            self._save()
        self._clock.report(self.done)
        return self.done

    # -- one step --------------------------------------------------------------------------------

    def _step(self, batch: StepBatch) -> None:
        program, settings = self._program, self._experiment.optimizer
        lr = learning_rate(self._experiment.schedule, settings.lr, self.done, program.steps)
        set_learning_rate(self._optimizer, lr)
        total = torch.zeros((), device=program.device)
        for inputs, targets in batch.micro:
            inputs = inputs.to(program.device, non_blocking=True)
            targets = targets.to(program.device, non_blocking=True)
            states = program.model.hidden(inputs, program.compute_dtype)
            loss = self._loss(states, program.model.tokens.weight, targets)
            loss = loss / batch.targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._grad_norm = torch.nn.utils.clip_grad_norm_(
            list(program.trainable.values()), settings.clip_norm
        )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.tokens += batch.tokens
        self._interval.loss += total
        self._interval.steps += 1
        self._interval.timed_steps += 1
        self._interval.timed_tokens += batch.tokens
        self._lr = lr

    def _after_step(self) -> None:
        last = self.done == self._program.steps
        if last or self.done % self._experiment.log_every_steps == 0:
            self._log()
        self._evaluate_if_due()
        self._publish_if_due()
        if not last and self.done % self._experiment.checkpoint.every_steps == 0:
            self._save()

    # -- what is due -----------------------------------------------------------------------------

    def _settle(self) -> float:
        """Wait for the device; the mean loss since the last log point, which must be a number."""
        loss = float(self._interval.loss) / max(1, self._interval.steps)
        if not math.isfinite(loss):
            raise self._diverged(f"The loss became {loss}")
        return loss

    def _require_finite_weights(self) -> None:
        """A step may break the weights though its loss was a number; then nothing is published."""
        weights = self._program.trainable.values()
        if not bool(torch.stack([weight.isfinite().all() for weight in weights]).all()):
            raise self._diverged("The weights are no longer finite")

    def _diverged(self, what: str) -> DivergedError:
        self._s.journal.event("run/diverged", self.done, reason=what)
        return DivergedError(
            f"{what} at step {self.done} of run {self._s.run.id}; lower optimizer.lr or "
            "optimizer.clip_norm and start again with --new."
        )

    def _log(self) -> None:
        loss = self._settle()
        self._clock.report(self.done)
        interval, journal, step = self._interval, self._s.journal, self.done
        usd = self._cost.usd()
        journal.metric("train/loss", loss, step)
        journal.metric("train/lr", self._lr, step)
        journal.metric("train/grad_norm", float(self._grad_norm), step)  # type: ignore[arg-type]
        journal.metric("progress/tokens", self.tokens, step)
        if self._program.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._program.device) / 2**30
            journal.metric("system/gpu_peak_gib", peak, step)
        if usd is not None:
            journal.metric("cost/usd", usd, step)
        if interval.timed_steps:
            self._show_speed(interval, loss, usd)
        self._interval = self._fresh_interval()

    def _show_speed(self, interval: _Interval, loss: float, usd: float | None) -> None:
        journal, step = self._s.journal, self.done
        elapsed = time.monotonic() - interval.since
        speed = interval.timed_tokens / elapsed
        mfu = self._program.flops_per_token * speed / self._s.peak.flops
        journal.metric("train/tokens_per_s", speed, step)
        journal.metric("train/mfu", mfu, step)
        ahead = forecast(
            steps_left=self._program.steps - step,
            # Wall time: evaluations and checkpoints to come cost as much as those so far.
            seconds_per_step=(time.monotonic() - self._began) / (step - self._began_at),
            usd_so_far=usd,
            usd_per_hour=self._s.attempt.usd_per_hour,
        )
        self._s.line.show(
            Standing(
                step, self._program.steps, loss, speed, mfu, usd, ahead.seconds_left,
                ahead.usd_at_end,
            )
        )  # fmt: skip

    def _evaluate_if_due(self) -> None:
        if not self._program.evaluates_after(self.done):
            return
        self._settle()
        with self._clock.filing("evaluate"), self._aside():
            figures = self._program.evaluate(self.done)
        for key, value in figures.items():
            self._s.journal.metric(key, value, self.done)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
        self._s.line.say(f"step {self.done}  {shown}")

    def _publish_if_due(self) -> None:
        if not self._program.publishes_after(self.done):
            return
        self._settle()
        self._require_finite_weights()
        with self._clock.filing("checkpoint"), self._aside():
            guard_publication(self._s.run, self._s.attempt)
            key, details = self._program.publish(self._s.run, self.done)
        self._s.journal.event(key, self.done, **details)

    def _save(self) -> None:
        self._settle()
        self._require_finite_weights()
        with self._clock.filing("checkpoint"), self._aside():
            try:
                save_checkpoint(
                    self._s.run,
                    self._s.attempt,
                    self._s.journal,
                    step=self.done,
                    tensors=training_state(self._program.trainable, self._optimizer),
                    state=self._state(),
                    keep=self._experiment.checkpoint.keep,
                )
            except StoreError as error:
                # A full disk or a store that is down costs a checkpoint, not the run.
                self._s.journal.event("checkpoint/failed", self.done, reason=str(error))
                self._s.line.say(f"no checkpoint at step {self.done}: {error}")
                return
        self.saved_at = self.done
        self._clock.report(self.done)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint records beside its tensors; a float32 survives JSON to the last bit."""
        interval = {"loss": float(self._interval.loss), "steps": self._interval.steps}
        fingerprint = self._s.run.record.fingerprint
        return {"tokens": self.tokens, "fingerprint": fingerprint, "interval": interval}

    # -- small things ----------------------------------------------------------------------------

    def _fresh_interval(self) -> _Interval:
        return _Interval(torch.zeros((), device=self._program.device))

    def _aside(self) -> _Aside:
        return _Aside(self._interval)


class _Aside:
    """Time spent here is not training time of the interval's speed."""

    def __init__(self, interval: _Interval) -> None:
        self._interval = interval

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._interval.since += time.monotonic() - self._entered


def compiles(program: Program) -> bool:
    """Whether the blocks are compiled: as the experiment says, ``auto`` meaning on a GPU."""
    setting = program.experiment.compile
    return setting == "on" or (setting == "auto" and program.device.type == "cuda")
