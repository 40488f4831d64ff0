"""An interview suite: what is asked, how it is sampled, and what the answers are held to.

One YAML file becomes one frozen ``Suite``. Its digest covers everything that can change a verdict,
the checks' own code version included, and nothing else: comments, key order, titles and the
suite's name do not move it, and a default written out is the default. Two results with one digest
were asked the same questions under the same rules. The seed of every sample follows from it, so
nobody can ask again until a bad voice is lucky: another seed is another digest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from tessera.errors import InputError
from tessera.evaluation import checks
from tessera.storage import canonical_json, sha256_bytes


def _usable_pattern(pattern: str) -> str:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if compiled.search(""):
        raise ValueError(f"{pattern!r} matches the empty text, so it says nothing")
    if re.search(r"n't\b|'(?:re|m|ll|ve)\b", pattern):
        raise ValueError(f"{pattern!r} can never match: write contractions out (do not, you are)")
    return pattern


def _refuse_twice(what: str, names: list[Any]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the {what} {twice!r} is there twice")


Identifier = Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Patterns = Annotated[
    tuple[Annotated[StrictStr, AfterValidator(_usable_pattern)], ...], Field(min_length=1)
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Check(_Frozen):
    name: Identifier
    fatal: StrictBool = False
    wordings: tuple[Annotated[StrictInt, Field(ge=0)], ...] = ()

    def applies_to(self, wording_index: int) -> bool:
        """Whether the check looks at the answers to this wording (no list: at all of them)."""
        return not self.wordings or wording_index in self.wordings


class PatternCheck(_Check):
    """Regular expressions over the normalised answer; ``unless`` holds excuses (see ``checks``)."""

    kind: Literal["any_of", "must", "must_not"]
    patterns: Patterns
    unless: Patterns | tuple[()] = ()

    def failure(self, text: str, expected: int | None) -> str | None:
        """Why ``text`` does not pass, or None."""
        rule = {"any_of": checks.any_of, "must": checks.must, "must_not": checks.must_not}
        return rule[self.kind](text, self.patterns, self.unless)


class NumericCheck(_Check):
    """The answer's number is the ``answer`` of its wording."""

    kind: Literal["numeric"]

    def failure(self, text: str, expected: int | None) -> str | None:
        """Why ``text`` does not pass, or None."""
        return checks.numeric(text, expected) if expected is not None else "no answer to compare"


class MaxWordsCheck(_Check):
    """The answer has at most ``limit`` words."""

    kind: Literal["max_words"]
    limit: Annotated[StrictInt, Field(ge=1)]

    def failure(self, text: str, expected: int | None) -> str | None:
        """Why ``text`` does not pass, or None."""
        return checks.max_words(text, self.limit)


Check = Annotated[PatternCheck | NumericCheck | MaxWordsCheck, Field(discriminator="kind")]


class Wording(_Frozen):
    """One way to ask; a plain string in the YAML unless it has a number as its ``answer``."""

    text: Annotated[StrictStr, Field(min_length=1)]
    answer: StrictInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value


class Probe(_Frozen):
    """One subject, asked in several wordings, with the checks of its answers in order."""

    id: Identifier
    title: Annotated[StrictStr, Field(exclude=True)]  # for people: no part of the digest
    safety: StrictBool
    wordings: Annotated[tuple[Wording, ...], Field(min_length=1)]
    checks: Annotated[tuple[Check, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> Probe:
        _refuse_twice("check name", [check.name for check in self.checks])
        _refuse_twice("wording", [wording.text for wording in self.wordings])
        for check in self.checks:
            if check.name == "floor":
                raise ValueError("the name 'floor' is taken by the floor under every answer")
            if beyond := [i for i in check.wordings if i >= len(self.wordings)]:
                raise ValueError(f"check {check.name!r} names wording {beyond[0]}, counted from 0")
        for index, wording in enumerate(self.wordings):
            kinds = [check.kind for check in self.checks if check.applies_to(index)]
            if ("numeric" in kinds) != (wording.answer is not None):
                raise ValueError(
                    f"wording {wording.text!r} needs both an answer and a numeric check, or neither"
                )
        if self.safety and not any(check.fatal for check in self.checks):
            raise ValueError("a safety probe needs a fatal check")
        return self


class Samples(_Frozen):
    """How the answers to a wording are drawn: one greedy, then ``count`` seeded samples."""

    count: Annotated[StrictInt, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: StrictInt

    @property
    def per_wording(self) -> int:
        """Answers to each wording, the greedy one included."""
        return self.count + 1


def _distinct(probes: tuple[Probe, ...]) -> tuple[Probe, ...]:
    _refuse_twice("probe id", [probe.id for probe in probes])
    return probes


@dataclass(frozen=True)
class Question:
    """One thing to ask the model; sample 0 is greedy and has no seed."""

    probe_id: str
    wording_index: int
    sample_index: int
    text: str
    seed: int | None

    @property
    def key(self) -> tuple[str, int, int]:
        """What ``verdicts.judge`` expects the answer under."""
        return self.probe_id, self.wording_index, self.sample_index


class Suite(_Frozen):
    """A whole interview."""

    name: Identifier
    version: Annotated[StrictInt, Field(ge=1)]
    max_new_tokens: Annotated[StrictInt, Field(ge=1)]
    samples: Samples
    probes: Annotated[tuple[Probe, ...], Field(min_length=1), AfterValidator(_distinct)]

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of everything that can change a verdict, ``CHECKS_VERSION`` included."""
        content = self.model_dump(mode="json", exclude={"name"})
        return sha256_bytes(canonical_json({"checks": checks.CHECKS_VERSION, "suite": content}))

    def questions(self) -> Iterator[Question]:
        """Everything to ask, in the order of the file."""
        for probe in self.probes:
            for w, wording in enumerate(probe.wordings):
                for s in range(self.samples.per_wording):
                    seed = sample_seed(self, probe.id, w, s) if s else None
                    yield Question(probe.id, w, s, wording.text, seed)


def sample_seed(suite: Suite, probe_id: str, wording_index: int, sample_index: int) -> int:
    """The seed (63 bits, never negative) of one sample, a pure function of the suite's digest.

    The same for every adapter, so that two voices are compared on the same draws.
    """
    place = canonical_json([suite.digest, probe_id, wording_index, sample_index])
    return int(sha256_bytes(place)[:16], 16) >> 1


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice: the lost one could be the fatal checks."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        try:
            _refuse_twice("key", [self.construct_object(key, deep=True) for key, _ in node.value])
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None
        return super().construct_mapping(node, deep)


def load_suite(path: str | Path) -> Suite:
    """Read and check a suite; ``InputError`` names the file and the key."""
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"The suite {path} cannot be read: {reason}; correct it.") from error
    try:
        return Suite.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key, reason = _key(raw, first["loc"]), first["msg"].removeprefix("Value error, ")
        sentence = f"The suite {path} cannot be used: {key}: {reason}; correct it."
        raise InputError(sentence) from error


def _key(raw: Any, location: tuple[int | str, ...]) -> str:
    """``probes[0].checks[1].patterns``, without the steps that pydantic adds for unions."""
    key, here = "", raw
    for step in location:
        if isinstance(step, int):
            key, here = f"{key}[{step}]", here[step] if isinstance(here, list | tuple) else None
        elif isinstance(here, dict) and (step in here or step != here.get("kind")):
            key, here = f"{key}.{step}", here.get(step)
    return key.lstrip(".") or "the whole file"
