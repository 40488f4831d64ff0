"""What ``tessera-exp tail`` prints: records become items, items become lines of text or JSON."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tessera.cli._exp_events import EVENTS, worded
from tessera.cli._exp_figures import dollars, duration, loss
from tessera.runs import DIVERGED, FAILED, OUTCOMES_DONE, Attempt, Ending
from tessera.tracking.alerts import Alert
from tessera.tracking.condense import BUDGET_PLANNED
from tessera.tracking.history import ALIVE_S, SURE_PRICES
from tessera.tracking.records import Record
from tessera.tracking.tail import News, RunTail

Item = dict[str, Any]
"""One thing to print. ``what`` is point, evaluation, event, attempt, alert or state."""
_OF_POINT = {
    "train/loss": "loss", "train/tokens_per_s": "tokens_per_s", "cost/usd": "usd",
    "progress/tokens": "tokens", "forecast/seconds_left": "seconds_left",
    "forecast/usd": "usd_at_end",
}  # fmt: skip
_RETRYABLE = 75  # of the exit codes: another machine may help


@dataclass
class Items:
    """Makes items of records. A log point is many records: it is one item once the next comes."""

    total_steps: int | None
    estimated: bool = False
    """Whether the newest attempt's price is an estimate."""
    _pending: Item | None = None
    _attempts: dict[str, Attempt] = field(default_factory=dict)

    def of(self, news: News, *, last: bool) -> list[Item]:
        """The items of one look; a point that may go on is kept for the next unless it is last."""
        self._attempts |= {attempt.id: attempt for attempt in news.began}
        found: list[Item] = []
        seen: str | None = None
        for record in news.records:
            if record.attempt != seen:  # whose records these are is said where they begin
                seen = record.attempt
                found += self._settled() + self._began(news, seen)
            found += self._of_record(record)
        found += self._settled() if last or not news.records else []
        found += [i for a in news.began for i in self._began(news, a.id)]
        found += [_ended_item(attempt, ending) for attempt, ending in news.ended]
        return sorted(found, key=_by_time)

    def _began(self, news: News, attempt_id: str) -> list[Item]:
        attempt = next((a for a in news.began if a.id == attempt_id), None)
        if attempt is None or attempt_id not in self._attempts:
            return []
        del self._attempts[attempt_id]
        self.estimated = attempt.price_source not in SURE_PRICES
        return [_began_item(attempt)]

    def _of_record(self, record: Record) -> list[Item]:
        if record.kind == "metric" and record.key in _OF_POINT:
            return self._add(record, "point", _OF_POINT[record.key])
        if record.kind == "metric" and record.key.startswith("eval/"):
            return self._add(record, "evaluation", record.key.removeprefix("eval/"))
        if record.kind == "event" and record.key in EVENTS:
            if record.key == BUDGET_PLANNED and isinstance(record.value, dict):
                self.total_steps = record.value.get("end_step") or self.total_steps
            item = _item("event", record) | {"key": record.key}
            text = worded(record.key, record.value, record.step)
            return [*self._settled(), item | {"text": text}]
        return []

    def _add(self, record: Record, what: str, name: str) -> list[Item]:
        """The record's number goes to the pending item of its step, else begins another."""
        before: list[Item] = []
        now = self._pending
        if now is None or (now["what"], now["step"], now["attempt"]) != (
            what, record.step, record.attempt,
        ):  # fmt: skip
            before = self._settled()
            now = self._pending = _item(what, record) | {"total_steps": self.total_steps}
            now["estimated"] = self.estimated
        now[name] = record.number
        return before

    def _settled(self) -> list[Item]:
        pending, self._pending = self._pending, None
        return [] if pending is None else [pending]


def _by_time(item: Item) -> tuple[float, int]:
    """Of one moment the earlier attempt's first: it ends, and the next one begins."""
    return item["time"], int(item["attempt"].split("-")[0])


def _item(what: str, record: Record) -> Item:
    return {"what": what, "attempt": record.attempt, "step": record.step, "time": record.time}


def _began_item(attempt: Attempt) -> Item:
    return {
        "what": "attempt", "attempt": attempt.id, "step": None, "time": attempt.started_at,
        "text": f"attempt {attempt.number} began: {_place(attempt)}",
    }  # fmt: skip


def _ended_item(attempt: Attempt, ending: Ending) -> Item:
    reason = f": {ending.reason}" if ending.reason else ""
    outcome = ending.outcome.lower().replace("_", " ")
    return {
        "what": "attempt", "attempt": attempt.id, "step": ending.step, "time": ending.ended_at,
        "text": f"attempt {attempt.number} ended ({outcome}){reason}",
    }  # fmt: skip


