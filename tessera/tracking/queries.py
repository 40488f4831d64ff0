"""The questions people ask of a root: how good is each run, and what did it cost?

No MLflow here: the answers come from the records of the root, so they are the same on a laptop that
never synced anything. Losses are of the surviving lineage alone (see ``tessera.tracking.history``);
dollars are of every attempt, the lost ones too, since those were paid for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from tessera.errors import DamagedError
from tessera.ledger.meter import CATEGORIES, Bill
from tessera.ledger.prices import PriceChange
from tessera.ledger.traffic import plus_traffic
from tessera.runs import (
    BUDGET,
    DIVERGED,
    FAILED,
    FINISHED,
    PREEMPTED,
    ROLLED_BACK,
    SUPERSEDED,
    Run,
)
from tessera.storage import Root
from tessera.tracking.condense import BUDGET_PLANNED
from tessera.tracking.history import (
    ALIVE_S,
    SURE_PRICES,
    AttemptHistory,
    RunHistory,
    bill_all,
    bills_of,
    file_attempt,
    last_number,
    read_histories,
    read_with_neighbours,
)
from tessera.tracking.index import read_indexed
from tessera.tracking.invoices import read_invoices
from tessera.tracking.memory import Memory
from tessera.tracking.records import Record

Status = Literal["finished", "budget", "running", "died", "failed", "diverged", "preempted"]
STATUSES: tuple[Status, ...] = get_args(Status)
TRAFFIC = "traffic"
_BY_OUTCOME: dict[str, Status] = {
    FINISHED: "finished", BUDGET: "budget", DIVERGED: "diverged",
    PREEMPTED: "preempted", FAILED: "failed", ROLLED_BACK: "died",
}  # fmt: skip


@dataclass(frozen=True)
class RunSummary:
    """One run in figures; None is "not known" throughout.

    Losses are nats a token on the frozen evaluation. ``final_loss`` and ``best_loss`` leave the
    base's loss at step 0 of a fine-tuning out (it is ``base_loss``). ``cost_usd`` covers every
    attempt's machine and traffic: what the provider billed where that is recorded
    (``tessera-exp reconcile``), else the ledger's figure, of which ``ledger_usd`` is the sum over
    all; ``billed_usd`` is the billed part of it, None where nothing is. ``cost_estimated`` says
    that an end or a price in it is one. ``traffic_usd`` is the ledger's part for the
    ``traffic_bytes`` that were sent to the root and the ``traffic_down_bytes`` that came from it
    (known even where the machine's price is not). ``usd_per_mtok`` is dollars per million tokens.
    ``wall_s`` adds up the attempts from start to end, ``seconds`` files what was billed by
    category. ``metrics`` are the lineage's furthest values of everything else that was measured.
    ``tokens_per_s`` counts the lineage's tokens over its seconds of training and waiting
    for data. ``step`` is covered by a checkpoint or the end, ``live_step`` is beyond it. Times are
    seconds since the epoch; ``ended_at`` is None while the run is running.
    """

    run_id: str
    name: str
    kind: str
    fingerprint: str
    status: Status
    created_at: float
    started_at: float
    ended_at: float | None
    step: int | None
    total_steps: int | None
    live_step: int | None
    live_loss: float | None
    tokens: int | None
    final_loss: float | None
    best_loss: float | None
    base_loss: float | None
    unigram_entropy: float | None
    cost_usd: float | None
    cost_estimated: bool
    ledger_usd: float | None
    billed_usd: float | None
    traffic_usd: float
    traffic_bytes: int
    traffic_down_bytes: int
    usd_per_mtok: float | None
    wall_s: float
    tokens_per_s: float | None
    base: str | None
    attempts: int
    price_sources: tuple[str, ...]
    devices: tuple[str, ...]
    seconds: dict[str, float]
    metrics: dict[str, float]


def summarise(root: Root, *, now: float | None = None) -> list[RunSummary]:
    """Every run of the root, oldest first; ``now`` (seconds since the epoch) is for tests.

    Raises ``DamagedError`` for the first damaged run; ``summarise_whole`` passes them over.
    """
    rows, damaged = summarise_whole(root, now=now)
    for error in damaged.values():
        raise error
    return rows


def summarise_whole(
    root: Root, *, now: float | None = None, memory: Memory | None = None, fresh: bool = False
) -> tuple[list[RunSummary], dict[str, DamagedError]]:
    """Every run that can be read, oldest first, and what is wrong with the others, by run id.

    With a ``memory`` only what changed since it was last asked is read (all of it if ``fresh``).
    """
    if memory is None:
        read = read_histories(root, now=now)
    else:
        read = read_indexed(root, memory, now=now, fresh=fresh)
    return [summarise_history(history, read.bills, now=now) for history in read.whole], read.damaged


def summarise_run(root: Root, run: Run, *, now: float | None = None) -> RunSummary:
    """One run; the bill still looks at all runs, for instances that several of them shared."""
    history, others = read_with_neighbours(Run(root, run.record), now=now)
    bills = bill_all([history, *others], read_invoices(root).found)
    return summarise_history(history, bills, now=now)


def summarise_history(
    history: RunHistory, bills: dict[str, Bill], *, now: float | None = None
) -> RunSummary:
    """One run that was read already; ``bills`` is ``bill_all`` over all runs of the root."""
    record = history.run.record
    own = bills_of(history, bills)
    spent = [_Spent.of(item, own_bill) for item, own_bill in own]
    cost = _sum(each.usd for each in spent)
    billed = [each.billed_usd for each in spent if each.billed_usd is not None]
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for item, own_bill in own:
        for name, value in file_attempt(history, item, own_bill).items():
            seconds[name] += value
    sources = [item.attempt.price_source for item in history.attempts]
    points = history.points
    tokens = last_number(points, "progress/tokens")
    losses, base_loss = _losses(record.kind, points)
    numbers = [loss for loss in losses if not math.isnan(loss)]
    status = _status(history, now)
    live = history.live if history.done is None else None
    ends = [item.ended_at for item in history.attempts]
    return RunSummary(
        run_id=record.run_id,
        name=record.name,
        kind=record.kind,
        fingerprint=record.fingerprint,
        status=status,
        created_at=record.created_at,
        started_at=min((i.attempt.started_at for i in history.attempts), default=record.created_at),
        ended_at=None if status == "running" else max(ends, default=record.created_at),
        step=history.upto,
        total_steps=_planned_steps(history) or total_steps(record.experiment, record.data),
        live_step=live.step if live else None,
        live_loss=_live_loss(history, live),
        tokens=int(tokens) if tokens is not None and math.isfinite(tokens) else None,
        final_loss=losses[-1] if losses else None,
        best_loss=min(numbers) if numbers else (losses[-1] if losses else None),
        base_loss=base_loss,
        unigram_entropy=last_number(points, "eval/unigram_entropy"),
        cost_usd=cost,
        cost_estimated=any(each.estimated for each in spent),
        ledger_usd=_sum(each.ledger_usd for each in spent),
        billed_usd=sum(billed) if billed else None,
        traffic_usd=sum((item.traffic_usd for item in history.attempts), 0.0),
        traffic_bytes=sum(item.traffic_bytes for item in history.attempts),
        traffic_down_bytes=sum(item.traffic_down_bytes for item in history.attempts),
        usd_per_mtok=cost / tokens * 1e6 if cost is not None and tokens else None,
        wall_s=sum(max(0.0, i.ended_at - i.attempt.started_at) for i in history.attempts),
        tokens_per_s=_speed(history, tokens),
        base=(record.base or {}).get("run_id"),
        attempts=len(history.attempts),
        price_sources=tuple(dict.fromkeys(sources)),
        devices=tuple(dict.fromkeys(item.attempt.device for item in history.attempts)),
        seconds=seconds,
        metrics=_furthest(points),
    )


@dataclass(frozen=True)
class _Spent:
    """Dollars of one attempt, machine and traffic: by the ledger, and as billed."""

    ledger_usd: float | None
    billed_usd: float | None
    unsure: bool

    @classmethod
    def of(cls, item: AttemptHistory, own: Bill) -> _Spent:
        unsure = own.estimated or item.attempt.price_source not in SURE_PRICES
        return cls(plus_traffic(own.usd, item.traffic_usd), own.billed_usd, unsure)

    @property
    def usd(self) -> float | None:
        """What counts."""
        return self.ledger_usd if self.billed_usd is None else self.billed_usd

    @property
    def estimated(self) -> bool:
        """Whether what counts rests on an estimate."""
        return self.billed_usd is None and self.unsure


def _sum(figures: Iterable[float | None]) -> float | None:
    """None as soon as one is not known."""
    total = 0.0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total


def _furthest(points: Sequence[Record]) -> dict[str, float]:
    """Of each metric the value at its furthest step."""
    found: dict[str, Record] = {}
    for point in points:
        if point.key not in found or point.step > found[point.key].step:
            found[point.key] = point
    return {key: found[key].number for key in sorted(found)}


def _losses(kind: str, points: Sequence[Record]) -> tuple[list[float], float | None]:
    """Evaluation losses by step, and the base's own for a fine-tuning."""
    evaluated = sorted((p for p in points if p.key == "eval/loss"), key=lambda p: p.step)
    if kind == "pretrain":
        return [point.number for point in evaluated], None
    first = next((point.number for point in evaluated if point.step == 0), None)
    own = [point.number for point in evaluated if point.step > 0]
    said = last_number(points, "eval/base_loss")
    return own or [point.number for point in evaluated], first if said is None else said


def _status(history: RunHistory, now: float | None) -> Status:
    if history.done is not None:
        return _BY_OUTCOME[history.done.outcome]
    if not history.attempts:
        age = (time.time() if now is None else now) - history.run.record.created_at
        return "running" if age < ALIVE_S else "died"
    number = max(item.attempt.number for item in history.attempts)
    latest = [item for item in history.attempts if item.attempt.number == number]
    if any(item.alive for item in latest):
        return "running"
    # Two attempts of one number: the smaller token took over (see ``Run.superseded_by``).
    said = [i.ending.outcome for i in latest if i.ending and i.ending.outcome != SUPERSEDED]
    return _BY_OUTCOME.get(said[0], "failed") if said else "died"


def _planned_steps(history: RunHistory) -> int | None:
    """Steps of a run that a budget ends: those that it had, else those of its latest plan."""
    if history.run.record.experiment.get("budget_usd") is None:
        return None
    if history.done is not None:
        return history.done.step
    plans = [
        record
        for item in history.attempts
        for record in item.records
        if record.kind == "event" and record.key == BUDGET_PLANNED
    ]
    found = max(plans, key=lambda record: record.time, default=None)
    steps = found.value.get("end_step") if found and isinstance(found.value, dict) else None
    return steps if isinstance(steps, int) else None


def total_steps(experiment: dict[str, Any], data: dict[str, Any]) -> int | None:
    """Steps of the whole run, where the experiment or its data says so."""
    tokens, batch = experiment.get("tokens"), experiment.get("batch")
    per_step = batch.get("tokens_per_step") if isinstance(batch, dict) else None
    if isinstance(tokens, int) and isinstance(per_step, int) and per_step > 0:
        return tokens // per_step
    steps = data.get("steps")
    return steps if isinstance(steps, int) else None


def _live_loss(history: RunHistory, live: Record | None) -> float | None:
    """The training loss at or before the live step, of the same attempt."""
    if live is None:
        return None
    records = next(i.records for i in history.attempts if i.attempt.id == live.attempt)
    found = [r for r in records if r.kind == "metric" and r.key == "train/loss"]
    return found[-1].number if found else None


def _speed(history: RunHistory, tokens: float | None) -> float | None:
    working = ("train", "data_wait")
    seconds = sum(span.number for span in history.kept("span") if span.key in working)
    return tokens / seconds if tokens and seconds > 0 else None


@dataclass(frozen=True)
class AttemptSummary:
    """One attempt's bill: ``status`` is its outcome, ``running`` or ``died``; times in s.

    ``estimated``: nobody told the end; ``usd_estimated``: that or the price is a guess.
    ``seconds`` are billed seconds by category. ``usd`` is for those and for the traffic, so that
    the attempts' add up to the run's; None where nobody told the price of an hour. It is
    ``billed_usd`` where that is known, else ``ledger_usd``.
    """

    attempt: str
    status: str
    reason: str
    nodes: int
    device: str
    provider: str
    instance: str
    usd_per_hour: float | None
    price_source: str
    billed_from_source: str
    started_at: float
    ended_at: float
    estimated: bool
    resumed_from: int | None
    machine: str
    price_note: str
    price_changes: int
    usd: float | None
    usd_estimated: bool
    ledger_usd: float | None
    billed_usd: float | None
    usd_per_gb_up: float
    usd_per_gb_down: float
    traffic_bytes: int
    traffic_down_bytes: int
    traffic_usd: float
    seconds: dict[str, float]


def summarise_attempts(history: RunHistory, bills: dict[str, Bill]) -> list[AttemptSummary]:
    """The attempts of a run, in order; ``bills`` is ``bill_all`` over all runs of the root."""
    found = []
    for item, own in bills_of(history, bills):
        a, ending, spent = item.attempt, item.ending, _Spent.of(item, own)
        status = ending.outcome.lower() if ending else "running" if item.alive else "died"
        found.append(
            AttemptSummary(
                attempt=a.id,
                status=status,
                reason=ending.reason if ending else "",
                nodes=a.nodes,
                device=(f"{a.nodes} x " if a.nodes > 1 else "") + f"{a.devices} x {a.device}",
                provider=a.provider,
                instance=a.instance,
                usd_per_hour=a.usd_per_hour,
                price_source=a.price_source,
                billed_from_source=a.billed_from_source,
                started_at=a.started_at,
                ended_at=item.ended_at,
                estimated=own.estimated,
                resumed_from=a.resumed_from.step if a.resumed_from else None,
                machine=a.machine,
                price_note=a.price_note,
                price_changes=_moves(a.usd_per_hour, item.prices),
                usd=spent.usd,
                usd_estimated=spent.estimated,
                ledger_usd=spent.ledger_usd,
                billed_usd=spent.billed_usd,
                usd_per_gb_up=a.usd_per_gb_up,
                usd_per_gb_down=a.usd_per_gb_down,
                traffic_bytes=item.traffic_bytes,
                traffic_down_bytes=item.traffic_down_bytes,
                traffic_usd=item.traffic_usd,
                seconds=file_attempt(history, item, own),
            )
        )
    return found


def _moves(first: float | None, prices: Sequence[PriceChange]) -> int:
    """How often the price became another one."""
    known = [usd for _, usd in sorted(prices)]
    known = known if first is None else [first, *known]
    return sum(before != after for before, after in pairwise(known))


def usd_by_category(attempts: Sequence[AttemptSummary]) -> dict[str, float] | None:
    """Dollars by category of the ledger and ``traffic``, over all attempts.

    They add up to the run's cost; None if a price is unknown. Within an attempt the machine's
    dollars are filed by seconds, at its mean price; a bill moves traffic and machine alike.
    """
    total = dict.fromkeys((*CATEGORIES, TRAFFIC), 0.0)
    for attempt in attempts:
        if attempt.usd is None:
            return None
        scale = attempt.usd / attempt.ledger_usd if attempt.ledger_usd else 0.0
        traffic = attempt.traffic_usd * scale
        total[TRAFFIC] += traffic
        seconds = sum(attempt.seconds.values())
        if seconds <= 0:
            total["idle"] += attempt.usd - traffic
            continue
        for name, filed in attempt.seconds.items():
            total[name] += (attempt.usd - traffic) * filed / seconds
    return total
