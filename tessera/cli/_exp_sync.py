"""``tessera-exp sync``: once, or again and again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import strftime
from types import FrameType

import click

from tessera.cli._exp_figures import plural
from tessera.cli._exp_progress import run_progress
from tessera.errors import InputError, RetryElsewhereError
from tessera.promotion.registry import apply_records
from tessera.runs import find_run
from tessera.storage import Root, open_root
from tessera.tracking.follow import follow as keep_on
from tessera.tracking.merge import Annotations
from tessera.tracking.readings import Reader
from tessera.tracking.replay import Progress, SyncReport
from tessera.tracking.replay import sync as replay

_STOPPED = "Stopped; the next sync goes on from here."


@dataclass(frozen=True)
class Synced:
    """A sync of the runs and the registry; ``told`` are sentences about what is not rebuilt."""

    report: SyncReport
    versions: int
    told: tuple[str, ...]


class Pass:
    """Syncs a root as often as it is called, and remembers what it need not read again."""

    def __init__(self, root: Root, tracking_uri: str | None, runs: Sequence[str]) -> None:
        """``runs`` as people name them; none: all."""
        self._root, self._uri, self._runs = root, tracking_uri, runs
        self._annotations, self._reader = Annotations(root), Reader(root)
        self._ids: dict[str, str] = {}

    def __call__(self, progress: Progress | None = None) -> Synced:
        for run in self._runs:
            if run not in self._ids:
                self._ids[run] = find_run(self._root, run).id
        only = list(self._ids.values()) if self._runs else None
        report = replay(
            self._root, self._uri, progress,
            only=only, annotations=self._annotations, reader=self._reader,
        )  # fmt: skip
        told: list[str] = []
        versions = apply_records(self._root, self._uri, told)
        return Synced(report, versions, (*report.not_rebuilt, *told))


def once(root: Root, tracking_uri: str | None, runs: Sequence[str]) -> Sequence[str]:
    """Sync and say what was done; returns sentences about what is damaged."""
    with run_progress("syncing") as progress:
        done = Pass(root, tracking_uri, runs)(progress)
    click.echo(summary(done))
    for sentence in _told(done):
        click.echo(sentence)
    return done.report.damaged


def _told(done: Synced) -> list[str]:
    return [*(f"Not rebuilt: {sentence}" for sentence in done.told), *done.report.remarks]


def summary(done: Synced) -> str:
    """One line about a sync."""
    report = done.report
    again = sum(run.rebuilt for run in report.runs)
    parts = [f"{report.created} new", f"{report.points:,} points added"]
    if again:
        parts.append(f"{again} made again because its records changed")
    if report.imported:
        parts.append(f"{plural(report.imported, 'edit')} taken over from MLflow")
    if done.versions:
        parts.append(plural(done.versions, "model version"))
    runs = plural(len(report.runs), "run")
    return (
        f"Synced {runs} into {report.tracking_uri} in {report.seconds:.1f} s: {', '.join(parts)}."
    )


def follow(
    root: str, tracking_uri: str | None, runs: Sequence[str], every_s: float, until_finished: bool
) -> int:
    """Sync every ``every_s`` seconds until Ctrl-C or SIGTERM, or until ``runs`` have ended."""
    store = open_root(root)
    sync_once = Pass(store, tracking_uri, runs)

    def ended(done: Synced) -> bool:
        return until_finished and all(status != "running" for _, status in done.report.statuses)

    def beat() -> Synced:
        try:
            return sync_once()
        except InputError as error:
            if any(not _is_there(store, run) for run in runs):
                raise _NotYetError(f"{error} It is looked for again.") from error
            raise

    said = _Said()
    with leaving_when_told():
        keep_on(beat, every_s=every_s, is_last=ended, tell=said.of, say=_say)
    return 0


class _NotYetError(RetryElsewhereError):
    """The run that is to be followed is not there yet."""


def _is_there(root: Root, run: str) -> bool:
    """Whether a run could be meant by ``run``; those that are not may still be created."""
    return any(name.startswith(run) for name in root.children("runs"))


class _Said:
    """What a pass is worth saying: what it did, and each sentence once."""

    def __init__(self) -> None:
        self._sentences: set[str] = set()
        self._first = True

    def of(self, done: Synced) -> str | None:
        report = done.report
        named = _told(done) + [f"Error: {sentence}" for sentence in report.damaged]
        fresh = [sentence for sentence in named if sentence not in self._sentences]
        self._sentences = set(named)
        changed = report.points or report.created or report.imported or done.versions
        lines = [summary(done)] if changed or self._first else []
        self._first = False
        return "\n".join([*lines, *fresh]) or None


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"{strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


@contextmanager
def leaving_when_told() -> Iterator[None]:
    """At Ctrl-C or SIGTERM the process says so and leaves with 0, in the middle of a sync too.

    A sync can be killed anywhere, and the next one continues. An exception in its place would come
    wherever the main thread happens to be, and be lost or printed in a destructor.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):  # nobody reads it
            os.write(2, f"{strftime('%H:%M:%S')} {_STOPPED}\n".encode())
        os._exit(0)

    before = {kind: signal.signal(kind, leave) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
