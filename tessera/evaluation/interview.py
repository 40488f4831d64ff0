"""Hold an interview: ask a voice a whole suite, judge the answers, keep the transcript."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import groupby

from tessera.errors import DamagedError, InputError
from tessera.evaluation.suite import Question, Suite
from tessera.evaluation.verdicts import InterviewResult, judge
from tessera.evaluation.weights import SIDECAR, Voice
from tessera.runs import Run, read_text


def interview_path(run: Run, suite_digest: str, adapter: str) -> str:
    """Where the root keeps the interview of an adapter under a suite."""
    return run.path("interviews", suite_digest, f"{adapter}.json")


def hold_interview(
    voice: Voice,
    suite: Suite,
    *,
    run_id: str,
    adapter: str,
    asked: Callable[[Question, str], None] = lambda question, answer: None,
) -> InterviewResult:
    """Ask everything and judge it. ``asked`` hears each answer as it comes."""
    started = time.monotonic()
    answers: dict[tuple[str, int, int], str] = {}
    for text, group in groupby(suite.questions(), key=lambda question: question.text):
        questions = list(group)
        said = voice.answers(
            text,
            seeds=[question.seed for question in questions],
            max_new_tokens=suite.max_new_tokens,
            temperature=suite.samples.temperature,
            top_p=suite.samples.top_p,
        )
        for question, answer in zip(questions, said, strict=True):
            answers[question.key] = answer
            asked(question, answer)
    return InterviewResult(
        suite=suite.name,
        suite_digest=suite.digest,
        run_id=run_id,
        adapter=adapter,
        base_weights_digest=voice.base.digest,
        adapter_digest=voice.adapter_digest,
        samples=suite.samples,
        max_new_tokens=suite.max_new_tokens,
        wall_seconds=time.monotonic() - started,
        probes=judge(suite, answers),
    )


def store_interview(run: Run, result: InterviewResult) -> str:
    """Publish the transcript and its verdicts; returns the path in the root."""
    path = interview_path(run, result.suite_digest, result.adapter)
    run.root.publish_json(path, result.to_json())
    return path


def stored_interview(run: Run, suite_digest: str, adapter: str) -> InterviewResult | None:
    """The stored interview, if it asked the adapter's present weights."""
    path = interview_path(run, suite_digest, adapter)
    if not run.root.exists(path):
        return None
    try:
        result = InterviewResult.from_json(run.root.read_json(path))
    except InputError as error:
        raise DamagedError(f"{path} in {run.root.url}: {error}") from error
    sidecar = run.path("adapters", adapter, SIDECAR)
    exists = run.root.exists(sidecar)
    now = read_text(run.root, sidecar, "weights_digest") if exists else None
    return result if result.adapter_digest == now else None


def stored_interviews(run: Run) -> Iterator[InterviewResult]:
    """Every interview of the run, whatever suite and adapter."""
    for path in run.root.files(run.path("interviews")):
        if path.endswith(".json"):
            try:
                yield InterviewResult.from_json(run.root.read_json(path))
            except InputError as error:
                raise InputError(f"{path} in {run.root.url}: {error}") from error
