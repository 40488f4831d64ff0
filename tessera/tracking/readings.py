"""What a sync reads of a root: the runs that it sends, and of others what the bills need.

A ``Reader`` that is asked again reads nothing of a run that is over and has not changed since.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from tessera.errors import DamagedError
from tessera.runs import Run, scan_runs
from tessera.storage import Root
from tessera.tracking.history import Histories, RunHistory, try_history
from tessera.tracking.index import read_indexed
from tessera.tracking.invoices import read_invoices
from tessera.tracking.lineage import Reading, read_run
from tessera.tracking.memory import remembered

_READERS = 4  # each holds a segment: 4 MB, and some 10 MB once it is parsed


@dataclass(frozen=True)
class Readings:
    """Runs to send, and ``histories`` of all, as ``read_histories`` gives them but condensed."""

    wanted: tuple[Reading, ...]
    histories: Histories


@dataclass(frozen=True)
class _Read:
    """What became of one run: ``rest`` is what bills need of one that is damaged."""

    reading: Reading | None = None
    rest: RunHistory | None = None
    error: DamagedError | None = None


class Reader:
    """Reads a root as often as it is asked to."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._settled: dict[str, tuple[dict[str, str], Reading]] = {}

    def read(self, only: Collection[str] | None = None) -> Readings:
        """Every run, or those that ``only`` names and the bases of fine-tunings among them.

        One that is damaged does not hide the others; one that ``only`` needs is an error.
        """
        return self._all() if only is None else self._some(only)

    def _all(self) -> Readings:
        runs, damaged = scan_runs(self._root)
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(self._try, runs))
        damaged |= {run.id: f.error for run, f in zip(runs, found, strict=True) if f.error}
        invoices = read_invoices(self._root)
        damaged |= invoices.damaged
        wanted = tuple(f.reading for f in found if f.reading is not None)
        histories = Histories(
            tuple(reading.history for reading in wanted),
            tuple(f.rest for f in found if f.rest is not None),
            dict(sorted(damaged.items())),
            invoices.found,
        )
        return Readings(wanted, histories)

    def _some(self, only: Collection[str]) -> Readings:
        with remembered(self._root) as memory:
            read = read_indexed(self._root, memory)
        known = {history.run.id: history for history in read.whole}
        bases = {(known[i].run.record.base or {}).get("run_id") for i in only if i in known}
        chosen = {*only, *bases}
        for name, error in read.damaged.items():
            if name in chosen:
                raise error
        wanted = tuple(self._reading(h.run) for h in read.whole if h.run.id in chosen)
        fresh = {reading.history.run.id: reading.history for reading in wanted}
        whole = tuple(fresh.get(history.run.id, history) for history in read.whole)
        return Readings(wanted, replace(read, whole=whole))

    def _try(self, run: Run) -> _Read:
        try:
            return _Read(self._reading(run))
        except DamagedError as error:
            return _Read(rest=try_history(run, None, records=False)[0], error=error)

    def _reading(self, run: Run) -> Reading:
        """``read_run``, or what it gave before if nothing can have changed since."""
        stamps = self._root.stamps(f"runs/{run.id}")  # first: what comes later is read next time
        before, reading = self._settled.get(run.id, ({}, None))
        if reading is not None and before == stamps:
            return reading
        reading = read_run(run)
        attempts = reading.history.attempts
        if attempts and not any(item.alive for item in attempts):
            self._settled[run.id] = stamps, reading
        return reading
