"""Every run of a root, from what this machine remembers and from the root where that is too old.

``read_indexed`` gives the same figures as ``read_histories`` (``tessera.tracking.condense`` says
how a journal becomes few records), and reads:

* nothing of a run that is over: finished an hour ago by attempts that all said how they ended, or
  a day ago by others. In a store it is looked at again once in an hour, in case somebody put
  another run in its place; in a folder that is seen from the times of its files.
* one listing of any other run, and if that shows something new, its small records and those
  segments of its journals that are new: of a run that trains, the last one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from tessera.errors import DamagedError, NotFoundError
from tessera.ledger.invoices import FOLDER as BILLS
from tessera.runs import Attempt, CheckpointRef, Ending, Run, RunRecord, Segment, open_run
from tessera.storage import Root, canonical_json, sha256_bytes
from tessera.tracking.condense import Cut, Stretch, condense
from tessera.tracking.history import (
    AttemptHistory,
    Histories,
    RunHistory,
    assemble,
    try_history,
)
from tessera.tracking.invoices import parse_invoices
from tessera.tracking.memory import READERS, Memory, Row
from tessera.tracking.records import Kind, Record, read_segment, segments

Progress = Callable[[int, int, str], None]
"""Called with (runs looked at, runs to look at, run id)."""
OVER_S = 3600.0
OVER_UNSAID_S = 86_400.0
LOOK_AGAIN_S = 3600.0


def read_indexed(
    root: Root,
    memory: Memory,
    *,
    now: float | None = None,
    fresh: bool = False,
    bills: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Histories:
    """``read_histories`` with condensed records; ``fresh`` looks at every run, over or not.

    ``bills`` are the objects of that folder, if they were read already. ``progress`` is called
    after each run that had to be looked at.
    """
    now = time.time() if now is None else now
    known = {} if fresh else memory.runs()
    names = root.children("runs")
    found = {name: _of_memory(root, name, known[name], now) for name in names if name in known}
    rest = [name for name in names if found.get(name) is None]
    with ThreadPoolExecutor(READERS) as pool:
        looks = pool.map(lambda name: _look(root, memory, name, known.get(name), now), rest)
        for number, (name, look) in enumerate(zip(rest, looks, strict=True), 1):
            found[name] = look
            if look.row is not None:  # at once: a look that is interrupted has not been in vain
                memory.keep_runs([look.row])
            if progress is not None:
                progress(number, len(rest), name)
    memory.keep_runs((), gone=known.keys() - set(names))
    read = [look or _Found() for look in (found[name] for name in names)]
    invoices = parse_invoices(root, memory.contents(root, BILLS) if bills is None else bills)
    damaged = {name: f.error for name, f in zip(names, read, strict=True) if f.error}
    whole = [f.history for f in read if f.history and not f.error]
    return Histories(
        tuple(sorted(whole, key=lambda h: (h.run.record.created_at, h.run.id))),
        tuple(f.history for f in read if f.history and f.error),
        dict(sorted({**damaged, **invoices.damaged}.items())),
        invoices.found,
    )


@dataclass(frozen=True)
class _Found:
    """What became of one run: ``row`` if it has to be remembered anew."""

    history: RunHistory | None = None
    error: DamagedError | None = None
    row: Row | None = None


def _of_memory(root: Root, name: str, known: Row, now: float) -> _Found | None:
    """A run that is over, unless it has to be looked at again."""
    body = json.loads(known[3])
    # Looked at since it was over: an attempt that nobody heard of may have written until then.
    if body["over"] is None or known[2] <= body["over"]:
        return None
    place = _place_of(root, name)
    stands = place == body["place"] if place else 0 <= now - known[2] < LOOK_AGAIN_S
    return _Found(_unpack(root, body, now)) if stands else None


def _look(root: Root, memory: Memory, name: str, known: Row | None, now: float) -> _Found:
    place = _place_of(root, name)
    stamps = root.stamps(f"runs/{name}")
    if f"runs/{name}/run.json" not in stamps:
        return _Found()  # what a killed process left before it created the run
    stamp = sha256_bytes(canonical_json(stamps))
    if known is not None and known[1] == stamp:
        return _Found(_unpack(root, json.loads(known[3]), now), row=(name, stamp, now, known[3]))
    try:
        run = open_run(root, name)
    except NotFoundError:
        return _Found()  # deleted since it was listed
    except DamagedError as error:
        return _Found(error=error)
    try:
        history, lasts = _read(run, memory, stamps, now)
    except DamagedError as error:
        return _Found(try_history(run, now, records=False)[0], error)
    body_text = json.dumps(_pack(history, lasts, place))
    return _Found(history, row=(name, stamp, now, body_text))


def _place_of(root: Root, name: str) -> list[int] | None:
    """In a folder: what changes if another run takes this one's place, or an attempt begins."""
    if not root.is_local:
        return None
    found = []
    for part in ("run.json", "attempts"):
        try:
            info = os.stat(f"{root.base}/runs/{name}/{part}")
        except OSError:
            found += [0, 0]
        else:
            found += [info.st_ino, info.st_mtime_ns]
    return found


