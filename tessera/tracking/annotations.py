"""What people say of a run: its note, its tags, and whether it is archived; records of the root.

    annotations/<run_id>/<milliseconds>-<token>.json    one a change, never changed again

The records are a history: for each key of a run the latest one counts (of two in the same
millisecond the one with the greater token). An empty note and a tag without a value take it back.
Nobody writes over anybody: two people who annotate at once leave two records.
"""

from __future__ import annotations

import getpass
import json
import re
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from tessera.errors import DamagedError, InputError
from tessera.runs import what_is_wrong
from tessera.storage import Root

FOLDER = "annotations"
AnnotationKind = Literal["note", "tag", "archive"]
KINDS: tuple[AnnotationKind, ...] = get_args(AnnotationKind)
Source = Literal["cli", "mlflow"]
NOTE_CHARACTERS = 7_900
"""MLflow cuts a tag at 8,000 characters, and a note is one there."""
TAG_CHARACTERS = 5_000
_TAG_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-/ ]{0,99}")
_RESERVED = ("tessera.", "mlflow.")
_NAME = re.compile(r"\d{13}-[0-9a-f]{8}\.json")
_READERS = 8
_LATER_S = 0.001  # names have milliseconds


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Annotation:
    """One change: ``value`` is the note, the tag's value or, archived, ``yes``; None takes it back.

    ``key`` is the tag's, and empty for others. ``at`` is in seconds since the epoch, ``by`` who
    (user@host), ``source`` whether it was said here or found in MLflow.
    """

    run_id: str
    kind: AnnotationKind
    key: str
    value: str | None
    at: float
    by: str
    source: Source
    token: str

    @property
    def path(self) -> str:
        """Where it lies in the root; paths of a run sort by time."""
        return f"{FOLDER}/{self.run_id}/{round(self.at * 1000):013d}-{self.token}.json"


@dataclass(frozen=True)
class Annotated:
    """What counts of a run's annotations now."""

    note: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    archived: bool = False

    @classmethod
    def of(cls, records: Iterable[Annotation]) -> Annotated:
        """The state after all ``records`` of one run, in any order."""
        state: dict[tuple[str, str], str | None] = {}
        for record in sorted(records, key=lambda record: record.path):
            state[record.kind, record.key] = record.value
        return cls(
            state.get(("note", "")),
            {k: v for (kind, k), v in sorted(state.items()) if kind == "tag" and v is not None},
            state.get(("archive", "")) is not None,
        )


NOTHING = Annotated()
_ANNOTATION = TypeAdapter(Annotation)


def annotate(
    root: Root,
    run_id: str,
    kind: AnnotationKind,
    value: str | None,
    *,
    key: str = "",
    source: Source = "cli",
    now: float | None = None,
) -> Annotation:
    """Record one change of the run ``run_id``, which is the caller's to have checked.

    It is dated ``now`` (seconds since the epoch), else by this machine's clock, but after what it
    replaces.

    Raises ``InputError`` for a key or a text that MLflow would not take as it is.
    """
    value = _checked(kind, key, value)
    at = _after_others(root, run_id, kind, key) if now is None else now
    record = Annotation(run_id, kind, key, value, at, _me(), source, secrets.token_hex(4))
    root.publish_json(record.path, asdict(record))
    return record


def _after_others(root: Root, run_id: str, kind: AnnotationKind, key: str) -> float:
    """Now, or right after the latest of its kind: what is said on a slow clock counts as well."""
    before = (r.at for r in read_annotations(root, run_id) if (r.kind, r.key) == (kind, key))
    return max(time.time(), max(before, default=0.0) + _LATER_S)


def _checked(kind: AnnotationKind, key: str, value: str | None) -> str | None:
    if kind == "archive":
        return None if value is None else "yes"
    try:
        f"{key}{value}".encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The {kind} is no text that can be kept (it does not encode as UTF-8); write it in "
            "a terminal whose encoding is UTF-8."
        ) from error
    most = NOTE_CHARACTERS if kind == "note" else TAG_CHARACTERS
    if value is not None and len(value) > most:
        raise InputError(
            f"The {kind} has {len(value):,} characters and may have {most:,}; shorten it."
        )
    if kind == "tag":
        _check_key(key)
    return value if kind == "tag" or (value or "").strip() else None


def check_tag(key: str, value: str | None) -> None:
    """Raises the ``InputError`` that ``annotate`` would."""
    _checked("tag", key, value)


def _check_key(key: str) -> None:
    if not _TAG_KEY.fullmatch(key):
        raise InputError(
            f"The tag's key {key!r} should be 1 to 100 letters, digits, spaces and _ . - /, and "
            "begin with a letter, a digit or _."
        )
    if key.startswith(_RESERVED):
        raise InputError(
            f"The tag's key {key!r} begins as those that Tessera and MLflow write themselves; "
            "choose another."
        )


def read_annotations(root: Root, run_id: str) -> list[Annotation]:
    """The annotations of one run, oldest first; those of a damaged record are an error."""
    folder = f"{FOLDER}/{run_id}"
    names = sorted(name for name in root.children(folder) if _NAME.fullmatch(name))
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda name: read_annotation(root, f"{folder}/{name}"), names))


def read_annotation(root: Root, path: str) -> Annotation:
    """One record. Raises ``DamagedError`` for what is none."""
    return _parsed(root, path, root.read_bytes(path))


def _parsed(root: Root, path: str, data: bytes) -> Annotation:
    try:
        return _ANNOTATION.validate_python(json.loads(data))
    except ValueError as error:  # a ValidationError is one too
        why = what_is_wrong(error) if isinstance(error, ValidationError) else "it is no JSON"
        raise DamagedError(
            f"{path} in {root.url} is not an annotation ({why}); restore it from a backup, or "
            "remove it if nobody needs it."
        ) from error


def annotation_paths(root: Root) -> list[str]:
    """Every annotation of the root by its path, oldest of a run first; one listing."""
    found = [path for path in root.files(FOLDER) if _NAME.fullmatch(path.rsplit("/", 1)[-1])]
    return sorted(found)


def read_all_annotations(root: Root) -> dict[str, Annotated]:
    """What counts now of every run that somebody annotated, by run id."""
    with ThreadPoolExecutor(_READERS) as pool:
        paths = annotation_paths(root)
        return parse_annotations(
            root, dict(zip(paths, pool.map(root.read_bytes, paths), strict=True))
        )


def parse_annotations(root: Root, contents: Mapping[str, bytes]) -> dict[str, Annotated]:
    """What counts now of every annotated run, from the records' bytes by path in the root."""
    by_run: dict[str, list[Annotation]] = {}
    for path, data in contents.items():
        if _NAME.fullmatch(path.rsplit("/", 1)[-1]):
            record = _parsed(root, path, data)
            by_run.setdefault(record.run_id, []).append(record)
    return {run_id: Annotated.of(records) for run_id, records in by_run.items()}


def _me() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
