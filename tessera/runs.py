"""Runs: identity, attempts, lineage, fencing, and the layout of ``runs/`` in the root.

    runs/<run_id>/
    ├── run.json                          created once: identity, experiment, fingerprint, commit
    ├── attempts/<n>-<token>.json         one a launch
    ├── attempts/<n>-<token>.end.json     how it ended; absent while it runs and after a kill -9
    ├── journal/<n>-<token>/<segment>.jsonl    in a store beside it ``<segment>.twin.jsonl`` while
    │                                     it is written
    ├── checkpoints/step-<step>-<n>-<token>/   ``COMPLETE`` is written last
    ├── rollbacks/<n>-<token>.json        an attempt gave up every earlier checkpoint beyond a step
    ├── latest.json                       a hint for people; readers follow the lineage
    ├── model/                            at the end of a pretraining; ``<n>-<token>.json`` says
    │                                     which tensors an attempt published
    ├── adapters/<name>/                  one an epoch of a fine-tuning
    └── interviews/<suite digest>/<adapter>.json

Some stores ignore conditional writes, so two attempts may be alive at once and both believe that
they are alone. Nothing here depends on their agreeing: each writes under its own ``<n>-<token>``,
and a reader picks one *lineage*: the furthest complete checkpoint, the attempt that wrote it, the
checkpoint that attempt resumed from, and so on back to the start. Two live attempts can waste
money, never mix. ``superseded_by`` saves that money: before each publication an attempt looks for
a later one (higher number; same number, smaller token) and stops.

An attempt that goes back on purpose (a spike, a damaged checkpoint) first publishes a *rollback*:
from then on the checkpoints of attempts with a smaller number count only up to its ``to_step``. So
"the furthest" is never the state that was given up, whatever dies when.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from tessera.errors import ConflictError, DamagedError, InputError
from tessera.storage import Root, canonical_json

if TYPE_CHECKING:
    from tessera.experiment import Experiment  # its classes take a tenth of a second to be made

RUN_ID_VARIABLE = "TESSERA_RUN_ID"
_RUN_ID = r"[a-z0-9][a-z0-9_.-]{0,99}"  # longer than a name: the digest and `-2` follow it
FINISHED, BUDGET, DIVERGED, PREEMPTED, FAILED, SUPERSEDED, ROLLED_BACK = (
    "FINISHED", "BUDGET", "DIVERGED", "PREEMPTED", "FAILED", "SUPERSEDED", "ROLLED_BACK",
)  # fmt: skip
OUTCOMES_DONE = frozenset({FINISHED, BUDGET})

T = TypeVar("T")


_CHECKPOINT = re.compile(r"step-(\d+)-(\d+-[0-9a-f]+)")
_AS_WRITTEN = with_config(ConfigDict(extra="forbid"))  # a record with other keys is not ours


@_AS_WRITTEN
@dataclass(frozen=True)
class CheckpointRef:
    """A complete checkpoint: the step it holds and the attempt that wrote it."""

    step: int
    attempt: str

    @property
    def folder(self) -> str:
        """Its folder, relative to the run's."""
        return f"checkpoints/{self.name}"

    @property
    def name(self) -> str:
        """``step-<step>-<n>-<token>``."""
        return f"step-{self.step}-{self.attempt}"

    @property
    def number(self) -> int:
        """The number of the attempt that wrote it."""
        return int(self.attempt.split("-")[0])

    @classmethod
    def parse(cls, name: str) -> CheckpointRef | None:
        """The checkpoint whose ``name`` this is, or None."""
        match = _CHECKPOINT.fullmatch(name)
        return cls(int(match[1]), match[2]) if match else None


@_AS_WRITTEN
@dataclass(frozen=True)
class Rollback:
    """Attempt ``attempt`` goes back: earlier attempts' checkpoints count only up to ``to_step``.

    ``excluded`` are ranges [first, end) of sample numbers that the run leaves out for good from
    there on, those of earlier rollbacks included; ``count`` is how many rollbacks for instability
    there have been.
    """

    attempt: str
    to_step: int
    reason: str
    excluded: tuple[tuple[int, int], ...]
    count: int
    decided_at: float

    def gives_up(self, ref: CheckpointRef) -> bool:
        """Whether ``ref`` no longer counts."""
        return ref.step > self.to_step and ref.number < int(self.attempt.split("-")[0])


