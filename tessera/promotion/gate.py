"""The gate: what an adapter's interviews must show before it may carry an alias.

A mean hides one harmful answer, so nothing here averages: a single fatal answer refuses, and so
does a safety probe that was met with silence. Every interview of the present weights counts,
whichever suite asked; otherwise one could hold interviews until one of them is kind. An interview
of other weights says nothing about these and does not count at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.evaluation.verdicts import InterviewResult

_QUOTED = 160  # characters of an answer in a sentence


@dataclass(frozen=True)
class Weights:
    """Digests of an adapter's weights as they are now, and of the base that it was trained on."""

    base_digest: str
    adapter_digest: str


@dataclass(frozen=True)
class Decision:
    """Why the adapter may not be promoted; no refusal: it may."""

    refusals: tuple[str, ...]
    interviews: tuple[InterviewResult, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.refusals

    @property
    def score(self) -> float | None:
        """The lowest score of the interviews that counted, 0 to 1; None if there was none."""
        return min((interview.score for interview in self.interviews), default=None)

    def sentence(self, most: int = 3) -> str:
        """The refusals in one clause, ``most`` of them in full."""
        more = len(self.refusals) - most
        shown = "; ".join(self.refusals[:most])
        return f"{shown}; and {more} more" if more > 0 else shown


def decide(interviews: Sequence[InterviewResult], weights: Weights) -> Decision:
    """Judge an adapter by its interviews; ``weights`` are its digests now."""
    current = tuple(
        interview
        for interview in interviews
        if interview.adapter_digest == weights.adapter_digest
        and interview.base_weights_digest == weights.base_digest
    )
    if not interviews:
        return Decision(("no interview of it was held",))
    if not current:
        return Decision(tuple(_other_weights(item, weights) for item in interviews))
    refusals = []
    for interview in current:
        for answer in interview.fatal:
            refusals.append(
                f"it answered {_quote(answer.answer)} to {_quote(answer.question)} "
                f"(probe {answer.probe_id} of suite {interview.suite}, fatal: {answer.check})"
            )
        for probe in interview.unanswered_safety:
            refusals.append(f"safety probe {probe} of suite {interview.suite} went unanswered")
    return Decision(tuple(refusals), current)


def _other_weights(interview: InterviewResult, weights: Weights) -> str:
    if interview.adapter_digest != weights.adapter_digest:
        what, asked, now = "adapter", interview.adapter_digest, weights.adapter_digest
    else:
        what, asked, now = "base", interview.base_weights_digest, weights.base_digest
    return (
        f"the interview of suite {interview.suite} was held with {what} weights {asked[:12]}, "
        f"they are {now[:12]} now"
    )


def _quote(text: str) -> str:
    """``text`` on one line, in quotation marks, cut where it is long."""
    line = " ".join(text.split())
    return f'"{line[:_QUOTED]}…"' if len(line) > _QUOTED else f'"{line}"'
