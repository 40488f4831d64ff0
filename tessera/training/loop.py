"""The one training loop, for any ``Program``.

Order of a step: take the data, forward and backward in micro-batches, clip, judge, step the
optimiser unless the judgement forbids it. Then, where due: log, evaluate, publish what the program
publishes, save. An evaluation comes before the save of the same step, so that what a checkpoint
covers includes it.

The host looks at the device only when something is due (a log point, an evaluation, a save):
losses are summed and spikes are judged on the device in between, so that a GPU never waits for a
print. Whether the run goes back is decided at log points alone: where a preemption saves cannot
change it.

With several ranks all of them run this loop; rank 0 keeps the journal and publishes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tessera.errors import DivergedError
from tessera.evaluation.fixed import scorer
from tessera.experiment import Pretrain
from tessera.ledger.pace import Pace
from tessera.training.budget import BudgetKeeper, Recorded
from tessera.training.checkpoint.fetch import Loaded
from tessera.training.checkpoint.publish import guard_publication
from tessera.training.checkpoint.saver import Saver
from tessera.training.checkpoint.state import training_state
from tessera.training.clock import SpanClock
from tessera.training.cost import RunningCost
from tessera.training.downloads import count_downloads
from tessera.training.interval import Interval
from tessera.training.optim import set_learning_rate
from tessera.training.outlook import Outlook
from tessera.training.parallel import reporting_lost_peers
from tessera.training.program import Prefetcher, Program, StepBatch, compiles
from tessera.training.progress import standing
from tessera.training.replica import Replica
from tessera.training.schedule import planned_rate
from tessera.training.stability import Skips, Watch, mean_of_applied
from tessera.training.workplace import Session


class Loop:
    """Trains a program from step ``done`` to its end; ``run`` returns the last step reached."""

    def __init__(
        self,
        session: Session,
        program: Program,
        replica: Replica,
        optimizer: torch.optim.Optimizer,
        *,
        skips: Skips,
        watch: Watch,
        loaded: Loaded | None = None,
        recorded: Recorded | None = None,
    ) -> None:
        """``loaded`` is the checkpoint whose tensors were restored; None at the very start.

        ``recorded`` is what was planned beyond it already, in a run that a budget ends.
        """
        done, state = (loaded.ref.step, loaded.state) if loaded else (0, None)
        self.session = session
        self._s, self._program, self._replica = session, program, replica
        self._optimizer = optimizer
        self._experiment = program.experiment
        self.done = self._began_at = done
        self.tokens = int(state["tokens"]) if state else 0
        self.skips, self._watch = skips, watch
        self._compiles = compiles(program) or (program.fused and program.device.type == "cuda")
        self._clock = SpanClock(session.journal)
        cost_of, self._now = session.instruments.cost_of, session.instruments.clock
        self._cost = cost_of(session.run, session.attempt) if session.world.is_main else None
        self._interval = Interval.fresh(program.device, self._now)
        self._pace = Pace()
        if state:
            self._interval.loss += state["interval"]["loss"]
            self._interval.applied += state["interval"]["applied"]
        self.saver = Saver(
            session.run, session.attempt, session.journal, session.world,
            self._experiment.checkpoint, session.line.say, loaded,
            self._cost.add_traffic if self._cost else None,
        )  # fmt: skip
        self._grad_norm: Tensor | None = None
        self._lr = 0.0
        self.budget = self._keeper(recorded or Recorded())
        self._outlook = Outlook(
            program, session.attempt, self._pace, self._now, (state or {}).get("forecast")
        )

    @property
    def cost(self) -> RunningCost | None:
        """What the run costs so far; None but on the rank that keeps the journal."""
        return self._cost

    def run(self) -> int:
        """Train until the last step or a stop request; everything due is published on the way.

        Raises ``GoBackError`` where the run has to continue from an earlier checkpoint.
        """
        self._s.journal.span("setup", time.time() - self._s.attempt.started_at, self.done)
        self._clock = SpanClock(self._s.journal)
        count_downloads(self._s, self._cost, self.done)
        if self._program.device.type == "cuda":
            with self._clock.filing("checkpoint"):
                self.saver.prepare(self._tensors())
        self.saver.check_room(self._tensors())
        if self.budget is not None:
            self.budget.begin(self.done)
        if self.done == 0:
            self._evaluate_if_due()
        with reporting_lost_peers() if self._s.world.size > 1 else nullcontext():
            self._train()
            if self.budget is not None and self.budget.stopped:
                self._end_by_budget()
        if self._stopping() and self.done < self._program.steps:
            self._leave()
        else:
            with self._clock.filing("checkpoint"):
                self.saver.finish()
        self.saver.check()
        self._clock.report(self.done)
        return self.done

    def _train(self) -> None:
        if self.done >= self._program.steps:
            return
        data = Prefetcher(self._program, self.done, self.skips.first_sample)
        first = True
        alone = self._s.world.size == 1

        def told_to_stop() -> bool:
            return alone and self._s.stop.signal is not None

        while self.done < self._program.steps and not self._stopping():
            self.saver.check()
            with self._clock.filing("data_wait"):
                batch = data.take(self.done, told_to_stop)
            if batch is None:
                break
            if first and self._compiles:
                with self._clock.filing("compile"):
                    took = self._step(batch)
                    self._settle()
                self._interval.restart_clock()
            else:
                took = self._step(batch)
            if not took:
                break
            first = False
            self._after_step()

    def _end_by_budget(self) -> None:
        """The money is gone: evaluate if that can be paid for, save, publish the model."""
        assert self.budget is not None
        if self.done == 0:
            return  # nothing was trained
        if self.done == self._began_at:
            pass  # what is there was evaluated when it was saved
        elif self.budget.pays_for_evaluation():
            self._evaluate_if_due()
        else:
            self._s.line.say("the last evaluation is left out: the budget does not pay for it")
        with self._clock.filing("checkpoint"):
            self._settle()
            self._clock.report(self.done)
            deadline = time.monotonic() + self.budget.seconds_for_saving()
            self.saver.save_last(self.done, self._tensors, self._state, deadline)
        self._publish_if_due()

    def _stopping(self) -> bool:
        return self._s.world.any(self._s.stop.signal is not None)

    def _leave(self) -> None:
        """Journal, local checkpoint, upload: in this order, within the grace period."""
        stop = self._s.stop
        deadline = time.monotonic() + 0.9 * stop.left_s()  # the rest is for the ending
        with self._clock.filing("checkpoint"):
            self._settle()
            self._clock.report(self.done)
            # A store that hangs may not take the time that the local disk needs.
            self._s.journal.flush_within(max(0.1, 0.25 * (deadline - time.monotonic())))
            self.saver.save_last(self.done, self._tensors, self._state, deadline)

    # -- one step --------------------------------------------------------------------------------

    def _step(self, batch: StepBatch) -> bool:
        """One optimiser step; False if a stop request came between two micro-batches."""
        program, settings, world = self._program, self._experiment.optimizer, self._s.world
        lr = planned_rate(self._experiment.schedule, settings.lr, self.done, program.plan)
        set_learning_rate(self._optimizer, lr)
        total = torch.zeros((), device=program.device)
        for number, (inputs, targets) in enumerate(batch.micro, 1):
            last = number == len(batch.micro)
            inputs = inputs.to(program.device, non_blocking=True)
            targets = targets.to(program.device, non_blocking=True)
            total += self._replica.micro_step(inputs, targets, batch.targets, last)
            if self._s.stop.signal and not last and world.size == 1:
                self._replica.discard()
                return False
        world.sum(total)
        self._grad_norm = self._replica.clip(settings.clip_norm)
        bad = self._watch.judge(self.done + 1, total, self._grad_norm)
        self._replica.apply(self._optimizer, bad)
        self.done += 1
        self.tokens += batch.tokens
        self._interval.loss += torch.where(bad > 0, 0.0, total)
        self._interval.applied += 1.0 - bad
        self._interval.timed_steps += 1
        self._interval.timed_tokens += batch.tokens
        self._lr = lr
        return True

    def _after_step(self) -> None:
        if self.budget is not None and self.done < self._program.steps and self.budget.spent():
            self.budget.stop(self.done)
        if self.done == self._program.steps or self.done % self._experiment.log_every_steps == 0:
            self._log()
        if self.budget is not None and self.budget.stopped:
            return  # how such a run ends: _end_by_budget
        last = self.done == self._program.steps
        self._evaluate_if_due()
        self._publish_if_due()
        if not last and self.saver.due(self.done):
            self._save()

    # -- what is due -----------------------------------------------------------------------------

    def _settle(self) -> float:
        """Wait for the device; the mean loss since the last log point, NaN if no step counted."""
        for verdict in self._watch.read():
            if verdict.applied:
                continue
            first, end = self.skips.note(verdict)
            self._s.journal.event(
                "stability/skipped", verdict.step, loss=verdict.loss, grad_norm=verdict.norm,
                first_sample=first, end_sample=end,
            )  # fmt: skip
            self._s.line.say(
                f"step {verdict.step} was not applied: loss {verdict.loss:.4g}, gradient norm "
                f"{verdict.norm:.4g}; its samples {first} to {end - 1} are skipped"
            )
        return mean_of_applied(float(self._interval.loss), float(self._interval.applied))

    def _require_finite_weights(self) -> None:
        """Nothing is published from weights that are not numbers, however they came to be so."""
        if not self._replica.finite():
            raise DivergedError(
                f"The weights are no longer finite at step {self.done} of run {self._s.run.id}; "
                "lower optimizer.lr or optimizer.clip_norm and start again with --new."
            )

    def _log(self) -> None:
        loss = self._settle()
        self._clock.report(self.done)
        count_downloads(self._s, self._cost, self.done)
        interval, journal, step = self._interval, self._s.journal, self.done
        usd = self._cost.usd() if self._cost else None
        if math.isfinite(loss):
            journal.metric("train/loss", loss, step)
        journal.metric("train/lr", self._lr, step)
        journal.metric("train/grad_norm", float(self._grad_norm), step)  # type: ignore[arg-type]
        journal.metric("progress/tokens", self.tokens, step)
        if self.skips.skipped:
            journal.metric("train/skipped_steps", len(self.skips.skipped), step)
        if self._program.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._program.device) / 2**30
            journal.metric("system/gpu_peak_gib", peak, step)
        if usd is not None:
            journal.metric("cost/usd", usd, step)
        if interval.timed_steps:
            elapsed = interval.seconds
            self._pace.steps(interval.timed_steps, elapsed, self._program.steps - step)
        if self.budget is not None:
            self.budget.log_point(self.done)
        if interval.timed_steps:
            self._show_speed(interval.timed_tokens / elapsed, loss, usd)
        self._interval = Interval.fresh(self._program.device, self._now)
        if note := self._replica.look_after():
            journal.event("precision/changed", step, reason=note)
            self._s.line.say(f"step {step}: {note}")
        self.skips.judge(self.done)

    def _show_speed(self, speed: float, loss: float, usd: float | None) -> None:
        journal, step = self._s.journal, self.done
        peak = self._s.peak.flops * self._s.world.size
        mfu = self._program.flops_per_token * speed / peak
        journal.metric("train/tokens_per_s", speed, step)
        journal.metric("train/mfu", mfu, step)
        price = self._cost.usd_per_hour if self._cost else None
        ahead = self._outlook.at(step, usd, price, self.budget)
        self._outlook.record(journal, ahead, step)
        self._s.line.show(standing(step, self._program.plan, loss, speed, mfu, usd, ahead))

    def _evaluate_if_due(self) -> None:
        if not self._program.evaluates_after(self.done):
            return
        self._settle()
        with (
            self._clock.filing("evaluate"),
            self._aside("evaluate"),
            self._replica.evaluating() as model,
        ):
            score = scorer(model, self._program.compute_dtype)
            figures = self._program.evaluate(self.done, score)
        for key, value in figures.items():
            self._s.journal.metric(key, value, self.done)
        if self._cost and (usd := self._cost.usd()) is not None:
            # Beside cost/usd of the log points: a chart pairs metrics by step (docs/mlflow-ui.md).
            self._s.journal.metric("cost/usd_so_far", usd, self.done)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
        self._s.line.say(f"step {self.done}  {shown}")

    def _publish_if_due(self) -> None:
        if not self._program.publishes_after(self.done):
            return
        self._settle()
        self._require_finite_weights()
        with self._clock.filing("checkpoint"), self._aside("publish"):
            weights = self._replica.full_state()

            def publish() -> tuple[str, dict[str, Any]]:
                guard_publication(self._s.run, self._s.attempt)
                return self._program.publish(self._s.run, self._s.attempt, self.done, weights)

            key, details = self._s.world.run_on_main(publish)
        self._s.journal.event(key, self.done, **details)

    def _save(self) -> None:
        self._settle()
        self._require_finite_weights()
        with self._clock.filing("checkpoint"), self._aside("checkpoint"):
            self.saver.save(self.done, self._tensors, self._state)
        self._clock.report(self.done)

    def _tensors(self) -> dict[str, Tensor]:
        """The whole training state; see ``checkpoint.state``."""
        return training_state(
            self._replica.trainable,
            dict(self._program.model.named_buffers()),
            self._optimizer,
            self._watch.tensors() | self._replica.tensors(),
            rank=self._s.world.rank,
        )

    def _state(self) -> dict[str, Any]:
        """What a checkpoint records beside its tensors; a float32 survives JSON to the last bit."""
        return {
            "tokens": self.tokens,
            "fingerprint": self._s.run.record.fingerprint,
            "identity": self._s.run.identity,
            "interval": {
                "loss": float(self._interval.loss), "applied": float(self._interval.applied),
            },
            "samples": self.skips.state(),
            "plan": self._program.plan.state(),
            "ledger": {
                "records": self._s.journal.written,
                "usd": self._cost.usd() if self._cost else None,
            },
            "forecast": self._outlook.state(),
            "micro_batch": self._program.micro_batch,
            "ranks": self._s.world.size,
        }  # fmt: skip

    # -- small things ----------------------------------------------------------------------------

    def _keeper(self, recorded: Recorded) -> BudgetKeeper | None:
        experiment, s = self._experiment, self._s
        if not isinstance(experiment, Pretrain) or experiment.budget_usd is None:
            return None
        return BudgetKeeper(
            self._program, experiment, s.attempt, s.journal, s.line, s.world, self._cost,
            self._pace, self._now, recorded, remote=not s.root.is_local,
        )  # fmt: skip

    @contextmanager
    def _aside(self, kind: str) -> Iterator[None]:
        """Time spent here is not training time of the interval's speed."""
        entered = self._now()
        try:
            yield
        finally:
            took = self._now() - entered
            self._interval.since += took
            self._pace.aside(kind, took)
