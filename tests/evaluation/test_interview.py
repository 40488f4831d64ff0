"""Holding an interview and keeping it, with a voice whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tessera.corpus.chat import Message
from tessera.errors import DamagedError, InputError
from tessera.evaluation.interview import (
    hold_interview,
    interview_path,
    store_interview,
    stored_interview,
    stored_interviews,
)
from tessera.evaluation.suite import Question, Suite, load_suite
from tessera.evaluation.weights import SIDECAR, Base, Voice
from tessera.runs import Run, RunRecord
from tessera.storage import Root

DIGEST = "a" * 64


class Parrot(Voice):
    """Says what it was asked and with which seed; remembers how."""

    asked: list[tuple[str, tuple[int | None, ...], int, float, float]]

    def answers(
        self,
        prompt: str | Sequence[Message],
        *,
        seeds: Sequence[int | None],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[str]:
        assert isinstance(prompt, str)
        self.asked.append((prompt, tuple(seeds), max_new_tokens, temperature, top_p))
        return [f"{prompt} {seed}" for seed in seeds]


@pytest.fixture
def voice() -> Voice:
    base = Base("base-1", None, None, "b" * 64)  # type: ignore[arg-type]
    parrot = Parrot(base, DIGEST, None)  # type: ignore[arg-type]
    object.__setattr__(parrot, "asked", [])
    return parrot


@pytest.fixture
def suite() -> Suite:
    return load_suite(Path(__file__).parents[2] / "experiments" / "interview.yaml")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    record = RunRecord("voice-1", "voice", "sft", 0.0, {}, {}, "f" * 64, {}, None)
    run = Run(Root(str(tmp_path), attempts=1), record)
    run.root.publish_json(run.path("adapters", "ep1", SIDECAR), {"weights_digest": DIGEST})
    return run


def test_every_question_is_asked_as_the_suite_says(voice: Voice, suite: Suite) -> None:
    heard: list[tuple[Question, str]] = []
    result = hold_interview(
        voice, suite, run_id="voice-1", adapter="ep1", asked=lambda q, a: heard.append((q, a))
    )
    questions = list(suite.questions())
    assert [question for question, _ in heard] == questions
    assert all(answer == f"{question.text} {question.seed}" for question, answer in heard)

    assert isinstance(voice, Parrot)
    assert [(text, seed) for text, seeds, *_ in voice.asked for seed in seeds] == [
        (question.text, question.seed) for question in questions
    ]
    assert len(voice.asked) < len(questions), "the samples of one wording are one batch"
    settings = (suite.max_new_tokens, suite.samples.temperature, suite.samples.top_p)
    assert {call[2:] for call in voice.asked} == {settings}

    assert (result.suite_digest, result.adapter_digest) == (suite.digest, DIGEST)
    assert (result.base_weights_digest, result.run_id) == ("b" * 64, "voice-1")
    assert result.wall_seconds >= 0


def test_it_is_kept_with_the_weights_that_answered(voice: Voice, suite: Suite, run: Run) -> None:
    assert stored_interview(run, suite.digest, "ep1") is None
    result = hold_interview(voice, suite, run_id=run.id, adapter="ep1")
    path = store_interview(run, result)
    assert path == interview_path(run, suite.digest, "ep1")
    assert path == f"runs/voice-1/interviews/{suite.digest}/ep1.json"
    assert stored_interview(run, suite.digest, "ep1") == result
    assert list(stored_interviews(run)) == [result]
    assert stored_interview(run, "0" * 64, "ep1") is None

    run.root.publish_json(run.path("adapters", "ep1", SIDECAR), {"weights_digest": "c" * 64})
    assert stored_interview(run, suite.digest, "ep1") is None, "other weights never answered it"
    run.root.delete(run.path("adapters", "ep1", SIDECAR))
    assert stored_interview(run, suite.digest, "ep1") is None


def test_a_foreign_file_among_interviews_is_named(run: Run, suite: Suite) -> None:
    path = run.path("interviews", suite.digest, "ep1.json")
    run.root.publish_json(path, {"a": 1})
    with pytest.raises(InputError, match=r"interviews/.*ep1\.json in "):
        list(stored_interviews(run))


@pytest.mark.parametrize("value", [{}, [], {"format": 1, "probes": None}])
def test_a_stored_interview_of_another_form_is_damage(
    voice: Voice, suite: Suite, run: Run, value: object
) -> None:
    path = interview_path(run, suite.digest, "ep1")
    run.root.publish_json(path, value)
    with pytest.raises(DamagedError, match=r"interviews/.*ep1\.json in "):
        stored_interview(run, suite.digest, "ep1")
    store_interview(run, hold_interview(voice, suite, run_id="voice-1", adapter="ep1"))
    run.root.publish_json(run.path("adapters", "ep1", SIDECAR), {})
    with pytest.raises(DamagedError, match=r"adapters/ep1/weights\.json in .*weights_digest"):
        stored_interview(run, suite.digest, "ep1")