def _read(
    run: Run, memory: Memory, stamps: Mapping[str, str], now: float
) -> tuple[RunHistory, dict[str, float | None]]:
    """The run with condensed records, and when each attempt was last heard of."""
    lineage = tuple(run.lineage())
    endings = run.endings()
    attempts, lasts = [], {}
    for attempt in run.attempts():
        parts = _condensed(run, attempt, Cut.of(attempt, lineage), memory, stamps)
        lines = tuple(record for part in parts for record in part.records)
        last = max((part.last_time for part in parts if part.count), default=None)
        lasts[attempt.id] = last
        count = sum(part.count for part in parts)
        attempts.append(assemble(run, attempt, endings.get(attempt.id), lines, count, last, now))
    return RunHistory(run, lineage, tuple(attempts)), lasts


def _condensed(
    run: Run, attempt: Attempt, cut: Cut, memory: Memory, stamps: Mapping[str, str]
) -> list[Stretch]:
    """The attempt's journal segment by segment, each from memory if it can be."""
    parts: list[Stretch] = []
    last = 0
    found = segments(run, attempt.id)
    for paths in found:
        newest = paths is found[-1]
        # A segment that appeared since the listing has no stamp and is not remembered.
        told = [stamps.get(path) for path in paths]
        stamp = f"{last} {newest} {told}"
        kept = memory.object(paths[0], stamp) if None not in told else None
        part = _stretch(json.loads(kept)) if kept is not None else None
        if part is None or not part.serves(cut):
            records = read_segment(run, paths, last, newest=newest)
            part = condense(records, cut, last_seq=last)
            if None not in told:
                body = json.dumps(_flat(part)).encode()
                memory.keep_objects([(paths[0], stamp, body)])
        parts.append(part)
        last = part.last_seq
    return parts


# -- as JSON ---------------------------------------------------------------------------------------


def _pack(
    history: RunHistory, lasts: Mapping[str, float | None], place: list[int] | None
) -> dict[str, Any]:
    return {
        "record": asdict(history.run.record),
        "lineage": [[s.attempt, s.after, s.upto] for s in history.lineage],
        "attempts": [
            {
                "attempt": asdict(item.attempt),
                "ending": asdict(item.ending) if item.ending else None,
                "last": lasts[item.attempt.id],
                "records": _rows(item.records),
            }
            for item in history.attempts
        ],
        "over": _over_from(history),
        "place": place,
    }


def _over_from(history: RunHistory) -> float | None:
    """From when on the run is over for good (seconds since the epoch); None: it is not done."""
    if history.done is None:
        return None
    said = all(item.ending is not None for item in history.attempts)
    last = max(item.ended_at for item in history.attempts)
    return last + (OVER_S if said else OVER_UNSAID_S)


def _unpack(root: Root, body: dict[str, Any], now: float) -> RunHistory:
    run = Run(root, RunRecord(**body["record"]))
    attempts = tuple(_unpack_attempt(run, item, now) for item in body["attempts"])
    return RunHistory(run, tuple(Segment(*values) for values in body["lineage"]), attempts)


def _unpack_attempt(run: Run, item: dict[str, Any], now: float) -> AttemptHistory:
    resumed = item["attempt"].pop("resumed_from")
    attempt = Attempt(**item["attempt"], resumed_from=CheckpointRef(**resumed) if resumed else None)
    ending = Ending(**item["ending"]) if item["ending"] else None
    lines = _records(attempt.id, item["records"])
    return assemble(run, attempt, ending, lines, None, item["last"], now)


def _rows(records: Iterable[Record]) -> list[list[Any]]:
    return [[r.kind, r.key, r.value, r.step, r.time, r.seq] for r in records]


def _records(
    attempt: str, rows: Iterable[tuple[Kind, str, Any, int, float, int]]
) -> tuple[Record, ...]:
    return tuple(Record(k, key, value, step, at, attempt, n) for k, key, value, step, at, n in rows)


def _flat(part: Stretch) -> dict[str, Any]:
    return {
        "attempt": part.records[0].attempt if part.records else "",
        "records": _rows(part.records),
        "cut": [part.cut.after, part.cut.upto],
        "rest": [part.count, part.last_seq, part.first_step, part.last_step],
        "last_time": part.last_time if part.count else None,
    }


def _stretch(body: dict[str, Any]) -> Stretch:
    count, last_seq, first_step, last_step = body["rest"]
    last_time = -math.inf if body["last_time"] is None else body["last_time"]
    records = _records(body["attempt"], body["records"])
    return Stretch(records, Cut(*body["cut"]), count, last_seq, first_step, last_step, last_time)
