"""Alerts in the root: who recorded one first, and which webhooks have had it.

    alerts/<run_id>/<kind>-<key>.json                    created once, never changed
    alerts/<run_id>/<kind>-<key>.<webhook>.sent.json     that webhook took it
    alerts/<run_id>/<kind>-<key>.<webhook>.try-<n>.json  a watcher tries again for everybody

``<webhook>`` are four hex digits that say which, not where (``Webhook.mark``). Of several watchers
the one whose record it became sends at once. What was not taken is sent again by whichever
watcher comes by 1, 2, 4, 8, ... minutes after the record, one watcher for each of those times,
until a day has gone by. So a webhook gets an alert once; twice if a watcher dies between the answer
and its mark, or if a store ignores conditional writes and a watcher stalls between two requests;
and not at all if nobody watches for a day, or it refuses for a day.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from tessera.errors import DamagedError
from tessera.runs import what_is_wrong
from tessera.storage import Root
from tessera.tracking.alerts import ALERT_KINDS, Alert, AlertKind
from tessera.tracking.webhooks import Webhook, send

FOLDER = "alerts"
RETRY_AFTER_S = 60.0
"""From then on a watcher takes it that whoever recorded an alert did not get it sent."""
SETTLE_S = 1.0
"""So long after a record a store that ignores conditional writes is looked at again."""
FRESH_S = 24 * 3600.0
"""What happened longer ago is recorded, and sent to nobody; nor is a failed one tried longer."""
_NAME = re.compile(
    rf"{FOLDER}/(?P<run>[^/]+)/(?P<kind>{'|'.join(ALERT_KINDS)})-(?P<key>[0-9A-Za-z.+-]+?)"
    r"(?:\.(?P<mark>[0-9a-f]{4})\.(?P<what>sent|try-\d+))?\.json"
)
_READERS = 8


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Stored(Alert):
    """What lies in the root: the alert, whose record it is, and since when (seconds)."""

    token: str = ""
    recorded_at: float = 0.0


_STORED = TypeAdapter(Stored)


@dataclass(frozen=True)
class Recorded:
    """A recorded alert as its name in the listing says; ``read`` fetches the rest.

    ``sent`` are the marks of the webhooks that took it, ``tries`` are ``<mark>.try-<n>``.
    """

    run_id: str
    kind: AlertKind
    key: str
    sent: frozenset[str] = frozenset()
    tries: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """As ``Alert.id``."""
        return f"{self.run_id}/{self.kind}-{self.key}"

    @property
    def path(self) -> str:
        """The record, relative to the root."""
        return _path(self.id)


@dataclass(frozen=True)
class Sending:
    """What became of one alert at one webhook; ``trouble`` is a clause, None if it was taken."""

    alert: Alert
    webhook: int
    trouble: str | None


def recorded_alerts(root: Root, run_id: str | None = None) -> dict[str, tuple[Recorded, ...]]:
    """What is recorded, by run id, from one listing; of one run alone where it is named.

    Nothing is read. Within a run they are sorted by kind and key.
    """
    alerts: dict[tuple[str, str, str], tuple[set[str], set[str]]] = {}
    known: set[tuple[str, str, str]] = set()
    for path in root.files(FOLDER if run_id is None else f"{FOLDER}/{run_id}"):
        match = _NAME.fullmatch(path)
        if match is None:
            continue
        name = match["run"], match["kind"], match["key"]
        sent, tries = alerts.setdefault(name, (set(), set()))
        if match["what"] is None:
            known.add(name)
        elif match["what"] == "sent":
            sent.add(match["mark"])
        else:
            tries.add(f"{match['mark']}.{match['what']}")
    found: dict[str, list[Recorded]] = {}
    for name in sorted(known):
        run, kind, key = name
        sent, tries = alerts[name]
        found.setdefault(run, []).append(
            Recorded(run, _KIND[kind], key, frozenset(sent), frozenset(tries))
        )
    return {run: tuple(records) for run, records in found.items()}


_KIND: dict[str, AlertKind] = {kind: kind for kind in ALERT_KINDS}


def read_alerts(
    root: Root, found: Iterable[Recorded], damaged: list[str] | None = None
) -> list[Stored]:
    """The recorded alerts themselves, newest first; eight at a time.

    Sentences about records that are none go to ``damaged``; without it they are a ``DamagedError``.
    """

    def read(one: Recorded) -> Stored | DamagedError:
        try:
            return _read(root, one.path)
        except DamagedError as error:
            return error

    alerts = []
    with ThreadPoolExecutor(_READERS) as pool:
        for one in pool.map(read, found):
            if isinstance(one, Stored):
                alerts.append(one)
            elif damaged is None:
                raise one
            else:
                damaged.append(str(one))
    return sorted(alerts, key=lambda alert: (-alert.at, alert.id))


def parse_alerts(contents: Mapping[str, bytes]) -> list[Stored]:
    """Every recorded alert, newest first, from the objects of ``alerts/`` by path.

    Records that are none are left out: ``read_alerts`` names them.
    """
    alerts = []
    for path, data in contents.items():
        match = _NAME.fullmatch(path)
        if match is not None and match["what"] is None:
            with suppress(ValidationError):
                alerts.append(_STORED.validate_json(data))
    return sorted(alerts, key=lambda alert: (-alert.at, alert.id))


def record(root: Root, alert: Alert, now: float) -> Stored | None:
    """Record ``alert`` at ``now``; None if it was there before or is somebody else's record."""
    stored = Stored(
        **{name.name: getattr(alert, name.name) for name in fields(Alert)},
        token=secrets.token_hex(8),
        recorded_at=now,
    )
    return stored if _claim(root, _path(alert.id), asdict(stored), stored.token) else None


