"""What happened to a run, in words: the events of its journals that a person should know of.

Everyday ones (a start, a publication) are left out; ``tessera-exp show --json`` has the details of
those that are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tessera.ledger.dollars import as_typed, dollars

Details = Mapping[str, Any]


def worded(key: str, details: Any, step: int | None = None) -> str:
    """One clause about an event of ``step``; odd details are shown as they are."""
    try:
        return EVENTS[key]({**details, "step": step})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return f"{key}: {details}"


def _skipped(details: Details) -> str:
    return (
        f"step not applied: loss {_number(details['loss'])}, gradient norm "
        f"{_number(details['grad_norm'])}; samples {details['first_sample']:,} to "
        f"{details['end_sample'] - 1:,} skipped"
    )


def _rolled_back(details: Details) -> str:
    text = f"went back to step {details['to_step']:,}: {details['reason']}"
    left_out = [f"{first:,} to {end - 1:,}" for first, end in details.get("excluded", ())]
    return f"{text}; samples {', '.join(left_out)} left out" if left_out else text


def _resumed(details: Details) -> str:
    place = "this machine's disk" if details.get("local") else "the root"
    text = f"continued from {place}" if details.get("step") != 0 else "started again"
    if not details.get("lost_steps"):
        return f"{text}, no recorded step lost"
    paid = details.get("lost_usd")
    lost = "" if paid is None else f", {dollars(paid)}"
    before = f" of attempt {details['lost_attempt']}" if details.get("lost_attempt") else ""
    steps = "1 step" if details["lost_steps"] == 1 else f"{details['lost_steps']:,} steps"
    return f"{text}; {steps}{before} lost ({details['lost_s']:,.0f} s{lost})"


def _planned(details: Details) -> str:
    seconds = details["seconds_per_step"]
    pace = "" if seconds is None else f", {seconds:.3g} s a step"
    start = f"decay from {details['decay_start']:,}" if details["level"] == 1 else "decaying"
    return (
        f"end planned at step {details['end_step']:,}, {start}: {dollars(details['usd_so_far'])} "
        f"so far, {as_typed(details['usd_per_hour'])}/h{pace}"
    )


def _stopped(details: Details) -> str:
    return (
        f"ended by the budget: {dollars(details['usd_so_far'])} of "
        f"{as_typed(details['budget_usd'])} spent, {dollars(details['reserve_usd'])} kept back"
    )


def _because(text: str) -> Callable[[Details], str]:
    return lambda details: f"{text}: {details['reason']}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"  # the journal spells NaN


EVENTS: dict[str, Callable[[Details], str]] = {
    "stability/skipped": _skipped,
    "run/rolled_back": _rolled_back,
    "precision/changed": _because("precision changed"),
    "budget/planned": _planned,
    "budget/stopped": _stopped,
    "run/diverged": _because("diverged"),
    "attempt/resumed": _resumed,
    "checkpoint/damaged": _because("checkpoint passed over"),
    "checkpoint/postponed": _because("upload of the checkpoint postponed"),
    "checkpoint/failed": _because("no checkpoint"),
    "checkpoint/stays_local": _because("checkpoint stays on the machine's own disk"),
    "checkpoint/abandoned": _because("upload of the checkpoint given up"),
    "checkpoint/untidy": _because("old checkpoints not removed"),
}
"""What is worth telling, by the event's name, and how."""
