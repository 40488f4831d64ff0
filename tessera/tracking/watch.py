"""One look at a root: record the alerts that are new, send what is due.

Of a run whose end is recorded the journal is not read again: a root may hold hundreds of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tessera.errors import DamagedError
from tessera.runs import Run, scan_runs
from tessera.storage import Root
from tessera.tracking.alert_records import (
    FRESH_S,
    Recorded,
    Sending,
    read_alerts,
    record,
    recorded_alerts,
    send_again,
    send_new,
)
from tessera.tracking.alerts import Alert, alerts_of
from tessera.tracking.history import RunHistory, bill_all, read_history
from tessera.tracking.invoices import read_invoices
from tessera.tracking.queries import RunSummary, summarise_history
from tessera.tracking.webhooks import Webhook

More = Callable[[Sequence[tuple[RunHistory, RunSummary]], float], Iterable[Alert]]
"""Alerts that do not follow from the records alone, such as offers; of all runs and now."""


@dataclass(frozen=True)
class Look:
    """What one look found: alerts recorded by it, what was sent, sentences about damage."""

    new: tuple[Alert, ...]
    sendings: tuple[Sending, ...]
    troubles: tuple[str, ...]


@dataclass
class Watcher:
    """Looks at a root as often as it is asked to; ``run_id``: at one run alone.

    ``webhooks`` may be none: then alerts are recorded only. ``more`` adds alerts of another kind.
    """

    root: Root
    webhooks: Sequence[Webhook] = ()
    run_id: str | None = None
    more: More | None = None
    _settled: dict[str, RunHistory] = field(default_factory=dict)
    _past: set[str] = field(default_factory=set)

    def look(self, now: float) -> Look:
        """Record and send; ``now`` in seconds since the epoch. Raises ``StoreError``."""
        troubles: list[str] = []
        before = recorded_alerts(self.root, self.run_id)
        known = {found.id for records in before.values() for found in records}
        looked = self._read(before, now, troubles)
        derived = [a for history, summary in looked for a in _last_ending(history, summary, now)]
        if self.more is not None:
            derived += self.more(looked, now)
        claimed = (record(self.root, alert, now) for alert in derived if alert.id not in known)
        new = [alert for alert in claimed if alert is not None]
        sendings = send_new(self.root, new, self.webhooks, now)
        sendings += self._again(before, now, troubles)
        return Look(tuple(new), tuple(sendings), tuple(troubles))

    def _read(
        self, before: Mapping[str, Sequence[Recorded]], now: float, troubles: list[str]
    ) -> list[tuple[RunHistory, RunSummary]]:
        """The runs of which something new may be told; the others count for shared bills alone."""
        runs, damaged = scan_runs(self.root)
        histories, open_ids = [], []
        for run in runs:
            try:
                settled = self._settled_history(run, before, now)
                histories.append(settled or read_history(run, now=now))
                open_ids += [] if settled else [run.id]
            except DamagedError as error:
                damaged[run.id] = error
        mine = (error for name, error in damaged.items() if self.run_id in (None, name))
        troubles += [str(error) for error in mine]
        bills = bill_all(histories, read_invoices(self.root).found)
        return [
            (history, summarise_history(history, bills, now=now))
            for history in histories
            if history.run.id in open_ids
        ]

    def _settled_history(
        self, run: Run, before: Mapping[str, Sequence[Recorded]], now: float
    ) -> RunHistory | None:
        """A run of which nothing will be told, without its records; None of any other.

        That is one whose end is told already (it is recorded last) or that nobody asked for.
        """
        if run.id not in self._settled:
            told = {found.key for found in before.get(run.id, ()) if found.kind == "finished"}
            done = bool(told) and run.finished_by() in told
            other = self.run_id not in (None, run.id)
            if not done and not other:
                return None
            history = read_history(run, now=now, records=False)
            if not done:
                return history
            self._settled[run.id] = history
        return self._settled[run.id]

    def _again(
        self, before: Mapping[str, Sequence[Recorded]], now: float, troubles: list[str]
    ) -> list[Sending]:
        """Retry what an earlier look, or a watcher that died, did not get sent."""
        marks = {webhook.mark for webhook in self.webhooks}
        late = {
            found.id: found
            for records in before.values()
            for found in records
            if marks - found.sent and found.id not in self._past
        }
        read = read_alerts(self.root, late.values(), troubles)
        self._past |= {alert.id for alert in read if now - alert.at > FRESH_S}
        pairs = [(late[alert.id], alert) for alert in reversed(read)]
        return send_again(self.root, pairs, self.webhooks, now)


def _last_ending(history: RunHistory, summary: RunSummary, now: float) -> list[Alert]:
    """A run's alerts, endings last: once those are recorded, so is all before them."""
    return sorted(alerts_of(history, summary, now), key=lambda alert: alert.kind == "finished")
