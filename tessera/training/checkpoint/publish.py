"""Publishing: a local checkpoint becomes one that every machine can continue from.

Order, as one attempt sees it: its files, then every journal record up to the step, then a look
whether another attempt took over, then ``COMPLETE``; after that what is no longer needed goes.
"""

from __future__ import annotations

from collections.abc import Callable

from tessera.errors import StoreError, SupersededError
from tessera.runs import OUTCOMES_DONE, Attempt, CheckpointRef, Run, open_run
from tessera.tracking.journal import Journal
from tessera.training.checkpoint.files import COMPLETE, Saved


def guard_publication(run: Run, attempt: Attempt) -> None:
    """Raise ``SupersededError`` if a later attempt took over, or another one finished the run."""
    # A store without conditional writes lets two first starts both create run.json under --run-id.
    if open_run(run.root, run.id).identity != run.identity:
        raise SupersededError(
            f"Another start with other settings took the run id {run.id} at the same moment; give "
            "one of the two another --run-id."
        )
    other = run.superseded_by(attempt)
    if other is None:
        done = (n for n, ending in run.endings().items() if ending.outcome in OUTCOMES_DONE)
        other = next((name for name in done if name != attempt.id), None)
    if other is not None:
        raise SupersededError(
            f"Attempt {attempt.id} of run {run.id} stops: attempt {other} took over. "
            "It continues from the run's last checkpoint; this machine can be released."
        )


def upload_files(run: Run, saved: Saved, go_on: Callable[[], bool]) -> int:
    """Put this rank's files into the root; returns their bytes, or -1 if told to stop half-way."""
    sent = 0
    for name in saved.own:
        if not go_on():
            return -1
        try:
            run.root.put_file(saved.folder / name, run.path(saved.ref.folder, name), link=True)
        except FileNotFoundError as error:
            raise StoreError(
                f"{saved.folder} went before it was in {run.root.url}: another attempt of run "
                f"{run.id} uses this disk; stop one of them."
            ) from error
        sent += int(saved.record["files"][name]["bytes"])
    return sent


def complete_checkpoint(run: Run, attempt: Attempt, journal: Journal, saved: Saved) -> None:
    """Make an uploaded checkpoint count.

    Raises ``SupersededError`` if another attempt took over, ``StoreError`` if the root failed;
    either way it does not count then.
    """
    journal.event("checkpoint/published", saved.ref.step, folder=saved.ref.folder)
    journal.flush()
    guard_publication(run, attempt)
    run.root.publish_json(run.path(saved.ref.folder, COMPLETE), saved.record)


def tidy(run: Run, attempt: Attempt, newest: CheckpointRef, *, keep: int, every_steps: int) -> None:
    """Update the hint ``latest.json`` and drop what nobody needs any more.

    Up to ``newest`` the ``keep`` newest checkpoints at multiples of ``every_steps`` stay, which a
    rollback may go back to; if there are fewer, the newest of the others too (a preemption saves at
    any step). With the rest go those that a rollback gave up and what earlier attempts left half
    written. What is further than ``newest`` is not ours to judge: an earlier attempt that lives may
    be about to complete it. And an attempt that was taken over leaves all as it is: the later one
    may have removed files of ``newest`` a moment before it became complete.
    """
    if run.superseded_by(attempt):
        return
    run.root.publish_json(run.path("latest.json"), {"step": newest.step, "attempt": newest.attempt})
    # In this order what becomes complete meanwhile is taken for neither half written nor given up.
    present = run.root.children(run.path("checkpoints"))
    whole, counting = run.complete(), run.checkpoints()
    ours = [ref for ref in counting if ref.step <= newest.step]
    regular = [ref for ref in ours if ref.step % every_steps == 0]
    others = [ref for ref in ours if ref not in regular]
    kept = {newest, *[*regular, *others][:keep]}
    for ref in whole:
        if ref not in counting or (ref in ours and ref not in kept):
            run.root.delete(run.path(ref.folder, COMPLETE))  # first it stops counting
            run.root.delete_tree(run.path(ref.folder))
    names = {ref.name for ref in whole}
    for half in map(CheckpointRef.parse, present):
        earlier = half is not None and half.number < attempt.number and half.step <= newest.step
        if half and earlier and half.name not in names:
            run.root.delete_tree(run.path(half.folder))


def try_tidy(
    run: Run, attempt: Attempt, journal: Journal, newest: CheckpointRef, keep: int, every_steps: int
) -> None:
    """``tidy``, where a store that fails is an event and no more: the checkpoint counts."""
    try:
        tidy(run, attempt, newest, keep=keep, every_steps=every_steps)
    except StoreError as error:
        journal.event("checkpoint/untidy", newest.step, reason=str(error))
