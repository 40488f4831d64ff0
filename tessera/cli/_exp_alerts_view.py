"""Alerts in words: the table of ``tessera-exp alerts`` and the line below ``tessera-exp list``."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from tessera.cli._exp_figures import plural
from tessera.cli._exp_view import new_console, show_table
from tessera.tracking.alert_records import Sending
from tessera.tracking.alerts import Alert

DAY_S = 24 * 3600.0
_IN_LINE = 3


def last_alerts_line(alerts: Iterable[Alert], now: float) -> str | None:
    """One line about those of the last day, the newest first; None if there are none.

    ``now`` in seconds since the epoch. An alert that is given twice counts once.
    """
    by_id = {alert.id: alert for alert in alerts if now - alert.at <= DAY_S}
    recent = sorted(by_id.values(), key=lambda alert: (-alert.at, alert.id))
    if not recent:
        return None
    shown = [f"{a.run_id} {a.short} ({ago(now - a.at)})" for a in recent[:_IN_LINE]]
    more = f"; {len(recent) - _IN_LINE} more" if recent[_IN_LINE:] else ""
    count = plural(len(recent), "alert")
    return f"{count} in the last day: {'; '.join(shown)}{more}; all: tessera-exp alerts"


def show_alerts(alerts: Sequence[Alert], now: float) -> None:
    """A table, in the order given."""
    rows = [[when(a.at), ago(now - a.at), a.run_id, a.kind, a.text] for a in alerts]
    show_table(new_console(), "", ["when (UTC)", "ago", "run", "alert", "what"], rows)


def as_document(alert: Alert) -> dict[str, Any]:
    """One alert for programs; ``at`` in seconds since the epoch."""
    return {
        "id": alert.id,
        "run_id": alert.run_id,
        "kind": alert.kind,
        "at": alert.at,
        "step": alert.step,
        "attempt": alert.attempt,
        "text": alert.text,
    }


def trouble_sentence(sending: Sending) -> str:
    """What is said of a webhook that did not take an alert; never where it is."""
    return (
        f"Webhook {sending.webhook} of TESSERA_ALERT_WEBHOOK did not take {sending.alert.id}: "
        f"{sending.trouble}; whoever runs `tessera-exp alerts` from a minute on sends it again."
    )


def when(at: float) -> str:
    """Such as ``2026-03-01 14:05``, in UTC."""
    return f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M}"


def ago(seconds: float) -> str:
    """Such as ``5 min ago``, ``3 h ago``, ``2 days ago``."""
    minutes = max(0.0, seconds) / 60
    if minutes < 1:
        return "just now"
    if minutes < 90:
        return f"{minutes:.0f} min ago"
    if minutes < 48 * 60:
        return f"{minutes / 60:.0f} h ago"
    return f"{minutes / 1440:.0f} days ago"
