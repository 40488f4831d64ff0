"""The experiment's note: what the runs came to, the conclusion first, written anew by each sync.

A person's note is never written over. The sha256 of what was written last stands in a tag; a note
of another digest was edited by a person. Emptying the note in MLflow brings ours back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tessera.runs import RunRecord
from tessera.storage import sha256_bytes
from tessera.tracking.choose import frontier, peers
from tessera.tracking.queries import RunSummary
from tessera.tracking.server import Server

NOTE, DIGEST = "mlflow.note.content", "tessera.note_sha256"
CHARACTERS = 4_900
"""MLflow takes 5,000 characters in a tag of an experiment."""
_MOST_ROWS = 8
_NEAR = 1.02
"""A loss within 2 % of the lowest counts as about as good."""
_HOW_TO_READ = """\
Losses are the lowest in nats a token on the frozen evaluation of that data; of other data they do
not compare. Dollars are of all attempts, lost ones too; ~ rests on an estimate until `tessera-exp
reconcile`. In the tables are the runs that no other run beats in loss and dollars at once."""
_VIEWS = """\
Saved views (menu *Views*): **Loss vs dollars**, **Runs: dollars, loss, $/Mtok, interview**."""
_OURS = """\
*Written by `tessera-exp sync`. Edit it and it stays as you left it; empty it and it comes back.*"""


class Shown(NamedTuple):
    """A run as it was replayed, with the words for its best interview."""

    record: RunRecord
    summary: RunSummary
    interview: str | None


def write_note(server: Server, whole: Sequence[Shown], *, views: bool) -> str | None:
    """Write the note, unless a person's stands there; a sentence if so. Call in ``sentences``.

    ``views``: whether the page has the saved views, which the note then names.
    """
    has = server.client.get_experiment(server.experiment_id).tags
    present, ours = has.get(NOTE, ""), has.get(DIGEST, "").split()
    if present.strip() and _digest(present) not in ours:
        return (
            f"The note of the MLflow experiment {server.experiment!r} was edited and stays as it "
            "is; empty it there to have it written again."
        )
    text = conclusions(whole, views=views)
    if (present, ours) != (text, [_digest(text)]):
        # Both first: a sync that dies in between leaves a note that is known as ours.
        both = f"{_digest(present)} {_digest(text)}"
        for key, value in ((DIGEST, both), (NOTE, text), (DIGEST, _digest(text))):
            server.client.set_experiment_tag(server.experiment_id, key, value)
    return None


def _digest(text: str) -> str:
    return sha256_bytes(text.encode())


def conclusions(whole: Sequence[Shown], *, views: bool) -> str:
    """The note in Markdown, at most ``CHARACTERS`` of it."""
    by_id = {each.summary.run_id: each for each in whole}
    priced = [each.summary for each in whole if math.isfinite(_usd(each.summary) + _loss(each))]
    heads, tables = [], []
    for _, rows in sorted(peers(priced).items()):
        title = _title(rows, by_id)
        heads.append(_conclusion(title, rows))
        tables.append(_table(title, rows, by_id))
    if not heads:
        return f"**No run has a loss and a price yet.**\n\n{_OURS}"
    last = [_HOW_TO_READ.replace("\n", " "), *([_VIEWS] if views else []), _OURS]
    while len(text := "\n\n".join([*heads, *tables, *last])) > CHARACTERS and (tables or heads):
        (tables or heads).pop()
    return text


def _usd(row: RunSummary) -> float:
    return math.nan if row.cost_usd is None else row.cost_usd


def _loss(each: Shown | RunSummary) -> float:
    row = each.summary if isinstance(each, Shown) else each
    return math.nan if row.best_loss is None else row.best_loss


def _title(rows: Sequence[RunSummary], by_id: Mapping[str, Shown]) -> str:
    """What the runs have in common, such as ``Pretraining on web``."""
    if rows[0].kind == "pretrain":
        data = by_id[rows[0].run_id].record.experiment.get("data", {})
        return f"Pretraining on {data.get('corpus', '?')}"
    bases = {row.base for row in rows if row.base}
    return f"Fine-tuning of {bases.pop()}" if len(bases) == 1 else "Fine-tuning"


def _conclusion(title: str, rows: Sequence[RunSummary]) -> str:
    best = min(rows, key=lambda row: (_loss(row), _usd(row)))
    runs = "the only run" if len(rows) == 1 else f"the lowest loss of {len(rows)} runs"
    going = "" if best.status in ("finished", "budget") else ", and is not finished"
    text = (
        f"**{title}: `{best.run_id}` reached {_loss(best):.4f} nats a token for "
        f"{_dollars(best)}**, {runs}{going}."
    )
    least = min(rows, key=lambda row: (_usd(row), _loss(row)))
    near = [row for row in rows if _loss(row) <= _loss(best) * _NEAR and _usd(row) < _usd(best)]
    if near:
        cheap = min(near, key=_usd)
        text += (
            f" `{cheap.run_id}` came within {_NEAR - 1:.0%} of it ({_loss(cheap):.4f}) for "
            f"{_dollars(cheap)}."
        )
    elif least is not best:
        text += (
            f" The cheapest, `{least.run_id}`, reached {_loss(least):.4f} for {_dollars(least)}."
        )
    return text


def _table(title: str, rows: Sequence[RunSummary], by_id: Mapping[str, Shown]) -> str:
    lines = [
        f"| {title} | dollars | loss | $/Mtok | tokens | interview |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in frontier(rows)[-_MOST_ROWS:]:
        rate = "" if row.usd_per_mtok is None else f"{row.usd_per_mtok:.4g}"
        tokens = "" if row.tokens is None else f"{row.tokens:,}"
        interview = (by_id[row.run_id].interview or "").replace("|", "/")
        cells = (f"`{row.run_id}`", _dollars(row), f"{_loss(row):.4f}", rate, tokens, interview)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _dollars(row: RunSummary) -> str:
    """Such as ``$1.24``, ``~$0.0031``."""
    digits = 2 if _usd(row) >= 1 else 4
    return f"{'~' if row.cost_estimated else ''}${_usd(row):,.{digits}f}"
