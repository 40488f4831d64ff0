"""What an attempt begins with: where it continues, what was lost, what it must leave out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.errors import DamagedError, DivergedError
from tessera.runs import Attempt, CheckpointRef, Ending, Rollback, Run
from tessera.tracking.records import Record, read_journal
from tessera.tracking.told import HOUR, price_changes
from tessera.training.checkpoint.fetch import Loaded
from tessera.training.checkpoint.publish import guard_publication
from tessera.training.stability import GoBackError, Range, Skips


@dataclass(frozen=True)
class Lost:
    """Work of the attempt before that has to be done again; dollars are None without a price."""

    attempt: str
    steps: int
    seconds: float
    usd: float | None


def lost_work(run: Run, step: int) -> Lost | None:
    """What the latest attempt had done beyond ``step``, where the next one continues.

    Seconds are those filed after that step; what an attempt that died did after its last record is
    not known.
    """
    attempts = run.attempts()
    if not attempts:
        return None
    last = attempts[-1]
    try:
        records = list(read_journal(run, last.id))
    except DamagedError:
        return None  # the checkpoints do not need it, and tessera-exp names the damage
    reached = max((r.step for r in records if r.key == "progress/tokens"), default=0)
    ending = run.endings().get(last.id)
    reached = max(reached, ending.step if ending else 0)
    if reached <= step:
        return None
    seconds = sum(r.number for r in records if r.kind == "span" and r.step > step)
    seconds += _unfiled(records, step, ending)
    price = _last_price(last, records)
    usd = None if price is None else price * seconds / 3600
    return Lost(last.id, reached - step, seconds, usd)


def _last_price(attempt: Attempt, records: Sequence[Record]) -> float | None:
    """What an hour cost when the attempt ended."""
    told = price_changes(
        (r.time, r.number) for r in records if r.kind == "metric" and r.key == HOUR
    )
    return max(told)[1] if told else attempt.usd_per_hour


def _unfiled(records: Sequence[Record], step: int, ending: Ending | None) -> float:
    """Seconds from the last span to the last sign of life."""
    spans = [r.time for r in records if r.kind == "span"]
    end = ending.ended_at if ending else max((r.time for r in records), default=0.0)
    return max(0.0, end - max(spans)) if spans else 0.0


def exclusions(run: Run, ref: CheckpointRef | None) -> tuple[list[Range], int]:
    """What rollbacks decided after ``ref`` was written leave out, and how many there have been."""
    later = [r for r in run.rollbacks() if ref is None or int(r.attempt.split("-")[0]) > ref.number]
    ranges = [(a, b) for rollback in later for a, b in rollback.excluded]
    return ranges, max((rollback.count for rollback in later), default=0)


def target_of(run: Run, cause: GoBackError, every_steps: int) -> CheckpointRef | None:
    """The checkpoint that a rollback goes back to; None if there is none.

    The furthest regular one (``checkpoint.every_steps``, so that it does not depend on where a
    preemption saved) from before the first bad step, else the oldest one.
    """
    regular = [ref for ref in run.checkpoints() if ref.step % every_steps == 0]
    before = [ref for ref in regular if ref.step < cause.first_step]
    return before[0] if before else regular[-1] if regular else None


def passed_over(attempt: Attempt, run: Run, loaded: Loaded, notes: Sequence[str]) -> Rollback:
    """The record that damaged checkpoints beyond ``loaded`` no longer count."""
    ranges, count = exclusions(run, loaded.ref)
    return Rollback(
        attempt=attempt.id,
        to_step=loaded.ref.step,
        reason=" ".join(notes),
        excluded=tuple(ranges),
        count=count,
        decided_at=time.time(),
    )


def decide_rollback(
    run: Run, attempt: Attempt, cause: GoBackError, skips: Skips, allowed: int, every_steps: int
) -> Rollback:
    """Where the run goes back to and what it leaves out; recorded before anything else happens.

    Raises ``DivergedError`` if it went back ``allowed`` times already, or has no checkpoint from
    before the last bad step, and ``SupersededError`` if another attempt took over.
    """
    guard_publication(run, attempt)  # a record now would give up what the other one works on
    guard_publication(run, attempt)
    target = target_of(run, cause, every_steps)
    first, end = cause.excluded
    if target is not None and skips.first_sample(target.step) >= end:
        target = None  # it is from after the bad steps, so there would be nothing to leave out
    if skips.rollbacks >= allowed or target is None:
        why = (
            f"the run went back {skips.rollbacks} times already"
            if target is not None
            else "there is no checkpoint from before them to go back to"
        )
        raise DivergedError(
            f"Run {run.id} diverged: {cause}, and {why}; lower optimizer.lr or "
            "optimizer.clip_norm and start again with --new."
        )
    # Steps before the target stay as they were, so what they read cannot be left out any more.
    skips.exclude([(max(first, skips.first_sample(target.step)), end)])
    rollback = Rollback(
        attempt=f"{attempt.number + 1}-{attempt.token}",
        to_step=target.step,
        reason=str(cause),
        excluded=tuple(skips.excluded),
        count=skips.rollbacks + 1,
        decided_at=time.time(),
    )
    run.publish_rollback(rollback)
    return rollback
