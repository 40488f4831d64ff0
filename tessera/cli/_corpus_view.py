"""What ``tessera corpus`` shows: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from tessera.corpus.manifest import Manifest
from tessera.corpus.progress import Progress, ProgressCallback

_LINE_EVERY_S = 5.0


@contextmanager
def progress_view() -> Iterator[ProgressCallback]:
    """Bars with a remaining time on a terminal; elsewhere plain lines, at most one in 5 s."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Bytes(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                for earlier in tasks.values():
                    _finish(bars, earlier)
                tasks[progress.stage] = bars.add_task(
                    progress.stage, total=progress.total, counted=progress.total is not None
                )
            bars.update(tasks[progress.stage], completed=progress.done)

        yield show
        for task in tasks.values():
            _finish(bars, task)


class _Bytes(DownloadColumn):
    """Bytes done, for the stages that count them."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["counted"] else Text()


def _finish(bars: RichProgress, task: TaskID) -> None:
    """Stop a bar whose stage is over, also one that never knew its total."""
    completed = next(t.completed for t in bars.tasks if t.id == task)
    bars.update(task, total=max(completed, 1), completed=max(completed, 1))
    bars.stop_task(task)


class _Lines:
    """Progress for a log: one line now and then, with how much is left."""

    def __init__(self) -> None:
        self._stage = ""
        self._began = 0.0
        self._printed = float("-inf")

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._began = progress.stage, now
        if now - self._printed < _LINE_EVERY_S:
            return
        self._printed = now
        line = f"{progress.stage} ..."
        if progress.total and progress.done:
            left = (now - self._began) * (progress.total / progress.done - 1)
            done = f"{progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"
            line = f"{progress.stage}: {done}, about {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


def show_manifest(manifest: Manifest) -> None:
    """Two tables on stdout: the splits, and what became of every source."""
    vocabulary = f"{manifest.tokenizer.vocab_size:,}"
    splits = _table(
        f"{manifest.name} {manifest.fingerprint[:12]}, vocabulary {vocabulary}",
        "split",
        "documents",
        "tokens",
        "text bytes",
        "bytes/token",
        "unigram nats",
        "shards",
    )
    for name, split in manifest.splits.items():
        splits.add_row(
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{split.text_bytes:,}",
            f"{split.text_bytes / max(split.tokens, 1):.3f}",
            f"{split.unigram_entropy_nats:.4f}",
            str(len(split.shards)),
        )
    sources = _table(
        "sources", "source", "read", "empty", "duplicates", "held out", "tokens", "licence"
    )
    for source in manifest.sources:
        clean, dedup, holdout = (
            source.step(name) for name in ("normalise", "exact_dedup", "holdout")
        )
        sources.add_row(
            source.name,
            f"{clean.documents_in:,}",
            f"{clean.documents_in - clean.documents_out:,}",
            f"{dedup.documents_in - dedup.documents_out:,}",
            f"{holdout.documents_in - holdout.documents_out:,}",
            f"{dedup.tokens_out:,}",
            source.licence + (" (synthetic)" if source.synthetic else ""),
        )
    _print(splits, sources)


def show_builds(builds: Sequence[Manifest]) -> None:
    """One row a build, on stdout."""
    table = _table(
        "corpora", "name", "vocabulary", "train tokens", "eval tokens", "fingerprint", "built"
    )
    for build in builds:
        tokens = {name: f"{split.tokens:,}" for name, split in build.splits.items()}
        table.add_row(
            build.name,
            f"{build.tokenizer.vocab_size:,}",
            tokens.get("train", "-"),
            tokens.get("eval", "-"),
            build.fingerprint[:12],
            build.built_at,
        )
    _print(table)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        left = name in {"licence", "fingerprint", "built"}
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _print(*tables: Table) -> None:
    # Cut to 80 columns in a log, figures would be lost: a file gets all the width that it needs.
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        console.print(table)
