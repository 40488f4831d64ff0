"""What providers billed, against what the ledger knows; and machines that bill for nobody.

Pure but for the questions to the provider: callers hand the ledger's stays in and record the
invoices that come out.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tessera.cloud.vast import VastCharge, VastClient, VastInstance
from tessera.ledger.invoices import BILLED, GPU, OTHER, STORAGE, TRAFFIC, Invoice

STARTING_S = 30 * 60.0
"""A young machine without an attempt is taken to be starting: image, setup, data."""
LEAVING_S = 10 * 60.0
"""So long after its last attempt a machine may take to be torn down."""
_DAY_S = 86_400.0
_CATEGORIES = {
    "gpu": GPU, "compute": GPU, "instance": GPU, "disk": STORAGE, "storage": STORAGE,
    "bandwidth": TRAFFIC, "traffic": TRAFFIC, "upload": TRAFFIC, "download": TRAFFIC,
}  # fmt: skip


@dataclass(frozen=True)
class Lodger:
    """An attempt (or a refused machine) on an instance; times in seconds since the epoch.

    ``alive``: its last sign of life is younger than 90 s and it has not said that it ended.
    """

    name: str
    provider: str
    instance: str
    billed_from: float
    ended_at: float
    alive: bool

    def is_on(self, instance: int, label: str) -> bool:
        """Whether it is that instance of vast.ai's.

        Where the container did not tell its id, the SkyPilot cluster is in the label.
        """
        if match := re.fullmatch(r"(?:C\.)?(\d+)", self.instance):
            return int(match[1]) == instance
        cluster = re.escape(self.instance.rsplit("/", 1)[0])
        return re.fullmatch(rf"{cluster}(-[0-9a-f]{{4,8}})?-head", label) is not None


@dataclass(frozen=True)
class IdleMachine:
    """A machine that bills although no run uses it. Dollars an hour; None: it tells no price."""

    provider: str
    instance: str
    label: str
    gpu: str
    status: str
    usd_per_hour: float | None
    since: float | None
    why: str
    stop: str


@dataclass(frozen=True)
class Findings:
    """What a provider says: invoices of our instances, ours that it tells nothing of, idle ones."""

    invoices: tuple[Invoice, ...]
    unbilled: tuple[str, ...]
    idle: tuple[IdleMachine, ...]


def ask_vast(client: VastClient, lodgers: Sequence[Lodger], now: float) -> Findings:
    """Invoices of every instance of vast.ai that a lodger names, and what bills for nobody.

    Two questions (and their pages), whatever the number of instances. Raises ``TesseraError``.
    """
    ours = [lodger for lodger in lodgers if lodger.provider == "vast"]
    living = client.instances()
    charges: list[VastCharge] = []
    if ours:
        charges = client.charges(min(lodger.billed_from for lodger in ours) - _DAY_S, now)
    by_instance: defaultdict[str, list[Lodger]] = defaultdict(list)
    for lodger in ours:
        by_instance[lodger.instance].append(lodger)
    invoices, unbilled = [], []
    for name, group in sorted(by_instance.items()):
        found = _invoice(name, group, charges, living, now)
        if found is None:
            unbilled.append(name)
        else:
            invoices.append(found)
    idle = [machine for one in living if (machine := _idle(one, ours, now)) is not None]
    return Findings(tuple(invoices), tuple(unbilled), tuple(idle))


def _invoice(
    name: str,
    group: Sequence[Lodger],
    charges: Sequence[VastCharge],
    living: Sequence[VastInstance],
    now: float,
) -> Invoice | None:
    """What vast.ai says of the instance that ``group`` was on; None: nothing yet.

    Partial while the instance lives, and while the charges end a day or more before its last
    attempt did: vast.ai tells charges by the day.
    """
    lives = next((one for one in living if group[0].is_on(one.id, one.label)), None)
    lines = [
        charge
        for charge in charges
        if charge.instance is not None
        and group[0].is_on(charge.instance, charge.label)
        and _sum(charge) is not None
    ]
    last = max(lodger.ended_at for lodger in group)
    alive = lives is not None or any(lodger.alive for lodger in group)
    if lines:
        ends = [charge.end for charge in lines if charge.end is not None]
        late = bool(ends) and max(ends) + _DAY_S < last
        by_category = _by_category(lines)
        return Invoice(
            provider="vast", instance=name, label=lines[-1].label,
            usd=sum(by_category.values()), by_category=by_category,
            started_at=min((c.start for c in lines if c.start is not None), default=None),
            ended_at=max(ends, default=None), fetched_at=now, source=BILLED,
            partial=alive or late, lines=[_plain(charge.model_dump()) for charge in lines],
        )  # fmt: skip
    if lives is not None and lives.start_date is not None and lives.usd_per_hour is not None:
        usd = lives.usd_per_hour * max(0.0, now - lives.start_date) / 3600
        return Invoice(
            provider="vast", instance=name, label=lives.label, usd=usd,
            by_category={GPU: usd}, started_at=lives.start_date, ended_at=None, fetched_at=now,
            source=BILLED, partial=True, lines=[_plain(lives.model_dump())],
        )  # fmt: skip
    return None


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    """A line as JSON can say it: what is no number becomes null."""
    text = json.dumps(line, default=str)
    plain: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return plain


def _sum(charge: VastCharge) -> float | None:
    if charge.amount is not None:
        return charge.amount
    amounts = [item.amount for item in charge.items or () if item.amount is not None]
    return sum(amounts) if amounts else None


def _by_category(charges: Sequence[VastCharge]) -> dict[str, float]:
    """Dollars by category; what the items of a charge leave open is ``other``."""
    found: defaultdict[str, float] = defaultdict(float)
    for charge in charges:
        rest = _sum(charge) or 0.0
        for item in charge.items or ():
            if item.amount is not None:
                found[_category(item.type or item.description)] += item.amount
                rest -= item.amount
        if abs(rest) > 1e-9 or not charge.items:
            found[OTHER] += rest
    return dict(found)


def _category(text: str) -> str:
    words = re.findall(r"[a-z]+", text.lower())
    named = (_CATEGORIES.get(word) for word in words)
    if found := next((name for name in named if name is not None), None):
        return found
    return TRAFFIC if any(w.startswith(("bw", "inet", "internet")) for w in words) else OTHER


def _idle(one: VastInstance, lodgers: Sequence[Lodger], now: float) -> IdleMachine | None:
    """The machine, if it bills for nobody.

    It is in use while an attempt on it is alive; it may be starting in its first half hour, unless
    it is stopped or an attempt on it has ended; and it may be leaving until ten minutes after its
    last attempt.
    """
    price = one.usd_per_hour
    if price == 0:
        return None
    here = [lodger for lodger in lodgers if lodger.is_on(one.id, one.label)]
    if any(lodger.alive for lodger in here):
        return None
    stopped = one.actual_status in ("exited", "stopped", "offline")
    last = max((lodger.ended_at for lodger in here), default=None)
    age = None if one.start_date is None else now - one.start_date
    if last is None:
        if not stopped and age is not None and age < STARTING_S:
            return None
        why = "no run of this root was ever on it"
    else:
        if not stopped and now - last < LEAVING_S:
            return None
        why = f"its last attempt ({here[-1].name}) ended {_ago(now - last)} ago"
    if stopped:
        why += f"; it is {one.actual_status}, its disk goes on costing"
    return IdleMachine(
        "vast", f"C.{one.id}", one.label, one.gpu_name, one.actual_status or "starting", price,
        one.start_date, why, f"vastai destroy instance {one.id}",
    )  # fmt: skip


def _ago(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def worth_recording(new: Invoice, old: Invoice | None) -> bool:
    """Whether ``new`` says more than what is recorded.

    A later answer replaces an earlier one, but a partial one (the charges of a day not told yet)
    never a whole one; one that says the same is not written again.
    """
    if old is None:
        return True
    if new.partial and not old.partial:
        return False
    same = (old.usd, old.by_category, old.partial, old.source, old.ended_at)
    return same != (new.usd, new.by_category, new.partial, new.source, new.ended_at)