@_AS_WRITTEN
@dataclass(frozen=True)
class Attempt:
    """One launch of a run: where it runs, what that costs, and what it continues.

    Times are seconds since the epoch; ``usd_per_hour`` is None where nobody told a price,
    ``usd_per_gb_up`` and ``usd_per_gb_down`` are the prices of 10^9 bytes from the machine to the
    root and back. ``price_note`` says why the provider's own price is missing where it was asked
    for; ``price_followed``, whether it is asked for again while the attempt runs, so that the
    journal may tell of other prices. ``machine`` is the provider's name of the physical host.
    ``nodes`` machines of ``devices`` devices each train together, and all prices of an hour are
    those of all of them; provider, instance and host name the first.
    """

    number: int
    token: str
    started_at: float
    provider: str
    instance: str
    host: str
    device: str
    devices: int
    usd_per_hour: float | None
    price_source: str
    billed_from: float
    billed_from_source: str
    setup_started_at: float | None = None
    resumed_from: CheckpointRef | None = None
    usd_per_gb_up: float = 0.0
    usd_per_gb_down: float = 0.0
    machine: str = ""
    price_note: str = ""
    price_followed: bool = False
    nodes: int = 1

    @property
    def id(self) -> str:
        """``<n>-<token>``, which everything that the attempt writes carries."""
        return f"{self.number}-{self.token}"


@_AS_WRITTEN
@dataclass(frozen=True)
class Ending:
    """How an attempt ended, written by itself; a killed one leaves none.

    ``records`` is how many records it wrote into its journal; None where it did not say.
    """

    outcome: str
    exit_code: int
    ended_at: float
    step: int
    reason: str = ""
    records: int | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of the surviving lineage: steps above ``after`` up to ``upto`` of one attempt."""

    attempt: str
    after: int
    upto: int


@_AS_WRITTEN
@dataclass(frozen=True)
class RunRecord:
    """``run.json``: what a run is, written once."""

    run_id: str
    name: str
    kind: str
    created_at: float
    experiment: dict[str, Any]
    identity: dict[str, Any]
    fingerprint: str
    data: dict[str, Any]
    commit: str | None
    base: dict[str, str] | None = None


def first_done(endings: Mapping[str, Ending]) -> tuple[str, Ending] | None:
    """The earliest ending that completed a run, with its attempt's id."""
    done = [(name, e) for name, e in endings.items() if e.outcome in OUTCOMES_DONE]
    return min(done, key=lambda item: (item[1].ended_at, item[0]), default=None)


def furthest_first(ref: CheckpointRef) -> tuple[int, int, str]:
    """Sorting key: the furthest step, then the latest attempt, then the smaller token."""
    return -ref.step, -ref.number, ref.attempt


def identity_hash(identity: Mapping[str, Any], fingerprint: str) -> str:
    """Eight hex digits of every loss-affecting setting and the data fingerprint."""
    material = canonical_json({"identity": dict(identity), "fingerprint": fingerprint})
    return hashlib.sha256(material).hexdigest()[:8]


