"""How far a look at many runs has come: on stderr, and only where it takes a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_EVERY_S = 5.0
RunProgress = Callable[[int, int, str], None]
"""Called with (runs done, runs in all, run id)."""


@contextmanager
def run_progress(doing: str) -> Iterator[RunProgress]:
    """A bar with the time that is left on a terminal; elsewhere a line now and then.

    ``doing`` is a word such as ``syncing``. Nothing is shown before the first call.
    """
    if not sys.stderr.isatty():
        yield _lines(doing)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bars.add_task(doing, total=None)

    def show(done: int, total: int, run_id: str) -> None:
        bars.start()
        bars.update(task, description=f"{doing} {run_id}", completed=done, total=total)

    try:
        yield show
    finally:
        bars.stop()


def _lines(doing: str) -> RunProgress:
    printed = time.monotonic()

    def tell(done: int, total: int, run_id: str) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _LINE_EVERY_S:
            printed = time.monotonic()
            print(f"{doing} {run_id} ({done:,} of {total:,} done)", file=sys.stderr, flush=True)

    return tell