def send_new(
    root: Root, mine: Sequence[Stored], to: Sequence[Webhook], now: float
) -> list[Sending]:
    """Send what this caller has just recorded, as far as it happened within a day.

    In a store that may ignore conditional writes it first waits until another's record, if one was
    under way, must be there, and sends what is still its own.
    """
    fresh = [alert for alert in mine if now - alert.at <= FRESH_S]
    if fresh and to and not root.is_local:
        time.sleep(SETTLE_S)
        kept = {alert.token for alert in read_alerts(root, map(_listed, fresh), [])}
        fresh = [alert for alert in fresh if alert.token in kept]
    sendings: list[Sending] = []
    for alert in fresh:
        for webhook in _working(to, sendings):
            sendings.append(_deliver(root, alert, webhook, now))
    return sendings


def send_again(
    root: Root, late: Sequence[tuple[Recorded, Stored]], to: Sequence[Webhook], now: float
) -> list[Sending]:
    """Send what webhooks did not take so far, where its time has come and nobody else is faster."""
    sendings: list[Sending] = []
    for found, alert in late:
        for webhook in _working(to, sendings):
            if now - alert.at <= FRESH_S and _is_due(root, found, alert, webhook, now):
                sendings.append(_deliver(root, alert, webhook, now))
    return sendings


def _working(to: Sequence[Webhook], sendings: Sequence[Sending]) -> list[Webhook]:
    """Without those that failed in this look: their turn comes again, and 10 s each add up."""
    failed = {sending.webhook for sending in sendings if sending.trouble is not None}
    return [webhook for webhook in to if webhook.number not in failed]


def _deliver(root: Root, alert: Alert, webhook: Webhook, now: float) -> Sending:
    trouble = send(webhook, alert)
    if trouble is None:
        root.publish_json(_mark(alert.id, webhook.mark), {"sent_at": now})
    return Sending(alert, webhook.number, trouble)


def _listed(alert: Alert) -> Recorded:
    return Recorded(alert.run_id, alert.kind, alert.key)


def retry_round(age_s: float) -> int | None:
    """Which retry is due ``age_s`` seconds after the record: 0 from 1 min on, 1 from 2 min, ...

    None before the first and after a day.
    """
    if not RETRY_AFTER_S <= age_s <= FRESH_S:
        return None
    return int(math.log2(age_s / RETRY_AFTER_S))


def _is_due(root: Root, found: Recorded, alert: Stored, webhook: Webhook, now: float) -> bool:
    """Whether this watcher shall send it again now; then nobody else does in this round."""
    if webhook.mark in found.sent:
        return False
    number = retry_round(now - alert.recorded_at)
    if number is None or f"{webhook.mark}.try-{number}" in found.tries:
        return False
    token = secrets.token_hex(8)
    path = _path(f"{found.id}.{webhook.mark}.try-{number}")
    if not _claim(root, path, {"token": token, "tried_at": now}, token):
        return False
    return not root.exists(_mark(found.id, webhook.mark))  # it may have come since the listing


def _claim(root: Root, path: str, value: dict[str, object], token: str) -> bool:
    """Create ``path``; whether it is ours. A store that ignores the condition keeps the later."""
    if not root.create_json(path, value):
        return False
    kept = root.read_json(path)
    return isinstance(kept, dict) and kept.get("token") == token


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _mark(name: str, mark: str) -> str:
    return _path(f"{name}.{mark}.sent")


def _read(root: Root, path: str) -> Stored:
    try:
        return _STORED.validate_python(root.read_json(path))
    except ValidationError as error:
        raise DamagedError(
            f"{path} in {root.url} is not an alert ({what_is_wrong(error)}); remove it, and the "
            "next `tessera-exp alerts` records it again."
        ) from error