class Run:
    """One run in a root; every listing is read afresh, since others write too."""

    def __init__(self, root: Root, record: RunRecord) -> None:
        self.root = root
        self.record = record
        self.id = record.run_id

    def path(self, *parts: str) -> str:
        """A path inside the run, relative to the root."""
        return "/".join(("runs", self.id, *parts))

    @property
    def experiment(self) -> Experiment:
        """The resolved experiment that created the run."""
        from tessera.experiment import parse_experiment

        return parse_experiment(self.record.experiment)

    # -- attempts --------------------------------------------------------------------------------

    def attempts(self) -> list[Attempt]:
        """All attempts, by number and then token."""
        found = [
            _read(self.root, self.path("attempts", name), _ATTEMPT)
            for name in self.root.children(self.path("attempts"))
            if name.endswith(".json") and not name.endswith(".end.json")
        ]
        return sorted(found, key=lambda a: (a.number, a.token))

    def endings(self) -> dict[str, Ending]:
        """How each attempt that said so ended, by attempt id."""
        return {
            name.removesuffix(".end.json"): _read(self.root, self.path("attempts", name), _ENDING)
            for name in self.root.children(self.path("attempts"))
            if name.endswith(".end.json")
        }

    def next_attempt(self, attempt: Attempt, resumed_from: CheckpointRef | None) -> Attempt:
        """``attempt`` under the next number and a fresh token, not yet published.

        ``resumed_from`` is the checkpoint it continues, which the caller has fetched and verified.
        """
        numbers = [other.number for other in self.attempts()]
        return replace(
            attempt,
            number=max(numbers, default=0) + 1,
            token=secrets.token_hex(4),
            resumed_from=resumed_from,
        )

    def start_attempt(self, attempt: Attempt, resumed_from: CheckpointRef | None) -> Attempt:
        """Publish ``attempt`` as the next one."""
        fresh = self.next_attempt(attempt, resumed_from)
        self.publish_attempt(fresh)
        return fresh

    def publish_attempt(self, attempt: Attempt) -> None:
        """From here on ``attempt`` takes precedence over all earlier ones."""
        self.root.publish_json(self.path("attempts", f"{attempt.id}.json"), asdict(attempt))

    def end_attempt(self, attempt: Attempt, ending: Ending) -> None:
        """Publish how ``attempt`` ended."""
        self.root.publish_json(self.path("attempts", f"{attempt.id}.end.json"), asdict(ending))

    def superseded_by(self, attempt: Attempt) -> str | None:
        """Id of an attempt that takes precedence over this one, or None."""
        mine = (-attempt.number, attempt.token)
        for name in self.root.children(self.path("attempts")):
            if match := re.fullmatch(r"(\d+)-([0-9a-f]+)\.json", name):
                other = (-int(match[1]), match[2])
                if other < mine:
                    return name.removesuffix(".json")
        return None

    def finished(self) -> Ending | None:
        """The ending that completed the run, if one did."""
        found = first_done(self.endings())
        return found[1] if found else None

    def finished_by(self) -> str | None:
        """Id of the attempt that completed the run, if one did."""
        found = first_done(self.endings())
        return found[0] if found else None

    @property
    def identity(self) -> str:
        """``identity_hash`` of what the run was created with."""
        return identity_hash(self.record.identity, self.record.fingerprint)

    # -- checkpoints and lineage -----------------------------------------------------------------

    def rollbacks(self) -> list[Rollback]:
        """Every decision to go back, oldest attempt first."""
        found = [
            _read(self.root, self.path("rollbacks", name), _ROLLBACK)
            for name in self.root.children(self.path("rollbacks"))
            if name.endswith(".json")
        ]
        return sorted(found, key=lambda r: (int(r.attempt.split("-")[0]), r.attempt))

    def publish_rollback(self, rollback: Rollback) -> None:
        """Decide to go back; call it before the attempt itself is published."""
        path = self.path("rollbacks", f"{rollback.attempt}.json")
        self.root.publish_json(path, asdict(rollback))

    def complete(self) -> list[CheckpointRef]:
        """All complete checkpoints, those that were given up too; order as ``checkpoints``."""
        names = [path.split("/") for path in self.root.files(self.path("checkpoints"))]
        found = [CheckpointRef.parse(parts[-2]) for parts in names if parts[-1] == "COMPLETE"]
        return sorted((ref for ref in found if ref is not None), key=furthest_first)

    def checkpoints(self) -> list[CheckpointRef]:
        """Complete checkpoints that count, furthest first; at one step the latest attempt first."""
        # Rollbacks after the listing: a checkpoint that one of them gives up must not slip through.
        found = self.complete()
        rollbacks = self.rollbacks()
        return [ref for ref in found if not any(r.gives_up(ref) for r in rollbacks)]

    def furthest(self) -> CheckpointRef | None:
        """The complete checkpoint that a new attempt continues from."""
        found = self.checkpoints()
        return found[0] if found else None

    def lineage(self) -> list[Segment]:
        """The surviving lineage, oldest first: whose records count, and for which steps.

        It ends at the step of the attempt that finished the run, else at the furthest complete
        checkpoint; what lies beyond is not recorded yet. Raises ``StoreError`` where an attempt
        that the lineage needs is missing.
        """
        attempts = {attempt.id: attempt for attempt in self.attempts()}
        done = first_done(self.endings())
        if done is not None:
            name, upto = done[0], done[1].step
        elif (checkpoint := self.furthest()) is not None:
            name, upto = checkpoint.attempt, checkpoint.step
        else:
            return []
        segments: list[Segment] = []
        while True:
            if name not in attempts:
                raise DamagedError(
                    f"attempts/{name}.json of run {self.id} is missing in {self.root.url} but its "
                    "checkpoints are there; restore it from a backup."
                )
            before = attempts[name].resumed_from
            segments.append(Segment(name, before.step if before else 0, upto))
            if before is None:
                return segments[::-1]
            name, upto = before.attempt, before.step


