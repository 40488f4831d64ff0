"""What a sync reads of a root: the runs that it sends, and of others what the bills need.

A ``Reader`` that is asked again reads nothing of a run that is over and has not changed since, and
of others those segments that are new, and those that no checkpoint covers yet if one does now.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from tessera.errors import DamagedError, NotFoundError
from tessera.ledger.invoices import FOLDER as BILLS
from tessera.runs import Run, open_run, scan_runs
from tessera.storage import Root
from tessera.tracking.history import Histories, RunHistory, read_history, try_history
from tessera.tracking.index import LOOK_AGAIN_S
from tessera.tracking.invoices import parse_invoices, read_invoices
from tessera.tracking.lineage import Memos, Reading, read_run
from tessera.tracking.memory import READERS, remembered

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
        self._memos: dict[str, Memos] = {}
        self._neighbours: dict[str, tuple[float, RunHistory]] = {}

    def read(self, only: Collection[str] | None = None) -> Readings:
        """Every run, or those that ``only`` names and the bases of fine-tunings among them.

        With ``only``, of the other runs no more is read than the bills of these need. One that is
        damaged does not hide the others; one that ``only`` needs is an error.
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
        names = self._root.children("runs")
        chosen = self._open(name for name in names if name in only)
        bases = {(run.record.base or {}).get("run_id") for run in chosen} - {r.id for r in chosen}
        chosen += self._open(name for name in names if name in bases)
        wanted = tuple(self._reading(run) for run in chosen)
        if not wanted:
            return Readings((), Histories((), (), {}, {}))
        ours = [reading.history for reading in wanted]
        here = {(i.attempt.provider, i.attempt.instance) for h in ours for i in h.attempts}
        others = [name for name in names if name not in {run.id for run in chosen}]
        with ThreadPoolExecutor(READERS) as pool:
            found = [h for h in pool.map(lambda name: self._neighbour(name, here), others) if h]
        with remembered(self._root) as memory:
            invoices = parse_invoices(self._root, memory.contents(self._root, BILLS))
        histories = Histories((*ours, *found), (), dict(invoices.damaged), invoices.found)
        return Readings(wanted, histories)

    def _open(self, names: Iterable[str]) -> list[Run]:
        found = []
        for name in names:
            with suppress(NotFoundError):  # what a killed process left before it created the run
                found.append(open_run(self._root, name))
        return found

    def _neighbour(self, name: str, here: set[tuple[str, str]]) -> RunHistory | None:
        """What bills need of another run: its records only if it was on one of the instances.

        One that is done is looked at again once in an hour.
        """
        now = time.time()
        at, known = self._neighbours.get(name, (0.0, None))
        if known is None or not 0 <= now - at < LOOK_AGAIN_S:
            self._neighbours.pop(name, None)
            try:
                run = open_run(self._root, name)
                known = read_history(run, records=False)
            except (NotFoundError, DamagedError):  # deleted meanwhile, or its own sync's to tell
                return None
            if known.done is not None and all(item.ending for item in known.attempts):
                self._neighbours[name] = now, known
        places = {(item.attempt.provider, item.attempt.instance) for item in known.attempts}
        if not here & places:
            return known
        found = self._try(known.run)
        return found.rest if found.reading is None else found.reading.history

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
        memos = self._memos.setdefault(run.id, {})
        reading = read_run(run, memos=memos, stamps=stamps)
        attempts = reading.history.attempts
        if attempts and not any(item.alive for item in attempts):
            self._settled[run.id] = stamps, reading
        if reading.history.done is not None:
            del self._memos[run.id]
        return reading
