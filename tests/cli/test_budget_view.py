"""What ``tessera-exp show`` says of a budget, in its header and of each plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tessera.cli._exp_events import worded
from tessera.cli._exp_view import _budget

PLAN = {
    "end_step": 81, "decay_start": 40, "level": 1, "usd_so_far": 0.00031, "usd_per_hour": 0.05,
    "seconds_per_step": 1.5, "reserve_usd": 0.000838, "budget_usd": 0.002,
}  # fmt: skip
PLANNED, STOPPED = ({"event": f"budget/{name}", "details": PLAN} for name in ("planned", "stopped"))


@pytest.mark.parametrize(
    ("status", "steps", "tokens", "events", "shown"),
    [
        ("finished", 81, 184320, [PLANNED], "$0.000838 kept back; it ended the run at step 81"),
        ("running", 81, None, [PLANNED], "$0.000838 kept back; it ends the run at step 81"),
        ("finished", 180, 184320, [PLANNED], "kept back; the tokens ended the run at step 180"),
        ("budget", 180, 184320, [PLANNED, STOPPED], "kept back; it ended the run at step 180"),
        ("running", None, None, [], "$0.002, no end planned yet"),
    ],
)
def test_the_header_says_what_the_budget_did(
    status: str, steps: int | None, tokens: int | None, events: list[Any], shown: str
) -> None:
    row: Any = SimpleNamespace(status=status, total_steps=steps)
    experiment = {"budget_usd": 0.002, "tokens": tokens, "batch": {"tokens_per_step": 1024}}
    line = _budget(row, {"experiment": experiment, "events": events})["budget"]
    assert line.startswith("$0.002, ")
    assert shown in line
    assert _budget(row, {"experiment": {}, "events": []}) == {}


def test_small_sums_have_their_digits() -> None:
    assert "$0.000310 so far, $0.05/h" in worded("budget/planned", PLAN)
    assert worded("budget/stopped", PLAN) == (
        "ended by the budget: $0.000310 of $0.002 spent, $0.000838 kept back"
    )