# -- creating and finding
# ----------------------------------------------------------------------------


def create_or_open(
    root: Root,
    experiment: Experiment,
    *,
    fingerprint: str,
    data: dict[str, Any],
    base: dict[str, str] | None = None,
    run_id: str | None = None,
    new: bool = False,
    commit: str | None = None,
) -> tuple[Run, bool]:
    """The run that this experiment and data belong to, and whether it was created just now.

    ``run_id`` (else ``TESSERA_RUN_ID``) names it, otherwise the identity does; ``new`` takes the
    first free ``-2``, ``-3``, ... instead of continuing. A loss-affecting setting or fingerprint
    that differs from the stored run's is a ``ConflictError`` that names it, and so is another
    budget; none means the one that the run was started with. Raises ``InputError`` if a run would
    have to be created that neither tokens nor a budget ends.
    """
    from tessera.experiment import dump

    identity = dict(experiment.identity)
    if base is not None:
        identity["base.weights_digest"] = base["weights_digest"]
    run_id = run_id or os.environ.get(RUN_ID_VARIABLE) or None
    if run_id is not None:
        require_run_id(run_id)
    wanted = run_id or f"{experiment.name}-{identity_hash(identity, fingerprint)}"
    record = RunRecord(
        run_id=wanted,
        name=experiment.name,
        kind=experiment.kind,
        created_at=time.time(),
        experiment=dump(experiment),
        identity=identity,
        fingerprint=fingerprint,
        data=data,
        commit=commit,
        base=base,
    )
    number = 1
    endless = experiment.kind == "pretrain" and experiment.tokens is None
    endless = endless and record.experiment["budget_usd"] is None
    while True:
        name = wanted if number == 1 else f"{wanted}-{number}"
        record = replace(record, run_id=name)
        if endless and not root.exists(f"runs/{name}/run.json"):
            raise InputError(
                f"Nothing ends {name}: {experiment.origin('tokens')} gives neither tokens nor "
                "budget_usd, and no run of it is there to be continued; give one of the two, or "
                "--budget."
            )
        if root.create_json(f"runs/{name}/run.json", asdict(record)):
            return Run(root, record), True
        if not new:
            run = open_run(root, name)
            _refuse_changes(run.record, record)
            return run, False
        number += 1


def _refuse_changes(stored: RunRecord, wanted: RunRecord) -> None:
    if stored.fingerprint != wanted.fingerprint:
        raise ConflictError(
            f"Run {stored.run_id} was trained on data {stored.fingerprint[:12]}, this experiment "
            f"reads {wanted.fingerprint[:12]}; give the old data back (data.fingerprint) or start "
            "another run with --new."
        )
    for key in sorted(stored.identity.keys() | wanted.identity.keys()):
        old, now = stored.identity.get(key), wanted.identity.get(key)
        if old != now:
            raise ConflictError(
                f"Run {stored.run_id} was started with {key} = {old}, this experiment says {now}; "
                "put it back, or start another run with --new."
            )
    if (budget := wanted.experiment.get("budget_usd")) is not None:
        had = stored.experiment.get("budget_usd")
        if had != budget:
            before = "without a budget" if had is None else f"with a budget of ${had:g}"
            raise ConflictError(
                f"Run {stored.run_id} was started {before}, this attempt says ${budget:g}; put it "
                "back, or start another run with --new."
            )


