"""Everything that ``tessera-exp show`` tells of one run, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tessera.cli._exp_events import EVENTS
from tessera.ledger.invoices import Invoice
from tessera.promotion.records import holders, read_promotions
from tessera.promotion.registry import interviews_of
from tessera.runs import Run, read_text
from tessera.storage import Root
from tessera.tracking.annotations import Annotated, read_annotations
from tessera.tracking.checkpoints import summarise_checkpoints
from tessera.tracking.history import RunHistory, bill_all, read_with_neighbours
from tessera.tracking.invoices import read_invoices
from tessera.tracking.queries import (
    RunSummary,
    summarise_attempts,
    summarise_history,
    usd_by_category,
)


@dataclass(frozen=True)
class Detail:
    """A run's summary and the rest of what is known, keyed as in ``--json``."""

    summary: RunSummary
    rest: dict[str, Any]


def detail_of(root: Root, run: Run) -> Detail:
    """Read one run with its attempts, adapters and interviews."""
    history, others = read_with_neighbours(run)
    invoices = read_invoices(root).found
    bills = bill_all([history, *others], invoices)
    attempts = summarise_attempts(history, bills)
    record = run.record
    rest = {
        "experiment": record.experiment,
        "commit": record.commit,
        "fingerprint": record.fingerprint,
        "data": record.data,
        "attempt_list": [asdict(attempt) for attempt in attempts],
        "usd_by_category": usd_by_category(attempts),
        "invoices": _invoices(invoices, history),
        "checkpoints": asdict(summarise_checkpoints(history)),
        "events": _events(history),
        "losses": [
            {"step": point.step, "loss": point.number}
            for point in history.points
            if point.key == "eval/loss"
        ],
        "annotations": asdict(Annotated.of(read_annotations(root, run.id))),
        "adapters": _adapters(root, run, history),
    }
    return Detail(summarise_history(history, bills), rest)


def _invoices(
    invoices: Mapping[tuple[str, str], Invoice], history: RunHistory
) -> list[dict[str, Any]]:
    """What is recorded of the run's instances; each may have carried other runs as well."""
    places = dict.fromkeys((i.attempt.provider, i.attempt.instance) for i in history.attempts)
    return [asdict(invoices[place]) for place in places if place in invoices]


def _events(history: RunHistory) -> list[dict[str, Any]]:
    """What happened to the run, oldest first, in attempts whose work was lost too."""
    found = [
        record
        for item in history.attempts
        for record in item.records
        if record.kind == "event" and record.key in EVENTS
    ]
    return [
        {
            "time": record.time, "attempt": record.attempt, "step": record.step,
            "event": record.key, "details": record.value,
        }
        for record in sorted(found, key=lambda record: (record.time, record.attempt, record.seq))
    ]  # fmt: skip


def _adapters(root: Root, run: Run, history: RunHistory) -> list[dict[str, Any]]:
    saved = {
        event.value["name"]: event.step
        for event in history.kept("event")
        if event.key == "adapter/saved" and isinstance(event.value, dict) and "name" in event.value
    }
    carried = [p for p in holders(read_promotions(root)).values() if p.run_id == run.id]
    found = []
    for name in root.children(run.path("adapters")):
        sidecar = run.path("adapters", name, "weights.json")
        digest = read_text(root, sidecar, "weights_digest") if root.exists(sidecar) else None
        interviews = []
        for held in interviews_of(run, name):
            answers = [answer for probe in held.result.probes for answer in probe.answers]
            interviews.append(
                {
                    "suite": held.result.suite,
                    "suite_digest": held.result.suite_digest,
                    "path": held.path,
                    "score": held.result.score,
                    "of_these_weights": held.result.adapter_digest == digest,
                    "verdicts": {
                        verdict: sum(answer.verdict == verdict for answer in answers)
                        for verdict in ("pass", "fail", "fatal", "no_answer")
                    },
                    "unanswered_safety": held.result.unanswered_safety,
                }
            )
        found.append(
            {
                "name": name,
                "step": saved.get(name),
                "weights_digest": digest,
                "aliases": [p.alias for p in carried if p.adapter == name],
                "interviews": interviews,
            }
        )
    return found
