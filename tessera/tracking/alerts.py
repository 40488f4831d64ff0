"""What a person should hear of without looking: derived from a run's records, nothing is kept here.

    died        an attempt stopped without an ending and is not alive; once a silence
    spike       steps were not applied, or the run went back; steps near each other are one
    budget      four fifths of the budget are spent; once for a run and its budget
    finished    the run ended: well, by its budget, diverged, failed; once for each such ending
    offer       the same GPU is to be had for less (told by who knows offers: ``offer_alert``)

What an alert is about makes its name (run, kind, attempt or step), so that deriving it again, on
another machine or a day later, gives the same one. How alerts are recorded and sent:
``tessera.tracking.alert_records``.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from tessera.runs import BUDGET, DIVERGED, FAILED, FINISHED, OUTCOMES_DONE, Ending
from tessera.tracking.condense import ROLLED_BACK, SKIPPED
from tessera.tracking.history import AttemptHistory, RunHistory
from tessera.tracking.queries import RunSummary
from tessera.tracking.records import Record

AlertKind = Literal["died", "spike", "budget", "finished", "offer"]
ALERT_KINDS: tuple[AlertKind, ...] = get_args(AlertKind)
BUDGET_SHARE = 0.8
"""From this part of its budget on a run is told of."""
SAME_SPIKE_STEPS = 10
"""Steps that were not applied and lie no further apart are one alert ..."""
LONGEST_SPIKE_STEPS = 100
"""... unless the first of them is this far back."""
_TOLD = frozenset({FINISHED, BUDGET, DIVERGED, FAILED})
_ENDED = {
    FINISHED: "finished", BUDGET: "ended by its budget", DIVERGED: "diverged", FAILED: "failed",
}  # fmt: skip

_SHORT = {
    "died": "died", "spike": "spike", "budget": "most of the budget spent",
    "offer": "cheaper offer",
}  # fmt: skip


@dataclass(frozen=True)
class Alert:
    """One thing to tell. ``at`` (seconds since the epoch) is when it happened, not when seen.

    ``key`` says which one of its kind in the run: letters, digits, dots and hyphens. ``text`` is a
    sentence without the run's name. ``step`` and ``attempt`` are None where they mean nothing.
    """

    run_id: str
    kind: AlertKind
    key: str
    at: float
    text: str
    step: int | None = None
    attempt: str | None = None

    @property
    def id(self) -> str:
        """``<run id>/<kind>-<key>``: the same whenever it is derived."""
        return f"{self.run_id}/{self.kind}-{self.key}"

    @property
    def short(self) -> str:
        """A few words, such as ``died at step 300``."""
        if self.kind == "finished":
            return self.text.split(",")[0]
        at = "" if self.step is None else f" at step {self.step:,}"
        return f"{_SHORT[self.kind]}{at}"


def alerts_of(history: RunHistory, summary: RunSummary, now: float) -> tuple[Alert, ...]:
    """Every alert of one run, oldest first; ``summary`` is of the same moment.

    ``now`` is in seconds since the epoch. ``history`` has its records, whole or condensed.
    """
    found = [
        *_died(history),
        *_spikes(history),
        *_rollbacks(history),
        *_budget(history, summary, now),
        *_ended(history, summary),
    ]
    return tuple(sorted(found, key=lambda alert: (alert.at, alert.id)))


def offer_alert(
    run_id: str, attempt: str, at: float, text: str, *, step: int | None = None
) -> Alert:
    """The alert that ``attempt`` could go on elsewhere for less; at most one a day (UTC)."""
    day = datetime.datetime.fromtimestamp(at, datetime.UTC).date()
    return Alert(run_id, "offer", f"{attempt}-{day}", at, text, step, attempt)


def _died(history: RunHistory) -> Iterator[Alert]:
    for item in history.attempts:
        if not item.estimated:
            continue
        a, step = item.attempt, _last_step(item)
        place = "before its first step" if step is None else f"at step {step:,}"
        later = any(other.attempt.number > a.number for other in history.attempts)
        now_on = "a later attempt went on" if later else "no other attempt has begun"
        yield Alert(
            history.run.id,
            "died",
            f"{a.id}-{int(item.ended_at)}",  # after a silence it may live on, and die once more
            item.ended_at,
            f"attempt {a.number} ({a.provider}/{a.instance}) died {place}: it was last heard of at "
            f"{_clock(item.ended_at)} and left no ending; {now_on}.",
            step,
            a.id,
        )


def _spikes(history: RunHistory) -> Iterator[Alert]:
    """A step that a later attempt did again and skipped again is the same one."""
    first_seen: dict[int, Record] = {}
    for record in _events(history, SKIPPED):
        first_seen.setdefault(record.step, record)
    for steps in _grouped(sorted(first_seen)):
        record = first_seen[steps[0]]
        many = f"{len(steps)} steps from step {steps[0]:,} on were" if steps[1:] else (
            f"step {steps[0]:,} was"
        )  # fmt: skip
        details = record.value if isinstance(record.value, dict) else {}
        loss, norm = _figure(details.get("loss")), _figure(details.get("grad_norm"))
        yield Alert(
            history.run.id,
            "spike",
            str(steps[0]),
            record.time,
            f"{many} not applied: loss {loss}, gradient norm {norm} at the first.",
            steps[0],
            record.attempt,
        )


def _grouped(steps: Iterable[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for step in steps:
        near = groups and step - groups[-1][-1] <= SAME_SPIKE_STEPS
        if near and step - groups[-1][0] < LONGEST_SPIKE_STEPS:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _rollbacks(history: RunHistory) -> Iterator[Alert]:
    for record in _events(history, ROLLED_BACK):
        details = record.value if isinstance(record.value, dict) else {}
        back, reason = details.get("to_step"), str(details.get("reason", "no reason was given"))
        to = f"to step {back:,}" if isinstance(back, int) else "to an earlier step"
        yield Alert(
            history.run.id,
            "spike",
            f"{record.attempt}-back",
            record.time,
            f"went back from step {record.step:,} {to}: {reason.rstrip('.')}.",
            record.step,
            record.attempt,
        )


def _budget(history: RunHistory, summary: RunSummary, now: float) -> Iterator[Alert]:
    """Nothing for a run that is done: its ending says what it cost."""
    budget = history.run.record.experiment.get("budget_usd")
    if not isinstance(budget, int | float) or budget <= 0 or history.done is not None:
        return
    cost = summary.cost_usd
    if cost is None or cost < BUDGET_SHARE * budget:
        return
    about = "about " if summary.cost_estimated else ""
    ends = [item.ended_at for item in history.attempts]
    yield Alert(
        history.run.id,
        "budget",
        f"{100 * BUDGET_SHARE:g}-{budget:g}",
        min(now, max(ends, default=now)),
        f"{about}${cost:,.2f} of its budget of ${budget:g} are spent ({cost / budget:.0%}).",
        summary.step if summary.live_step is None else summary.live_step,
    )


def _ended(history: RunHistory, summary: RunSummary) -> Iterator[Alert]:
    done = history.done
    for item in history.attempts:
        ending = item.ending
        if ending is None or ending.outcome not in _TOLD:
            continue
        if ending.outcome in OUTCOMES_DONE and ending is not done:
            continue  # a second attempt that came to the same end
        yield Alert(
            history.run.id,
            "finished",
            item.attempt.id,
            ending.ended_at,
            _ending_text(ending, summary),
            ending.step,
            item.attempt.id,
        )


def _ending_text(ending: Ending, summary: RunSummary) -> str:
    well = ending.outcome in OUTCOMES_DONE
    loss = summary.final_loss
    parts = [f"{_ENDED[ending.outcome]} at step {ending.step:,}"]
    parts.append("no evaluation" if loss is None else f"last evaluation {loss:.4f}")
    about, cost = "about " if summary.cost_estimated else "", summary.cost_usd
    parts.append("price unknown" if cost is None else f"{about}${cost:,.2f}")
    why = "" if well or not ending.reason else f" ({ending.reason.rstrip('.')})"
    return f"{', '.join(parts)}{why}."


def _events(history: RunHistory, key: str) -> list[Record]:
    """Of all attempts, lost ones too: what happened there was paid for. Oldest first."""
    found = [
        record
        for item in history.attempts
        for record in item.records
        if record.kind == "event" and record.key == key
    ]
    return sorted(found, key=lambda record: (record.time, record.attempt, record.seq))


def _last_step(item: AttemptHistory) -> int | None:
    steps = (r.step for r in item.records if r.kind == "metric" and r.step > 0)
    return max(steps, default=None)


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _clock(at: float) -> str:
    return f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M} UTC"