def _place(attempt: Attempt) -> str:
    price = attempt.usd_per_hour
    told = "price unknown" if price is None else f"${price:g} an hour"
    nodes = f"{attempt.nodes} x " if attempt.nodes > 1 else ""
    machine = f"{attempt.provider}/{attempt.instance}"
    return f"{nodes}{attempt.devices} x {attempt.device}, {machine}, {told}"


def alert_item(alert: Alert) -> Item:
    """An alert among the lines."""
    return {
        "what": "alert", "attempt": alert.attempt, "step": alert.step, "time": alert.at,
        "kind": alert.kind, "text": alert.text,
    }  # fmt: skip


@dataclass(frozen=True)
class State:
    """How a run stands: ``name`` is waiting, running, silent or ended; ``text`` a sentence."""

    name: str
    attempt: str | None
    heard_s: float | None
    text: str

    @property
    def over(self) -> bool:
        """Whether nothing will come any more."""
        return self.name == "ended"

    def item(self, now: float) -> Item:
        """For JSON; ``heard_s`` is the age of the last record, in seconds."""
        return {
            "what": "state", "state": self.name, "attempt": self.attempt, "step": None,
            "time": now, "heard_s": self.heard_s, "text": self.text,
        }  # fmt: skip


def state_of(tail: RunTail, now: float) -> State:
    """The state after a look; ``now`` in seconds since the epoch."""
    name, newest = tail.run.id, tail.newest
    done = next((e for e in tail.endings.values() if e.outcome in OUTCOMES_DONE), None)
    if newest is None:
        return State("waiting", None, None, f"{name} has no attempt yet.")
    ending = done or tail.endings.get(newest.id)
    who = f"attempt {newest.number}"
    if ending is not None:
        outcome = ending.outcome.lower().replace("_", " ")
        text = f"{name} ended at step {ending.step:,}: {outcome}"
        if done is not None or _is_final(ending):
            return State("ended", newest.id, None, f"{text}.")
        told = f"{name}: {who} ended at step {ending.step:,} ({outcome}); another may follow."
        return State("waiting", newest.id, None, told)
    heard = tail.last_heard if tail.last_heard is not None else newest.started_at
    age = max(0.0, now - heard)
    if age < ALIVE_S:
        points = "" if tail.last_heard is not None else ", no record yet"
        text = f"{name} is running: {who} ({_place(newest)}), last heard of {duration(age)} ago"
        return State("running", newest.id, age, f"{text}{points}.")
    text = (
        f"{name} has died, or its machine cannot reach the root: nothing was heard of {who} for "
        f"{duration(age)}, and it left no ending."
    )
    return State("silent", newest.id, age, text)


def _is_final(ending: Ending) -> bool:
    failed = ending.outcome == FAILED and ending.exit_code != _RETRYABLE
    return failed or ending.outcome == DIVERGED


def as_text(item: Item) -> str:
    """One line; times are UTC."""
    what = item["what"]
    at = f"{datetime.datetime.fromtimestamp(item['time'], datetime.UTC):%H:%M:%S}"
    step = "" if item["step"] is None else f"  step {item['step']:,}"
    if what == "point":
        return f"{at}  {'  '.join(_point_parts(item))}"
    if what == "evaluation":
        figures = ", ".join(f"{key} {loss(value)}" for key, value in _figures(item))
        return f"{at}{step}  evaluation: {figures}"
    if what == "alert":
        return f"{at}{step}  ALERT {item['kind']}: {item['text']}"
    if what == "state":
        return str(item["text"])
    return f"{at}{step}  {item['text']}"


def _point_parts(item: Item) -> Iterator[str]:
    total = "" if item["total_steps"] is None else f"/{item['total_steps']:,}"
    yield f"step {item['step']:,}{total}"
    yield f"loss {loss(item.get('loss'))}"
    if (speed := item.get("tokens_per_s")) is not None:
        yield f"{speed:,.0f} tok/s"
    if (usd := item.get("usd")) is not None:
        yield dollars(usd, item["estimated"])
    if (left := item.get("seconds_left")) is not None and left - left == 0:
        yield f"ETA {duration(left)}"


def _figures(item: Item) -> Sequence[tuple[str, float]]:
    fixed = {"what", "attempt", "step", "time", "total_steps", "estimated"}
    return [(key, value) for key, value in item.items() if key not in fixed]
