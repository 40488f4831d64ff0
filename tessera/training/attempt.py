"""One attempt: from the checkpoint where it continues to the ending that it leaves.

    replica and optimiser -> load the state -> find the micro-batch -> train -> write how it ended

Whatever happens after the attempt was recorded, short of a kill, leaves an ending that says how it
came to it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from tessera.errors import (
    DivergedError,
    InputError,
    RetryElsewhereError,
    SupersededError,
    TesseraError,
)
from tessera.experiment import Experiment, Pretrain
from tessera.model.loss import summed_cross_entropy
from tessera.model.peak import Peak, peak_flops
from tessera.model.shape import FLOPS_FORMULA
from tessera.runs import (
    BUDGET,
    DIVERGED,
    FAILED,
    FINISHED,
    OUTCOMES_DONE,
    PREEMPTED,
    ROLLED_BACK,
    SUPERSEDED,
    Attempt,
    Ending,
    Rollback,
    Run,
)
from tessera.storage import Root
from tessera.tracking.journal import Journal
from tessera.training.budget import Recorded, plan_of
from tessera.training.checkpoint.fetch import Loaded
from tessera.training.checkpoint.files import local_folder
from tessera.training.checkpoint.state import allocate_moments, restore_state, training_state
from tessera.training.clock import now
from tessera.training.fused import FusedReplica
from tessera.training.loop import Loop
from tessera.training.memory import out_of_memory_sentence, resolve_micro_batch
from tessera.training.mute import MuteJournal
from tessera.training.parallel import World
from tessera.training.preemption import RETRY, StopRequest
from tessera.training.pretrain import first_plan
from tessera.training.price_watch import PriceWatch, follow_price
from tessera.training.program import Program, compiles
from tessera.training.progress import ProgressLine, dollars
from tessera.training.replica import Loss, Replica
from tessera.training.resume import Lost, decide_rollback
from tessera.training.samples import sampled
from tessera.training.stability import GoBackError, Range, Skips, Watch
from tessera.training.workplace import REAL, Instruments, Session


@dataclass(frozen=True)
class Start:
    """Where an attempt continues and what it has to know.

    ``excluded`` and ``rollbacks`` were decided after the checkpoint was written, and so were the
    plans of ``recorded``; ``notes`` say what was passed over; ``adopted`` names the attempts whose
    records were brought to the root.
    """

    loaded: Loaded | None
    notes: Sequence[str] = ()
    adopted: Sequence[str] = ()
    lost: Lost | None = None
    excluded: Sequence[Range] = ()
    rollbacks: int = 0
    recorded: Recorded = field(default_factory=Recorded)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.loaded.ref.step if self.loaded else 0


@dataclass
class Trainer:
    """What stays when an attempt of this process is followed by the next (a rollback)."""

    experiment: Experiment
    root: Root
    run: Run
    created: bool
    program: Program
    world: World
    line: ProgressLine
    stop: StopRequest
    instruments: Instruments = REAL
    replica: Replica | None = None

    def attempt(self, attempt: Attempt, start: Start, again: str) -> Ending | Rollback:
        """Run ``attempt``, already recorded, to its end. ``again`` is the command that continues.

        A ``Rollback`` where the run continues from an earlier checkpoint, with the next attempt.
        """
        journal = Journal(self.run, attempt.id) if self.world.is_main else MuteJournal()
        outcome = Ending(FAILED, 1, 0.0, start.step, "ended by an unexpected error")
        loop: Loop | None = None
        try:
            loop = self._loop(attempt, journal, start)
            try:
                with (
                    follow_price(self._price_watch(loop, attempt, journal)),
                    self._sampled(loop, journal),
                ):
                    loop.run()
            except GoBackError as cause:
                rollback = self._go_back(loop, attempt, cause)
                outcome = Ending(ROLLED_BACK, 0, 0.0, start.step, rollback.reason)
                return rollback
            outcome = self._ending(loop, again)
            if outcome.outcome in OUTCOMES_DONE:
                journal.event("run/finished", loop.done)
        except torch.OutOfMemoryError as error:
            reason = out_of_memory_sentence(
                attempt.device, self.program.micro_batch, self.experiment.recompute
            )
            outcome = Ending(FAILED, 2, 0.0, start.step, reason)
            raise InputError(reason) from error
        except RuntimeError as error:
            if str(error).startswith("CUDA error"):  # a fault of the card or its driver
                reason = (
                    f"{attempt.device} failed ({str(error).splitlines()[0][:120]}); another "
                    "machine continues the run."
                )
                outcome = Ending(FAILED, RETRY, 0.0, start.step, reason)
                raise RetryElsewhereError(reason) from error
            if "deterministic" not in str(error):
                raise
            reason = (
                "deterministic: true, but an operation of this training has no deterministic form "
                f"on {attempt.device} ({str(error).splitlines()[0][:120]}); set it to false."
            )
            outcome = Ending(FAILED, 2, 0.0, start.step, reason)
            raise InputError(reason) from error
        except TesseraError as error:
            kind = {DivergedError: DIVERGED, SupersededError: SUPERSEDED}.get(type(error), FAILED)
            if kind == DIVERGED:
                journal.event("run/diverged", loop.done if loop else 0, reason=str(error))
            outcome = Ending(kind, error.exit_code, 0.0, start.step, str(error))
            raise
        finally:
            reached = loop.done if loop else start.step
            outcome = replace(outcome, ended_at=now(), step=reached)
            if self.world.is_main:
                finish_attempt(self.run, attempt, journal, outcome)
            if outcome.outcome in OUTCOMES_DONE and self.world.local_rank == 0:
                shutil.rmtree(local_folder(self.run), ignore_errors=True)  # 12 GB nobody needs now
        return outcome

    def _price_watch(self, loop: Loop, attempt: Attempt, journal: Journal) -> PriceWatch | None:
        ask = self.instruments.ask_price
        if ask is None or loop.cost is None:
            return None
        return PriceWatch(ask, attempt, loop.cost, journal, lambda: loop.done, self.line.say)

    def _sampled(self, loop: Loop, journal: Journal) -> AbstractContextManager[None]:
        """One worker looks at its machine; the others have no journal."""
        if not self.world.is_main:
            return nullcontext()
        return sampled(self.program.device, journal, lambda: loop.done)

    def _go_back(self, loop: Loop, attempt: Attempt, cause: GoBackError) -> Rollback:
        """Decide and record where the run continues; ``DivergedError`` if it may not go back."""
        loop.saver.finish()
        settings = self.experiment.stability.rollbacks, self.experiment.checkpoint.every_steps

        def decide() -> Rollback:
            return decide_rollback(self.run, attempt, cause, loop.skips, *settings)

        rollback = self.world.run_on_main(decide)
        loop.session.journal.event(
            "run/rolled_back", loop.done, reason=rollback.reason, to_step=rollback.to_step,
            excluded=[list(pair) for pair in rollback.excluded],
        )  # fmt: skip
        self.line.say(
            f"{rollback.reason}; going back to step {rollback.to_step} and leaving the samples of "
            "those steps out"
        )
        return rollback

    def _loop(self, attempt: Attempt, journal: Journal, start: Start) -> Loop:
        program, experiment, world = self.program, self.experiment, self.world
        if self.replica is None:
            # Compiled, the soft-max needs no float32 copy of the logits: 4 GB a micro-batch at 1B.
            compiled = torch.compile(summed_cross_entropy) if compiles(program) else None
            self.replica = _build_replica(program, world, compiled or summed_cross_entropy)
        replica = self.replica
        if isinstance(experiment, Pretrain) and experiment.budget_usd is not None:
            program.plan = first_plan(experiment)
            if start.loaded is not None:
                program.plan = plan_of(start.loaded.state["plan"], start.loaded.ref)
        optimizer = replica.optimizer(experiment.optimizer)
        allocate_moments(replica.trainable, optimizer)
        watch = Watch(experiment.stability, program.device)
        skips = Skips(experiment.stability, program.samples_per_step)
        if start.loaded is not None:
            buffers = dict(program.model.named_buffers())
            more = watch.tensors() | replica.tensors()
            wanted = training_state(replica.trainable, buffers, optimizer, more, rank=world.rank)
            restore_state(start.loaded.folder, wanted, alone=world.size == 1)
            replica.restored()
            world.barrier()
            if world.local_rank == 0:
                start.loaded.discard()
            skips.restore(start.loaded.state["samples"])
        skips.exclude(start.excluded)
        skips.rollbacks = max(skips.rollbacks, start.rollbacks)
        self._say_opening(attempt, journal, start)
        if skips.rollbacks and (note := replica.calm_down()):
            journal.event("precision/changed", start.step, reason=note)
            self.line.say(note)
        self._choose_micro_batch(replica, journal, start)
        peak = peak_flops(program.device, program.compute_dtype)
        how = replica.how()
        journal.event(
            "attempt/started", start.step, device=attempt.device, peak=peak.source, computed_by=how
        )
        self.line.say(f"steps computed by {how}")
        self.line.say(_formula(program, peak))
        session = Session(
            self.root, self.run, attempt, journal, self.line, peak, self.stop, world,
            self.instruments,
        )  # fmt: skip
        return Loop(
            session, program, replica, optimizer, skips=skips, watch=watch, loaded=start.loaded,
            recorded=start.recorded,
        )  # fmt: skip

    def _choose_micro_batch(self, replica: Replica, journal: Journal, start: Start) -> None:
        program, setting = self.program, self.experiment.batch.micro_batch
        if setting != "auto":
            return

        def step(size: int) -> None:
            inputs, targets = (t.to(program.device) for t in program.dummy(size))
            # No adding up over ranks: one that runs out of memory would leave the others waiting.
            replica.micro_step(inputs, targets, 1, last=False)

        remembered = start.loaded.state["micro_batch"] if start.loaded else None
        choice = resolve_micro_batch(
            setting,
            samples=program.samples_per_rank,
            step=step,
            device=program.device,
            estimate=program.estimate_bytes,
            remembered=remembered,
            release=replica.discard,
            worst=lambda number: max(self.world.gather(number)),
        )
        program.micro_batch = choice.size
        self.line.say(str(choice))
        journal.event("micro_batch/chosen", start.step, size=program.micro_batch, how=choice.how)

    def _say_opening(self, attempt: Attempt, journal: Journal, start: Start) -> None:
        done = start.step
        self.line.say(_opening(attempt, self.program, self.created, start))
        for note in start.notes:
            self.line.say(note)
            journal.event("checkpoint/damaged", done, reason=note)
        lost = start.lost
        if lost is not None:
            paid = "" if lost.usd is None else f" ({dollars(lost.usd)})"
            self.line.say(
                f"attempt {lost.attempt} had done {lost.steps} steps more, which are done again: "
                f"{lost.seconds:.0f} s of its time{paid} lost"
            )
        if done or lost or start.adopted:
            journal.event(
                "attempt/resumed", done, adopted=list(start.adopted),
                local=bool(start.loaded and start.loaded.local),
                lost_attempt=lost.attempt if lost else None,
                lost_steps=lost.steps if lost else 0,
                lost_s=lost.seconds if lost else 0.0, lost_usd=lost.usd if lost else 0.0,
            )  # fmt: skip

    def _ending(self, loop: Loop, again: str) -> Ending:
        if loop.budget is not None and loop.budget.stopped:
            text = f"Ended by the budget at step {loop.done}: {loop.budget.stopped}."
            if loop.done == 0:
                text += " Nothing was trained, so there is no model."
            return Ending(BUDGET, 0, 0.0, loop.done, text)
        if loop.done == self.program.steps:
            by_budget = loop.budget.told if loop.budget is not None else ""
            end = f"; {by_budget}." if by_budget else "."
            text = f"Finished all {self.program.steps} steps{end}"
            if loop.skips.skipped:
                text += f" {len(loop.skips.skipped)} of them were not applied."
            return Ending(FINISHED, 0, 0.0, loop.done, text)
        here, anywhere = loop.saver.local_step, loop.saver.root_step
        text = (
            f"Stopped by {self.stop.signal} at step {loop.done} of {_number(self.program)}; "
            f"{again} continues at step {max(here, anywhere)}"
        )
        if anywhere < here:
            text += " on this machine, earlier on another"
        return Ending(PREEMPTED, RETRY, 0.0, loop.done, text + ".")


def finish_attempt(run: Run, attempt: Attempt, journal: Journal, outcome: Ending) -> None:
    """The journal first, then the ending: a finished run has all its records in the root."""
    done = outcome.outcome in OUTCOMES_DONE
    try:
        journal.close()
        outcome = replace(outcome, records=journal.written)
    except TesseraError:  # the records stay on this disk for the next attempt to adopt
        if done:
            raise
    try:
        run.end_attempt(attempt, outcome)
    except TesseraError:
        if done:
            raise  # nobody may believe it finished if the root does not say so


def _build_replica(program: Program, world: World, loss: Loss) -> Replica:
    model, dtype, experiment = program.model, program.compute_dtype, program.experiment
    if program.fused:
        assert isinstance(experiment, Pretrain)
        return FusedReplica(model, world, dtype, loss, experiment)
    return Replica.build(model, experiment.parallel, world, dtype, loss)


def _opening(attempt: Attempt, program: Program, created: bool, start: Start) -> str:
    done = start.step
    if created:
        what = f"new run, {_steps(program)}"
    elif start.loaded is not None:
        where = "this machine's disk" if start.loaded.local else "the root"
        what = f"continuing at step {done} of {_number(program)} from {where}"
        what += f" (attempt {attempt.number})"
    else:
        what = f"starting again, no checkpoint yet (attempt {attempt.number})"
    price = "no price known"
    if attempt.usd_per_hour is not None:
        price = f"${attempt.usd_per_hour:g}/h ({attempt.price_source})"
        if attempt.nodes > 1:
            price += f" for {attempt.nodes} machines"
        if attempt.price_source == "experiment":
            price += ", a guess: set TESSERA_USD_PER_HOUR to what you pay"
    count = sum(p.numel() for p in program.trainable.values())
    workers = program.world.size
    devices = attempt.device if workers == 1 else f"{workers} x {attempt.device}"
    return f"{what}; {count:,} trainable parameters on {devices}; {price}"


def _number(program: Program) -> str:
    return _steps(program).removesuffix(" steps")


def _steps(program: Program) -> str:
    """How many steps there will be, as far as that is known."""
    if program.plan.known:
        return f"{program.steps} steps"
    assert isinstance(program.experiment, Pretrain)
    return f"as many steps as {dollars(program.experiment.budget_usd)} pay for"


def _formula(program: Program, peak: Peak) -> str:
    return (
        f"MFU = {program.flops_per_token:.4g} FLOPs a token x tokens/s / {peak.flops:.3g} FLOP/s "
        f"({peak.source}); FLOPs a token = {FLOPS_FORMULA}"
    )