def require_run_id(run_id: str) -> None:
    """Raise ``InputError`` for a name that no run can have."""
    if not run_id:
        raise InputError("The run id is empty; give one, or leave it out for one that is made up.")
    if not re.fullmatch(_RUN_ID, run_id):
        raise InputError(f"The run id {run_id!r} is not usable; use a-z, 0-9, '.', '_' and '-'.")


def open_run(root: Root, run_id: str) -> Run:
    """The run of that exact id."""
    return Run(root, _read(root, f"runs/{run_id}/run.json", _RUN))


def list_runs(root: Root) -> list[Run]:
    """Every run of the root, oldest first; a damaged ``run.json`` is an error that names it."""
    found, damaged = scan_runs(root)
    for error in damaged.values():
        raise error
    return found


def scan_runs(root: Root) -> tuple[list[Run], dict[str, DamagedError]]:
    """Every run that can be opened, oldest first, and what is wrong with the others, by id."""
    found: list[Run] = []
    damaged: dict[str, DamagedError] = {}
    for name in root.children("runs"):
        if root.exists(f"runs/{name}/run.json"):
            try:
                found.append(open_run(root, name))
            except DamagedError as error:
                damaged[name] = error
    return sorted(found, key=lambda run: (run.record.created_at, run.id)), damaged


def find_run(root: Root, text: str, *, kind: str | None = None) -> Run:
    """The run that ``text`` names: its id, else the experiment name or id prefix of exactly one."""
    names = root.children("runs")
    if text in names:
        run = open_run(root, text)
        if kind not in (None, run.record.kind):
            raise InputError(
                f"Run {text} in {root.url} is of kind {run.record.kind}, expected {kind}; name "
                "another run."
            )
        return run
    opened, damaged = scan_runs(root)
    runs = [run for run in opened if kind is None or run.record.kind == kind]
    matches = [run for run in runs if run.record.name == text]
    matches = matches or [run for run in runs if run.id.startswith(text)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(
            f"{text!r} names {len(matches)} runs ({', '.join(run.id for run in matches[:5])}); "
            "give the whole run id."
        )
    for name, error in damaged.items():
        if name.startswith(text):
            raise error
    known = ", ".join(run.id for run in runs[:5]) or "none yet"
    raise InputError(f"No run is called {text!r} in {root.url}; there is: {known}.")


def read_attempt(run: Run, attempt: str) -> Attempt:
    """The attempt of that id."""
    return _read(run.root, run.path("attempts", f"{attempt}.json"), _ATTEMPT)


def read_ending(run: Run, attempt: str) -> Ending:
    """How the attempt of that id ended; ``NotFoundError`` if it did not say so."""
    return _read(run.root, run.path("attempts", f"{attempt}.end.json"), _ENDING)


def read_text(root: Root, path: str, key: str) -> str:
    """The text under ``key`` of a small record; a ``DamagedError`` names one that has none."""
    data = root.read_json(path)
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, str):
        raise _foreign(root, path, f"{key}: expected a text")
    return found


def _read(root: Root, path: str, form: TypeAdapter[T]) -> T:
    """The record at ``path``; one that somebody else wrote is an error that names it."""
    try:
        return form.validate_python(root.read_json(path))
    except ValidationError as error:
        raise _foreign(root, path, what_is_wrong(error)) from error


def what_is_wrong(error: ValidationError) -> str:
    """The first thing that pydantic says against a record, in one clause; a foreign key first."""
    first = min(error.errors(), key=lambda item: item["type"] != "unexpected_keyword_argument")
    place = ".".join(str(step) for step in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _foreign(root: Root, path: str, reason: str) -> DamagedError:
    return DamagedError(
        f"{path} in {root.url} is not a record that this version of tessera writes ({reason}); "
        "use the version that wrote it, or restore it from a backup."
    )


_RUN, _ATTEMPT, _ENDING = TypeAdapter(RunRecord), TypeAdapter(Attempt), TypeAdapter(Ending)
_ROLLBACK = TypeAdapter(Rollback)
