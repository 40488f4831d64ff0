"""One look at a root: record the alerts that are new, send what is due.

Runs are read through this machine's memory (``tessera.tracking.index``), so a look costs what
``tessera-exp list`` costs: a listing for each run that is not over, and what is new of its journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
from tessera.tracking.history import RunHistory
from tessera.tracking.index import read_indexed
from tessera.tracking.memory import remembered
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
    _past: set[str] = field(default_factory=set)

    def look(self, now: float) -> Look:
        """Record and send; ``now`` in seconds since the epoch. Raises ``StoreError``."""
        troubles: list[str] = []
        before = recorded_alerts(self.root, self.run_id)
        known = {found.id for records in before.values() for found in records}
        looked = self._read(now, troubles)
        derived = [a for history, summary in looked for a in alerts_of(history, summary, now)]
        if self.more is not None:
            derived += self.more(looked, now)
        claimed = (record(self.root, alert, now) for alert in derived if alert.id not in known)
        new = [alert for alert in claimed if alert is not None]
        sendings = send_new(self.root, new, self.webhooks, now)
        sendings += self._again(before, now, troubles)
        return Look(tuple(new), tuple(sendings), tuple(troubles))

    def _read(self, now: float, troubles: list[str]) -> list[tuple[RunHistory, RunSummary]]:
        """The runs to look at and their figures; of those that are over nothing is read again."""
        with remembered(self.root) as memory:
            found = read_indexed(self.root, memory, now=now)
        mine = (error for name, error in found.damaged.items() if self.run_id in (None, name))
        troubles += [str(error) for error in mine]
        return [
            (history, summarise_history(history, found.bills, now=now))
            for history in found.whole
            if self.run_id in (None, history.run.id)
        ]

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
