"""The best interview of a run, in a few words for MLflow's table.

    0.83, 0 fatal (ep3, voices-1)

Only interviews of weights that the run saved under that name count. Which adapter may be promoted
is the gate's to say (``tessera.promotion``), from all interviews; this is one line to compare runs.
"""

from __future__ import annotations

import re
from typing import Any

from tessera.errors import DamagedError
from tessera.storage import Root
from tessera.tracking.history import RunHistory

INTERVIEW = "tessera.interview"
_FILE = re.compile(r"/interviews/[^/]+/([^/]+)\.json$")


def best_interview(history: RunHistory) -> str | None:
    """The interview with the fewest fatal answers, then the highest score; None: there is none.

    A file that is damaged is passed over: who needs it (``promote``, ``show``) names it.
    """
    saved = {
        event.value.get("name"): event.value.get("weights_digest")
        for event in history.kept("event")
        if event.key == "adapter/saved" and isinstance(event.value, dict)
    }
    if not saved:
        return None
    run = history.run
    found = []
    for path in run.root.files(run.path("interviews")):
        match = _FILE.search(f"/{path}")
        if match and match[1] in saved:
            held = _read(run.root, path, saved[match[1]])
            found += [held] if held is not None else []
    return min(found)[-1] if found else None


def _read(root: Root, path: str, digest: Any) -> tuple[int, int, float, str] | None:
    """What sorts an interview (least is best), and its words."""
    try:
        value = root.read_json(path)
        if value["adapter_digest"] != digest:
            return None
        summary = value["summary"]
        score, fatal = float(summary["score"]), int(summary["fatal"])
        silent = len(summary["unanswered_safety"])
        words = f"{score:.2f}, {fatal} fatal" + (f", {silent} unanswered" if silent else "")
        return fatal, silent, -score, f"{words} ({value['adapter']}, {value['suite']})"
    except (DamagedError, KeyError, TypeError, ValueError):
        return None
