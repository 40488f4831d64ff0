"""``promote``: gate, record in the root, then MLflow's registry brought up to the records.

The record comes first and is the promotion; MLflow follows. If MLflow fails in between, promoting
the same adapter again (or any sync) finishes the work without a second record.
"""

from __future__ import annotations

import getpass
import os
import secrets
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tessera.errors import InputError
from tessera.evaluation.verdicts import InterviewResult
from tessera.promotion.gate import Decision, Weights, decide
from tessera.promotion.records import (
    CHAMPION,
    Evidence,
    Promotion,
    holders,
    read_promotions,
    write_promotion,
)
from tessera.promotion.versions import apply_records, fetch_adapter
from tessera.runs import Run, read_text
from tessera.storage import Root, sha256_bytes

__all__ = ["Held", "apply_records", "check", "interviews_of", "promote"]

RESERVED_ALIASES = ("latest",)


@dataclass(frozen=True)
class Held:
    """An interview file of the root: its path, the sha256 of its bytes, and what it says."""

    path: str
    sha256: str
    result: InterviewResult


def interviews_of(run: Run, adapter: str) -> list[Held]:
    """Every interview of an adapter; ``InputError`` names a file that cannot be used."""
    found = []
    for path in run.root.files(run.path("interviews")):
        if path.rsplit("/", 1)[-1] == f"{adapter}.json":
            digest = sha256_bytes(run.root.read_bytes(path))
            try:
                result = InterviewResult.from_json(run.root.read_json(path))
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
            found.append(Held(path, digest, result))
    return found


@dataclass(frozen=True)
class Checked:
    """An adapter that may be promoted: its digests, its interviews and the gate's decision."""

    weights: Weights
    held: tuple[Held, ...]
    decision: Decision


def check(run: Run, adapter: str, alias: str = CHAMPION, override: str | None = None) -> Checked:
    """Ask the gate. Raises ``InputError`` with its reasons unless ``override`` gives one."""
    _check_words(alias, override)
    with tempfile.TemporaryDirectory() as folder:
        weights = fetch_adapter(run, adapter, Path(folder))
    held = interviews_of(run, adapter)
    decision = decide([item.result for item in held], weights)
    if not decision.allowed and override is None:
        raise InputError(
            f"Adapter {adapter} of run {run.id} was not promoted: {decision.sentence()}; train or "
            "interview it again, or give --override with a reason."
        )
    return Checked(weights, tuple(held), decision)


def promote(
    root: Root,
    run: Run,
    adapter: str,
    alias: str = CHAMPION,
    override: str | None = None,
    tracking_uri: str | None = None,
) -> Promotion:
    """Give ``alias`` to an adapter, if the gate lets it pass or ``override`` says why it must.

    Returns the record. Raises ``InputError`` with the gate's reasons, ``ConflictError`` if somebody
    else promoted at the same moment, ``StoreError`` if MLflow could not be brought up to the record
    (which stands: the next sync applies it).
    """
    checked = check(run, adapter, alias, override)
    promotion = _record(root, run, adapter, alias, override, checked)
    apply_records(root, tracking_uri)
    return promotion


def _check_words(alias: str, override: str | None) -> None:
    if override is not None and not override.strip():
        raise InputError("The reason of --override is empty; say why the gate is overruled.")
    plain = alias.replace("-", "").replace("_", "")
    numbered = alias[:1] in "vV" and alias[1:].isdigit()
    if not (plain.isascii() and plain.isalnum()) or numbered or alias in RESERVED_ALIASES:
        raise InputError(
            f"{alias!r} is not usable as an alias; give letters, digits, '-' and '_', but neither "
            "'latest' nor a version such as v3."
        )


def _record(
    root: Root,
    run: Run,
    adapter: str,
    alias: str,
    override: str | None,
    checked: Checked,
) -> Promotion:
    """Write the record, or return the present holder's if it is this very promotion."""
    weights, decision = checked.weights, checked.decision
    promotions = read_promotions(root)
    holder = holders(promotions).get(alias)
    counted = {id(interview) for interview in decision.interviews}
    evidence = tuple(
        Evidence(i.path, i.sha256, i.result.suite, i.result.suite_digest, i.result.score)
        for i in checked.held
        if id(i.result) in counted
    )
    promotion = Promotion(
        number=promotions[-1].number + 1 if promotions else 1,
        token=secrets.token_hex(8),
        alias=alias,
        run_id=run.id,
        adapter=adapter,
        base_run_id=read_text(root, run.path("adapters", adapter, "base.json"), "run_id"),
        base_digest=weights.base_digest,
        adapter_digest=weights.adapter_digest,
        evidence=evidence,
        score=decision.score,
        refusals=decision.refusals,
        override=override.strip() if override is not None else None,
        previous=holder.who if holder else None,
        promoted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        promoted_by=_user(),
    )
    if holder is not None and _same(holder, promotion):
        return holder
    write_promotion(root, promotion)
    return promotion


def _user() -> str:
    """Who promotes; a container's uid need not have a name."""
    try:
        return os.environ.get("USER") or getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return f"uid {os.getuid()}"


def _same(one: Promotion, other: Promotion) -> bool:
    def key(p: Promotion) -> tuple[object, ...]:
        return p.who, p.adapter_digest, p.base_digest, p.evidence, p.override

    return key(one) == key(other)
