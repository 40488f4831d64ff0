"""Everything that the page shows, as data; formatting and drawing come later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tessera.tracking.checkpoints import CheckpointSummary
from tessera.tracking.queries import AttemptSummary, RunSummary


@dataclass(frozen=True)
class Point:
    """One point of the surviving lineage, and what the run had cost by then.

    ``hours`` are billed hours and ``usd`` US dollars of all attempts up to the moment of the point,
    lost work included; ``usd`` is None where nobody told a price. ``at`` is in seconds since the
    epoch, ``tokens`` None where the run counted none.
    """

    step: int
    at: float
    tokens: float | None
    hours: float
    usd: float | None
    value: float

    @property
    def finite(self) -> bool:
        """Whether the value is a number that can be drawn."""
        return self.value - self.value == 0


@dataclass(frozen=True)
class Curve:
    """A metric over the run, thinned for drawing: ``points`` of ``total``.

    ``first``, ``last``, ``lowest`` and ``highest`` are of the finite ones, None if there are none;
    ``not_finite`` counts the others of all ``total``.
    """

    key: str
    points: tuple[Point, ...]
    total: int
    not_finite: int

    @property
    def numbers(self) -> tuple[Point, ...]:
        """The points that can be drawn."""
        return tuple(point for point in self.points if point.finite)

    @property
    def first(self) -> Point | None:
        """The earliest number."""
        return next(iter(self.numbers), None)

    @property
    def last(self) -> Point | None:
        """The latest number."""
        return self.numbers[-1] if self.numbers else None

    @property
    def lowest(self) -> Point | None:
        """The smallest number, the earliest of equal ones."""
        return min(self.numbers, key=lambda point: point.value, default=None)

    @property
    def highest(self) -> Point | None:
        """The largest number, the earliest of equal ones."""
        return max(self.numbers, key=lambda point: point.value, default=None)


@dataclass(frozen=True)
class Stay:
    """One attempt on the clock: when it was billed; seconds since the epoch."""

    attempt: AttemptSummary
    billed: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Source:
    """One source of the corpus: what it is, and documents and tokens that came through."""

    name: str
    licence: str
    url: str | None
    language: str
    synthetic: bool
    note: str | None
    documents_in: int
    documents_out: int
    tokens: int


@dataclass(frozen=True)
class Corpus:
    """What the run was trained on; ``problem`` says why the manifest cannot be shown."""

    name: str
    fingerprint: str
    path: str = ""
    problem: str | None = None
    description: str = ""
    built_at: str = ""
    commit: str | None = None
    tokenizer: str = ""
    vocab_size: int = 0
    splits: tuple[tuple[str, int, int, int], ...] = ()
    """Name, tokens, documents and shards."""
    dedup_method: str = "none"
    dedup_documents: int = 0
    dedup_bytes: int = 0
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer of an interview; ``sample`` 0 is the greedy one, ``verdict`` as in the suite."""

    probe: str
    safety: bool
    question: str
    answer: str
    verdict: str
    why: str
    sample: int


@dataclass(frozen=True)
class Interview:
    """One interview of an adapter; answers as the page shows them: the worst first."""

    adapter: str
    suite: str
    suite_digest: str
    score: float
    of_these_weights: bool
    verdicts: Mapping[str, int]
    unanswered_safety: tuple[str, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Weights:
    """One link from base to adapter: a run's model or one of its adapters.

    ``here`` marks what belongs to the run of the page; ``digest`` is None where no weights are
    published.
    """

    what: str
    name: str
    run_id: str
    digest: str | None
    here: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Happening:
    """One event in words; ``at`` in seconds since the epoch."""

    at: float
    attempt: str
    step: int
    what: str


@dataclass(frozen=True)
class Extras:
    """What other rooms know of the run."""

    corpus: Corpus | None = None
    interviews: tuple[Interview, ...] = ()
    lineage: tuple[Weights, ...] = ()
    conversations: tuple[str, ...] = ()
    base_commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """One run at one moment. ``curves`` are by metric; dollars and times as in ``summary``."""

    root_url: str
    summary: RunSummary
    stays: tuple[Stay, ...]
    usd_by_category: Mapping[str, float] | None
    curves: Mapping[str, Curve]
    checkpoints: CheckpointSummary
    happenings: tuple[Happening, ...]
    experiment: Mapping[str, Any]
    commit: str | None
    fingerprint: str
    base: Mapping[str, str] | None
    note: str | None
    tags: Mapping[str, str]
    archived: bool
    last_record_at: float
    extras: Extras = field(default_factory=Extras)
