"""The recipe of a corpus: one YAML that says what is read, what is done to it, and by which
licence.

A recipe is data, not code: every key is checked before a byte is read, an unknown key is an error,
and ``${VAR}`` in a path is replaced only when the file is opened, so a recipe (and the key under
which its build is remembered) is the same on every machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tessera.errors import InputError, TesseraError

MAX_VOCAB_SIZE = 65_536
"""Token ids are stored as uint16, so this many entries fit exactly."""

SourceFormat = Literal["text", "jsonl", "parquet", "docstrings"]
UnicodeForm = Literal["NFC", "NFKC", "none"]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecipe(_Part):
    """One collection of documents that share a format, a licence and a language."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    format: SourceFormat
    path: str | None = None
    """fsspec URL or path relative to the recipe, with globs and ``${VAR}``; none for docstrings."""
    text_field: str = "text"
    id_field: str = "id"
    language: Annotated[str, Field(min_length=1)]
    licence: Annotated[str, Field(min_length=1)]
    url: str | None = None
    synthetic: bool = False
    """Whether a language model wrote the text."""
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    """UTF-8 bytes of text to take from it; it ends with the document that reaches them."""
    note: str | None = None

    @model_validator(mode="after")
    def _path_fits_format(self) -> SourceRecipe:
        if self.format == "docstrings" and self.path is not None:
            raise ValueError("a source of format docstrings takes no `path`: remove it")
        if self.format != "docstrings" and not self.path:
            raise ValueError(f"a source of format {self.format} needs a `path`: add it")
        return self


class NormaliseRecipe(_Part):
    """What is done to every text: see ``tessera.corpus.clean.normalise``."""

    unicode: UnicodeForm = "NFC"
    strip_control: bool = True


class DedupRecipe(_Part):
    """Which duplicates are dropped; the first occurrence, in the order of the sources, is kept."""

    exact: bool = True


class HoldoutRecipe(_Part):
    """The frozen evaluation split: a share of the documents, chosen by salt and text alone."""

    fraction: Annotated[float, Field(ge=0, lt=1)]
    salt: Annotated[str, Field(min_length=1)]


class TrainTokenizer(_Part):
    """Train a byte-level BPE on this corpus's training split."""

    vocab_size: Annotated[int, Field(ge=261, le=MAX_VOCAB_SIZE)]
    train_bytes: Annotated[int, Field(gt=0)] = 60_000_000
    """Bytes of text to learn from, about; of more text, an even sample of the documents is taken.

    This bounds the memory of a build: the trainer keeps every distinct word (in Japanese, nearly
    every phrase is one) with its pairs. Measured on English and Japanese novels: 3.4 GiB at 60 MB
    of text.
    """


class ReuseTokenizer(_Part):
    """Use an existing ``tokenizer.json``."""

    path: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class TokenizerRecipe(_Part):
    """Exactly one of ``train`` and ``reuse``."""

    train: TrainTokenizer | None = None
    reuse: ReuseTokenizer | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerRecipe:
        if (self.train is None) == (self.reuse is None):
            raise ValueError("give exactly one of `train` and `reuse`")
        return self


class ShardsRecipe(_Part):
    """How the token stream is cut into files."""

    tokens: Annotated[int, Field(ge=1024, le=1 << 30)] = 1 << 25
    """A shard is closed before it would exceed this; one document is never cut in two."""


class Recipe(_Part):
    """One corpus; see the commented ``data_manifests/sample.yaml``."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str = ""
    sources: Annotated[tuple[SourceRecipe, ...], Field(min_length=1)]
    interleave: bool = False
    """Read all sources side by side, each in proportion to its ``max_bytes`` (else the size of its
    files), so that every shard holds the whole mixture. Otherwise one after the other."""
    normalise: NormaliseRecipe = NormaliseRecipe()
    dedup: DedupRecipe = DedupRecipe()
    holdout: HoldoutRecipe
    tokenizer: TokenizerRecipe
    shards: ShardsRecipe = ShardsRecipe()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Recipe:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}: give each its own name")
        return self


def load_recipe(path: Path | str) -> Recipe:
    """Read and check one recipe.

    Raises ``InputError`` with one sentence that names the file and the key.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"The recipe {path} cannot be read ({error.strerror}); give the path of a YAML file "
            "such as data_manifests/sample.yaml."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"The recipe {path} is not valid YAML ({_one_line(error)}); correct it there."
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            f"The recipe {path} holds {type(data).__name__}, expected a mapping with name, "
            "sources, holdout and tokenizer; see data_manifests/sample.yaml."
        )
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(validation_sentence(f"The recipe {path}", error)) from error


def expand_variables(text: str, *, where: str) -> str:
    """``text`` with every ``${VAR}`` replaced from the environment.

    ``where`` names the key for the ``InputError`` that an unset variable raises.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not (found := os.environ.get(name)):
            raise InputError(
                f"{where} is {text!r}, and the environment variable {name} is not set; set it to "
                "the folder or URL that holds the files."
            )
        return found

    return _VARIABLE.sub(value, text)


def validation_sentence(subject: str, error: ValidationError) -> str:
    """pydantic's report as one sentence: the first key at fault, and how many more there are."""
    found = error.errors(include_url=False)
    places = [problem["loc"] for problem in found]
    # A list with a wrong entry is reported again as too short: the entry alone says more.
    problems = [
        p
        for p in found
        if not any(o != p["loc"] and o[: len(p["loc"])] == p["loc"] for o in places)
    ]
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    # A check of our own speaks in whole words already; pydantic prefixes it with "Value error, ".
    reason = str(first["msg"]).removeprefix("Value error, ")
    reason = {
        "extra_forbidden": "is not a known key: remove it or correct its spelling",
        "missing": "is missing: add it",
    }.get(first["type"], f"is wrong: {_lower(reason)}{_given(first)}")
    place = f"key `{key}` {reason}" if key else _lower(str(first["msg"]).split(", ", 1)[-1])
    more = len(problems) - 1
    rest = f" ({more} more problem{'s' if more > 1 else ''} after this one)" if more else ""
    return f"{subject}: {place}{rest}."


def _given(problem: Any) -> str:
    value = problem.get("input")
    return f", got {value!r}" if isinstance(value, str | int | float | bool) else ""


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def declared_bytes(path: str) -> int:
    """The text that a recipe's sources may read at most, 0 for what says no ``max_bytes``.

    For a sentence, like ``recipe_for``: a file that is no recipe has none.
    """
    try:
        return sum(source.max_bytes or 0 for source in load_recipe(path).sources)
    except TesseraError:
        return 0


def recipe_for(corpus: str, folder: Path = Path("data_manifests")) -> str:
    """The recipe in ``folder`` whose ``name`` is ``corpus``; ``RECIPE`` where none is.

    For a sentence that says what to build: a file's name need not be the corpus's.
    """
    for path in sorted(folder.glob("*.yaml")):
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(data, dict) and data.get("name") == corpus:
            return path.as_posix()
    return "RECIPE"
