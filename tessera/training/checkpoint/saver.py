"""Saving beside the training: the loop pays for a copy to host memory, threads do the rest.

One thread writes to the local disk, another uploads to the root, so a slow store does not stop the
frequent local saves. With several ranks every one of them runs the same jobs in the same order in
one thread, because the steps of a job talk to the other ranks.

Nothing here raises into the loop but ``check``: another attempt took over. A disk that is full or a
store that is down costs a checkpoint, is recorded, and the training goes on.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tessera.errors import StoreError, SupersededError, TesseraError
from tessera.experiment import Checkpoint
from tessera.ledger.traffic import UP_BYTES, checkpoint_sentence
from tessera.ledger.traffic import size as bytes_text
from tessera.runs import Attempt, CheckpointRef, Run
from tessera.storage import cache_folder
from tessera.tracking.journal import Journal
from tessera.training.checkpoint.fetch import Loaded
from tessera.training.checkpoint.files import (
    Entries,
    Saved,
    drop_local,
    finish_local,
    local_bytes,
    local_checkpoints,
    partial_folder,
    prune_local,
    seal,
    write_tensors,
)
from tessera.training.checkpoint.publish import (
    complete_checkpoint,
    guard_publication,
    try_tidy,
    upload_files,
)
from tessera.training.checkpoint.staging import HostCopy
from tessera.training.parallel import World

_Job = Callable[[], None]
_Handler = Callable[[Exception], None]
HANGS_S = 600.0
"""A local disk that has not finished a checkpoint after this is left alone."""
WORTH_SAYING_S = 1.0
"""A checkpoint that was in the root faster than this needs no line."""


class Saver:
    """Saves and publishes the states that the loop hands over."""

    def __init__(
        self,
        run: Run,
        attempt: Attempt,
        journal: Journal,
        world: World,
        settings: Checkpoint,
        say: Callable[[str], None],
        loaded: Loaded | None = None,
        bill_traffic: Callable[[int], float] | None = None,
    ) -> None:
        """``loaded`` is the checkpoint that the attempt continues from; ``say`` tells a person.

        ``bill_traffic`` adds uploaded bytes to the bill and returns their dollars.
        """
        self._bill_traffic = bill_traffic
        self._run, self._attempt, self._journal, self._world = run, attempt, journal, world
        self._settings, self._say = settings, say
        self._host = HostCopy(world.device)
        self._writer = _Worker("checkpoint-writer")
        self._uploader = _Worker("checkpoint-upload") if world.size == 1 else self._writer
        self._writing = self._uploading = 0
        self._lock = threading.Lock()
        self._held: set[str] = set()
        self._owed = False
        self._cancelled = threading.Event()
        self._error: Exception | None = None
        self._latest: Saved | None = None
        self._bytes_per_s: float | None = None
        self._begun_at = self.local_step = self.root_step = 0
        if loaded is not None:
            self._begun_at = self.local_step = loaded.ref.step
            self.root_step = -1 if loaded.local else loaded.ref.step

    # -- the loop's side -------------------------------------------------------------------------

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the host memory now: allocating it costs seconds, once."""
        self._host.take(tensors)

    def check_room(self, tensors: Mapping[str, Tensor]) -> None:
        """Say so if the local disk will be too small; what is there already counts as room."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        due = (self._settings.local_keep + 2) * size  # kept, being uploaded, being written
        have = shutil.disk_usage(cache_folder()).free + local_bytes(self._run)
        if have < due:
            self._say(
                f"{cache_folder()} has room for {bytes_text(have)}, checkpoints may take "
                f"{bytes_text(due)}; free some space or point TESSERA_CACHE at a larger disk, or "
                "saves will fail"
            )

    def check(self) -> None:
        """Raise what ended the saving for good: another attempt took over, or an error of ours."""
        if self._error is not None:
            raise self._error

    def due(self, done: int) -> bool:
        """Whether a save belongs after step ``done``."""
        local = self._settings.local_every_steps
        return self.permanent(done) or (local is not None and done % local == 0)

    def permanent(self, done: int) -> bool:
        """Whether the checkpoint of ``done`` belongs into the root."""
        return done % self._settings.every_steps == 0

    def save(
        self,
        step: int,
        tensors: Callable[[], Mapping[str, Tensor]],
        state: Callable[[], Mapping[str, Any]],
    ) -> bool:
        """Save the state after ``step`` steps; whether it was taken.

        Waits for the copy to host memory. While the one before is still being written a permanent
        save waits for that too, a frequent one is left out. While an upload is under way a
        permanent save stays local, and the next one is uploaded instead.
        """
        writing = self._world.any(self._writing > 0)
        uploading = self._world.any(self._uploading > 0)
        permanent = self.permanent(step) or self._owed
        if writing and not permanent:
            return False
        self.wait_written(time.monotonic() + HANGS_S)
        if self._world.any(self._writing > 0):
            reason = f"the local disk has not answered for {HANGS_S:.0f} s"
            self._journal.event("checkpoint/failed", step, reason=reason)
            self._say(f"No checkpoint at step {step}: {reason}.")
            return False
        upload = permanent and not uploading
        self._owed = permanent and not upload
        if self._owed:
            self._journal.event("checkpoint/postponed", step, reason="an upload is under way")
        self._take(step, tensors(), state(), upload)
        return True

    def save_last(
        self,
        step: int,
        tensors: Callable[[], Mapping[str, Tensor]],
        state: Callable[[], Mapping[str, Any]],
        deadline: float,
    ) -> None:
        """Save before leaving: to the local disk, then to the root if that fits ``deadline``.

        ``deadline`` is of ``time.monotonic``.
        """
        self.wait_written(deadline)
        if self._world.any(self._writing > 0):
            return  # the disk hangs; what was saved before has to do
        if step == self._begun_at:
            return  # nothing was done since
        if self._latest is None or self._latest.ref.step < step:
            state_ = dict(tensors())
            size = sum(tensor.numel() * tensor.element_size() for tensor in state_.values())
            self._take(step, state_, state(), upload=self._fits(size, deadline, step))
        elif self._world.any(self.root_step < step) and self._fits(
            self._latest.bytes, deadline, step
        ):
            self._count(uploading=1)
            self._hold(self._latest)
            self._queue_upload(self._latest)
        if not self.finish(deadline):
            self._cancelled.set()
            self._journal.event("checkpoint/abandoned", step, reason="the grace period is over")

    def wait_written(self, deadline: float | None = None) -> None:
        """Wait until the host memory is free again."""
        self._wait(lambda: self._writing == 0, deadline)

    def finish(self, deadline: float | None = None) -> bool:
        """Wait until everything is saved and uploaded; whether it was in time."""
        self._wait(lambda: self._writing + self._uploading == 0, deadline)
        return self._writing + self._uploading == 0

    def _wait(self, over: Callable[[], bool], deadline: float | None) -> None:
        while not over() and self._error is None:
            if deadline is not None and time.monotonic() >= deadline:
                return
            time.sleep(0.002)

    def _fits(self, size: int, deadline: float, step: int) -> bool:
        """Whether an upload of ``size`` bytes is worth beginning, by the speed of the last one."""
        left = deadline - time.monotonic()
        speed = self._bytes_per_s
        slow = speed is not None and size / speed > left
        if self._world.any(self._uploading > 0 or slow):
            self._journal.event("checkpoint/stays_local", step, reason=f"{left:.0f} s are left")
            return False
        return True

    def _take(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], upload: bool
    ) -> None:
        began = time.monotonic()
        staged = self._host.take(tensors)
        self._journal.metric("checkpoint/stall_s", time.monotonic() - began, step)
        ref = CheckpointRef(step, self._attempt.id)
        self._count(writing=1, uploading=int(upload))
        self._writer.add(lambda: self._write(ref, staged, dict(state), upload), self._give_up)

    def _give_up(self, error: Exception) -> None:
        """An error that no save survives; the loop's next ``check`` raises it."""
        self._error = error

    # -- the threads' side -----------------------------------------------------------------------

    def _write(
        self, ref: CheckpointRef, staged: dict[str, Tensor], state: dict[str, Any], upload: bool
    ) -> None:
        queued = False
        try:
            saved = self._write_making_room(ref, staged, state)
            self._latest = saved
            self.local_step = ref.step
            if upload:
                self._hold(saved)
                self._queue_upload(saved)
                queued = True
            if self._world.local_rank == 0:
                prune_local(self._run, self._settings.local_keep, self._in_use(), ref)
        except StoreError as error:
            self._report_failure(ref, error)
        finally:
            self._count(writing=-1, uploading=-1 if upload and not queued else 0)

    def _write_making_room(
        self, ref: CheckpointRef, staged: dict[str, Tensor], state: dict[str, Any]
    ) -> Saved:
        """Write; if that fails, once more without the local checkpoints that the root covers.

        One that is further than the root's stays: it may be all that the run has.
        """
        try:
            return self._write_local(ref, staged, state)
        except StoreError:
            dropped = 0
            if self._world.local_rank == 0:
                shutil.rmtree(partial_folder(self._run, ref), ignore_errors=True)
                for old in local_checkpoints(self._run):
                    if old.step <= self.root_step and old.name not in self._in_use():
                        drop_local(self._run, old)
                        dropped += 1
            if not any(self._world.gather(dropped, background=True)):
                raise
        try:
            return self._write_local(ref, staged, state)
        except StoreError:
            if self._world.local_rank == 0:
                shutil.rmtree(partial_folder(self._run, ref), ignore_errors=True)
            raise

    def _in_use(self) -> set[str]:
        with self._lock:
            return set(self._held)

    def _hold(self, saved: Saved) -> None:
        with self._lock:
            self._held.add(saved.ref.name)

    def _queue_upload(self, saved: Saved) -> None:
        self._uploader.add(lambda: self._publish(saved), self._give_up)

    def _write_local(
        self, ref: CheckpointRef, staged: dict[str, Tensor], state: dict[str, Any]
    ) -> Saved:
        world, partial = self._world, partial_folder(self._run, ref)
        if world.local_rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if world.size > 1:
            world.gather(None, background=True)  # nobody writes into a folder that is being removed
        own: Entries = {}
        failure: str | None = None
        try:
            own = write_tensors(partial, staged, world.rank, world.background)
        except StoreError as error:
            failure = str(error)
        parts = world.gather((own, failure), background=True)
        failures = [said for _, said in parts if said]
        if failures:
            raise StoreError(f"No checkpoint at step {ref.step}: {failures[0]}.")
        files = {name: entry for entries, _ in parts for name, entry in entries.items()}
        nodes = -(-world.size // world.local_size)
        record = seal(ref, files, state, nodes)
        folder = partial.with_name(ref.name)
        failure = None
        if world.local_rank == 0:
            try:
                finish_local(self._run, ref, record)
            except StoreError as error:
                failure = str(error)
        failures = [said for said in world.gather(failure, background=True) if said]
        if failures:
            raise StoreError(f"No checkpoint at step {ref.step}: {failures[0]}.")
        return Saved(ref, folder, record, tuple(own))

    def _publish(self, saved: Saved) -> None:
        try:
            self._publish_all(saved)
        except SupersededError as error:
            self._error = error
        except TesseraError as error:
            self._report_failure(saved.ref, error)
        finally:
            with self._lock:
                self._held.discard(saved.ref.name)
            self._count(uploading=-1)

    def _publish_all(self, saved: Saved) -> None:
        world, main = self._world, self._world.is_main
        began = time.monotonic()
        failure: TesseraError | None = None
        sent = 0
        try:
            if main:
                guard_publication(self._run, self._attempt)
            sent = upload_files(self._run, saved, lambda: not self._cancelled.is_set())
        except TesseraError as error:
            failure = error
        parts = world.gather((sent, failure), background=True)
        failures = [error for _, error in parts if error is not None]
        if failures:
            raise failures[0]
        if any(count < 0 for count, _ in parts):
            return  # cancelled; the next attempt removes what is there
        failure = None
        if main:
            try:
                self._seal_published(saved, sum(count for count, _ in parts), began)
            except TesseraError as error:
                failure = error
        for said in world.gather(failure, background=True):
            if said is not None:
                raise said
        self.root_step = max(self.root_step, saved.ref.step)

    def _seal_published(self, saved: Saved, sent: int, began: float) -> None:
        step, usd = saved.ref.step, 0.0
        if not self._run.root.is_local:  # before COMPLETE: its flush brings the bill to the root
            self._journal.metric(UP_BYTES, sent, step)
            usd = self._bill_traffic(sent) if self._bill_traffic else 0.0
        complete_checkpoint(self._run, self._attempt, self._journal, saved)
        seconds = max(time.monotonic() - began, 1e-6)
        self._bytes_per_s = sent / seconds
        self._journal.metric("checkpoint/upload_s", seconds, step)
        if seconds > WORTH_SAYING_S:
            self._say(checkpoint_sentence(step=step, sent=sent, seconds=seconds, usd=usd))
        keep, every = self._settings.keep, self._settings.every_steps
        try_tidy(self._run, self._attempt, self._journal, saved.ref, keep, every)

    def _report_failure(self, ref: CheckpointRef, error: TesseraError) -> None:
        self._journal.event("checkpoint/failed", ref.step, reason=str(error))
        text = str(error)
        self._say(text if text.startswith("No checkpoint") else f"No checkpoint: {text}")

    def _count(self, *, writing: int = 0, uploading: int = 0) -> None:
        with self._lock:
            self._writing += writing
            self._uploading += uploading


class _Worker:
    """A daemon thread that works off jobs: leaving the process never waits for it."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[_Job, _Handler]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def add(self, job: _Job, failed: _Handler) -> None:
        """Do it after those that came before; ``failed`` learns of what it raises."""
        self._jobs.put((job, failed))

    def _work(self) -> None:
        while True:
            job, failed = self._jobs.get()
            try:
                job()
            except Exception as error:
                failed(error)
            except SystemExit as error:  # how rich leaves when nobody reads its output any more
                failed(StoreError(f"the terminal went away ({error})"))
