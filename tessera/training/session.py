"""One attempt of one run, from the experiment to its ending: what ``tessera train`` does.

    open or create the run -> adopt what a dead attempt left -> fetch the furthest whole checkpoint
    -> start an attempt -> train -> write how it ended

Everything that can be refused is refused before the attempt is recorded, and whatever happens after
that, short of a kill, leaves an ending that says how it came to it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tessera.corpus.chat import conversations_digest
from tessera.corpus.manifest import resolve
from tessera.errors import DivergedError, InputError, SupersededError, TesseraError
from tessera.evaluation.weights import best_device, load_base
from tessera.experiment import Experiment, Pretrain, Sft
from tessera.model.peak import Peak, peak_flops
from tessera.model.shape import FLOPS_FORMULA
from tessera.runs import (
    DIVERGED,
    FAILED,
    FINISHED,
    PREEMPTED,
    SUPERSEDED,
    Attempt,
    Ending,
    Run,
    create_or_open,
    find_run,
)
from tessera.source import code_commit
from tessera.storage import Root, canonical_json, sha256_bytes
from tessera.tracking.journal import Journal, adopt
from tessera.training.checkpoint import fetch_checkpoint, load_checkpoint
from tessera.training.loop import Loop, Session, StopRequest, compiles
from tessera.training.optim import build_optimizer
from tessera.training.pretrain import PretrainProgram
from tessera.training.program import Program
from tessera.training.progress import ProgressLine
from tessera.training.sft import SftProgram

RETRY = 75


@dataclass(frozen=True)
class Result:
    """How ``train`` ended: the run, the exit code, and a sentence for a person."""

    run: Run
    exit_code: int
    text: str


def train(
    experiment: Experiment,
    root: Root,
    place: Attempt,
    *,
    run_id: str | None = None,
    new: bool = False,
    quiet: bool = False,
) -> Result:
    """Train, or continue, the run of ``experiment``; ``place`` says where and at what price.

    Raises ``TesseraError`` subclasses, whose ``exit_code`` is the command's; a stop by signal is a
    ``Result`` with 75.
    """
    run, created, program = _prepare(experiment, root, run_id, new)
    if (ending := run.finished()) is not None:
        text = f"Run {run.id} is already finished ({ending.step} steps); use --new for another."
        return Result(run, 0, text)
    adopted = adopt(run)
    loaded, notes = fetch_checkpoint(run)
    done = loaded.ref.step if loaded else 0
    stop = StopRequest()
    with ProgressLine(run.id, program.steps, quiet=quiet) as line, _signals(stop):
        attempt = run.start_attempt(place, loaded.ref if loaded else None)
        journal = Journal(run, attempt.id)
        outcome = Ending(FAILED, 1, 0.0, done, "ended by an unexpected error")
        loop: Loop | None = None
        try:
            optimizer = build_optimizer(experiment.optimizer, program.trainable)
            if loaded is not None:
                load_checkpoint(loaded, program.trainable, optimizer)
            peak = peak_flops(program.device, program.compute_dtype)
            journal.event("attempt/started", done, device=attempt.device, peak=peak.source)
            line.say(_opening(attempt, program, created, done))
            line.say(_formula(program, peak))
            for note in notes:
                line.say(note)
                journal.event("checkpoint/damaged", done, reason=note)
            if done:
                journal.event("attempt/resumed", done, adopted=adopted)
            session = Session(root, run, attempt, journal, line, peak, stop)
            state = loaded.state if loaded else None
            loop = Loop(session, program, optimizer, done=done, state=state)
            loop.run()
            again = f"`--run-id {run.id}`" if new or run_id else "the same command"
            outcome = _ending(loop, program, stop, again)
            if outcome.outcome == FINISHED:
                journal.event("run/finished", loop.done)
        except torch.OutOfMemoryError as error:
            reason = (
                f"{attempt.device} has too little memory for batch.micro_batch "
                f"{experiment.batch.micro_batch}; lower it (the loss stays the same) or use a "
                "larger GPU."
            )
            outcome = Ending(FAILED, 2, 0.0, done, reason)
            raise InputError(reason) from error
        except TesseraError as error:
            kind = {DivergedError: DIVERGED, SupersededError: SUPERSEDED}.get(type(error), FAILED)
            outcome = Ending(kind, error.exit_code, 0.0, done, str(error))
            raise
        finally:
            reached = loop.done if loop else done
            outcome = replace(outcome, ended_at=time.time(), step=reached)
            _finish(run, attempt, journal, outcome)
    return Result(run, outcome.exit_code, outcome.reason)


def _ending(loop: Loop, program: Program, stop: StopRequest, again: str) -> Ending:
    if loop.done < program.steps:
        text = (
            f"Stopped by {stop.signal} at step {loop.done} of {program.steps}; {again} continues "
            f"at step {loop.saved_at}."
        )
        return Ending(PREEMPTED, RETRY, 0.0, loop.done, text)
    return Ending(FINISHED, 0, 0.0, loop.done, f"Finished all {program.steps} steps.")


def _finish(run: Run, attempt: Attempt, journal: Journal, outcome: Ending) -> None:
    """The journal first, then the ending: a finished run has all its records in the root."""
    done = outcome.outcome == FINISHED
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


def _opening(attempt: Attempt, program: Program, created: bool, done: int) -> str:
    if created:
        what = f"new run, {program.steps} steps"
    elif done:
        what = f"continuing at step {done} of {program.steps} (attempt {attempt.number})"
    else:
        what = f"starting again, no checkpoint yet (attempt {attempt.number})"
    price = "no price known"
    if attempt.usd_per_hour is not None:
        price = f"${attempt.usd_per_hour:g}/h ({attempt.price_source})"
        if attempt.price_source == "experiment":
            price += ", a guess: set TESSERA_USD_PER_HOUR to what you pay"
    count = sum(p.numel() for p in program.trainable.values())
    return f"{what}; {count:,} trainable parameters on {attempt.device}; {price}"


def _formula(program: Program, peak: Peak) -> str:
    return (
        f"MFU = {program.flops_per_token:.4g} FLOPs a token x tokens/s / {peak.flops:.3g} FLOP/s "
        f"({peak.source}); FLOPs a token = {FLOPS_FORMULA}"
    )


# -- preparing -------------------------------------------------------------------------------------


def _prepare(
    experiment: Experiment, root: Root, run_id: str | None, new: bool
) -> tuple[Run, bool, Program]:
    """The run and its program; raises before anything is recorded if they do not fit."""
    device = best_device()
    dtype = compute_dtype(experiment.precision, device)
    # The run's identity holds what `auto` came to: half a run in bf16 and half in float32 is none.
    resolved = "bf16" if dtype == torch.bfloat16 else "float32"
    experiment = experiment.model_copy(update={"precision": resolved})
    commit = code_commit()
    program: Program
    if isinstance(experiment, Pretrain):
        manifest = resolve(root, experiment.data.corpus, experiment.data.fingerprint)
        program = PretrainProgram(experiment, root, manifest, device, dtype)
        fingerprint = manifest.fingerprint
        data: dict[str, Any] = {"manifest": manifest.path}
        base_record = None
    else:
        base = load_base(find_run(root, experiment.base, kind="pretrain"), torch.device("cpu"))
        fingerprint = _sft_fingerprint(experiment, base.tokenizer.sha256)
        base_record = {"run_id": base.run_id, "weights_digest": base.digest}
        program = SftProgram(experiment, base, fingerprint, device, dtype)
        files = list(experiment.data.conversations)
        data = {"conversations": files, "steps": program.steps, "truncated": program.truncated}
    run, created = create_or_open(
        root,
        experiment,
        fingerprint=fingerprint,
        data=data,
        base=base_record,
        run_id=run_id,
        new=new,
        commit=commit,
    )
    if compiles(program):
        for block in program.model.blocks:
            block.compile()
    program.model.train()
    return run, created, program


def _sft_fingerprint(experiment: Sft, tokenizer_sha256: str) -> str:
    files = [Path(name) for name in experiment.data.conversations]
    material = {"tokenizer": tokenizer_sha256, "conversations": conversations_digest(files)}
    return sha256_bytes(canonical_json(material))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of activations: ``auto`` is bf16 on a GPU that has it, else float32."""
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError(
            f"precision is bf16, but {torch.cuda.get_device_name(device)} has no bf16; use float32 "
            "or another GPU."
        )
    return torch.bfloat16 if precision == "bf16" else torch.float32


@contextmanager
def _signals(stop: StopRequest) -> Iterator[None]:
    """SIGTERM and Ctrl-C finish the step and save; a second one leaves at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number).name
        # os.write: a handler may not take the locks of print or of the progress line
        os.write(2, b"\nstopping after this step and saving; once more leaves at once\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
