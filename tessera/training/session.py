"""What ``tessera train`` does: one run, continued by as many attempts as this process needs.

    prepare the run -> adopt what a dead attempt left -> fetch the furthest whole checkpoint
    -> record an attempt -> train -> write how it ended; after a rollback once more from the fetch

Everything that can be refused is refused before the attempt is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from tessera.errors import RetryElsewhereError
from tessera.experiment import Experiment
from tessera.model.device import best_device, cpu_wanted
from tessera.runs import Attempt, Ending, Run
from tessera.storage import Root
from tessera.tracking.journal import adopt
from tessera.training.attempt import Start, Trainer
from tessera.training.budget import recorded_plans, require_payable
from tessera.training.checkpoint.fetch import Loaded, fetch_checkpoint, remove_finished
from tessera.training.clock import now
from tessera.training.parallel import World, join, leave
from tessera.training.preemption import StopRequest, listening
from tessera.training.prepare import Prepared, prepare
from tessera.training.progress import ProgressLine
from tessera.training.resume import exclusions, lost_work, passed_over
from tessera.training.workplace import REAL, Instruments


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
    instruments: Instruments = REAL,
) -> Result:
    """Train, or continue, the run of ``experiment``; ``place`` says where and at what price.

    ``instruments`` are what time and money are read from.

    Raises ``TesseraError`` subclasses, whose ``exit_code`` is the command's; a stop by signal is a
    ``Result`` with 75. Under torchrun every worker calls this.
    """
    stop = StopRequest(experiment.preemption.grace_s)
    with listening(stop):
        require_the_rented_gpu(os.environ)
        require_payable(experiment, place, root)
        world = join()
        prepared = prepare(experiment, root, world, run_id, new)
        run = prepared.run
        ended = world.run_on_main(run.finished)
        if ended is not None:
            if world.local_rank == 0:
                remove_finished(run)  # another machine may have finished it
            leave(world)
            text = f"Run {run.id} is already finished ({ended.step} steps); use --new for another."
            return Result(run, 0, text)
        again = f"`--run-id {run.id}`" if new or run_id else "the same command"
        try:
            require_payable(prepared.experiment, place, root)
            if world.is_main:
                instruments.began(run)
            ending = _train(prepared, root, world, place, stop, again, quiet, instruments)
        finally:
            prepared.program.close()
        leave(world)
    return Result(run, ending.exit_code, ending.reason)


def require_the_rented_gpu(environ: Mapping[str, str]) -> None:
    """Raise ``RetryElsewhereError`` if a GPU was rented and none can be used.

    Training would go on on the CPU, at the GPU's price, and as another run (its precision differs).
    Who wants just that says so with ``TESSERA_DEVICE=cpu``.
    """
    if cpu_wanted(environ):
        return
    rented = environ.get("SKYPILOT_NUM_GPUS_PER_NODE", "0") not in ("", "0")
    if rented and best_device().type == "cpu":
        raise RetryElsewhereError(
            "A GPU was rented (SKYPILOT_NUM_GPUS_PER_NODE), but torch finds none that works on "
            "this machine; another machine may help."
        )


def _train(
    prepared: Prepared,
    root: Root,
    world: World,
    place: Attempt,
    stop: StopRequest,
    again: str,
    quiet: bool,
    instruments: Instruments,
) -> Ending:
    run, program = prepared.run, prepared.program
    with ProgressLine(run.id, quiet=quiet or not world.is_main) as line:
        trainer = Trainer(
            prepared.experiment, root, run, prepared.created, program, world, line, stop,
            instruments,
        )  # fmt: skip
        while True:
            start = _start(run, world)
            attempt = world.run_on_main(partial(_record, run, place, start, stop))
            stop.preparing = False
            outcome = trainer.attempt(attempt, start, again)
            if isinstance(outcome, Ending):
                return outcome
            trainer.created = False
            place = replace(place, started_at=now())


def _start(run: Run, world: World) -> Start:
    """Where to continue; with several machines each of them downloads."""

    def find() -> Start:
        adopted = adopt(run)
        loaded, notes = fetch_checkpoint(run, local=world.local_size == world.size)
        ranges, count = exclusions(run, loaded.ref if loaded else None)
        lost = lost_work(run, loaded.ref.step if loaded else 0)
        recorded = recorded_plans(run, loaded.ref if loaded else None)
        return Start(loaded, notes, adopted, lost, ranges, count, recorded)

    start = world.run_on_main(find)
    if start.loaded is not None and world.local_rank == 0 and not world.is_main:
        fetch_checkpoint(run, local=False, only=start.loaded.ref)
    world.barrier()
    return start


def _record(run: Run, place: Attempt, start: Start, stop: StopRequest) -> Attempt:
    """Publish the attempt, and first what it gives up."""
    loaded: Loaded | None = start.loaded
    attempt = run.next_attempt(place, loaded.ref if loaded else None)
    if loaded is not None and start.notes:
        run.publish_rollback(passed_over(attempt, run, loaded, start.notes))
    stop.preparing = False  # from here on there is something to end properly
    run.publish_attempt(attempt)
    return attempt
