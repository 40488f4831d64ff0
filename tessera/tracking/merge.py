"""Notes, tags and archive marks: what the root says and what people did in MLflow, as one.

Of a run three things are compared, item by item (the note, each tag, whether it is archived): what
the records of the root say, what MLflow shows, and the *base*: what the last sync left there, which
is kept in the run's tag ``tessera.annotated`` as digests.

* Only the root differs from the base: MLflow is changed.
* Only MLflow differs: somebody edited it there, and the edit becomes a record of the root.
* Both differ: the root's counts; MLflow's becomes a record dated just before it, and is told.

An archived run is one that is deleted in MLflow, which hides it and keeps everything. What cannot
become a record (a key that is reserved or too long, another name) is told: an MLflow made again
from the root will not have it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tessera.errors import DamagedError, InputError
from tessera.storage import Root, sha256_bytes
from tessera.tracking.annotations import (
    FOLDER,
    NOTE_CHARACTERS,
    Annotated,
    Annotation,
    AnnotationKind,
    annotate,
    annotation_paths,
    read_annotation,
)
from tessera.tracking.view import NOTE, OURS

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

BASE = "tessera.annotated"
"""The tag with the base: digests of the note and the tags, and whether the run was archived."""
RESERVED = (OURS, "mlflow.")
RUN_NAME = "mlflow.runName"
_BASE_CHARACTERS = 7_900

Item = tuple[AnnotationKind, str]
"""What can be annotated: its kind, and the key of a tag (else empty)."""


class Annotations:
    """The annotations of a root; a second ``read`` fetches only what is new, records never change.

    ``damaged`` says by run id what is wrong with a record of it.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._known: dict[str, Annotation] = {}
        self.damaged: dict[str, str] = {}
        self._by_run: dict[str, list[Annotation]] = {}

    def read(self) -> None:
        """Look what there is now."""
        self.damaged, self._by_run, known = {}, {}, {}
        for path in annotation_paths(self._root):
            run_id = path.removeprefix(f"{FOLDER}/").split("/")[0]
            try:
                known[path] = self._known.get(path) or read_annotation(self._root, path)
            except DamagedError as error:
                self.damaged[run_id] = str(error)
                continue
            self._by_run.setdefault(run_id, []).append(known[path])
        self._known = known

    def of(self, run_id: str) -> list[Annotation] | None:
        """The records of one run; None where one of them cannot be read."""
        return None if run_id in self.damaged else self._by_run.get(run_id, [])


@dataclass(frozen=True)
class Shown:
    """What MLflow shows of a run's annotations."""

    note: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    archived: bool = False

    @classmethod
    def of(cls, run: MlflowRun, *, archived: bool) -> Shown:
        """Read it from ``run``; ``archived`` is the caller's to know."""
        tags = run.data.tags
        foreign = {key: value for key, value in tags.items() if not key.startswith(RESERVED)}
        note = tags.get(NOTE, "")
        return cls(note if note.strip() else None, foreign, archived)


@dataclass(frozen=True)
class Merged:
    """What came of it: ``state`` counts from now on, and MLflow has to show it.

    ``imported`` are the records that were made of edits, ``told`` sentences about what became
    none, ``foreign`` are tags that stay in MLflow alone.
    """

    state: Annotated
    imported: tuple[Annotation, ...] = ()
    told: tuple[str, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)


def merge(
    root: Root, run_id: str, base: Mapping[str, str], shown: Shown, records: Iterable[Annotation]
) -> Merged:
    """Bring the three together; edits made in MLflow are written to the root as records."""
    records = list(records)
    state = Annotated.of(records)
    ours, theirs = _items(state.note, state.tags, state.archived), _items(
        shown.note, shown.tags, shown.archived
    )  # fmt: skip
    imported, told, foreign = [], [], {}
    for item in sorted(ours.keys() | theirs.keys()):
        mine, there, before = ours.get(item), theirs.get(item), base.get(digest_of(item))
        if mine == there or _digest(there) == before:
            continue
        # A removal of the root's is a change too; one without any record is nobody's.
        both = _digest(mine) != before and any((r.kind, r.key) == item for r in records)
        try:
            at = _dated(records, item, before=both)
            kind, key = item
            record = annotate(root, run_id, kind, there, key=key, source="mlflow", now=at)
            imported.append(record)
        except InputError as error:
            told.append(f"Run {run_id}: {_what(item)} of MLflow is in no record: {error}")
            if there is not None:
                foreign[item[1] if item[0] == "tag" else NOTE] = there
            continue
        if both:
            told.append(
                f"Run {run_id}: {_what(item)} was changed in MLflow and in the root since the last "
                "sync; the root's counts, MLflow's is kept as an earlier record."
            )
    return Merged(Annotated.of([*records, *imported]), tuple(imported), tuple(told), foreign)


def _dated(records: Iterable[Annotation], item: Item, *, before: bool) -> float:
    """When an edit was made, for all that is known: after the item's last record, or before it.

    MLflow does not say when, and the clock of whoever wrote that record may be ahead.
    """
    at = max((r.at for r in records if (r.kind, r.key) == item), default=None)
    if at is None:
        return time.time()
    return at - 0.001 if before else max(time.time(), at + 0.001)


def _items(note: str | None, tags: Mapping[str, str], archived: bool) -> dict[Item, str]:
    found: dict[Item, str] = {("tag", key): value for key, value in tags.items()}
    if note is not None:
        found["note", ""] = note
    if archived:
        found["archive", ""] = "yes"
    return found


def _what(item: Item) -> str:
    return f"tag {item[1]!r}" if item[0] == "tag" else f"the {item[0]}"


# -- the base ------------------------------------------------------------------------------------


def digest_of(item: Item) -> str:
    """How the base names an item: the keys of tags may be long."""
    return "archive" if item[0] == "archive" else sha256_bytes(repr(item).encode())[:8]


def _digest(value: str | None) -> str | None:
    return None if value is None else sha256_bytes(value.encode())[:8]


def base_of(run: MlflowRun) -> dict[str, str]:
    """The base that the last sync left; empty where none can be read."""
    try:
        found: Any = json.loads(run.data.tags.get(BASE, "{}"))
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def base_after(shown: Shown, merged: Merged, base: Mapping[str, str]) -> dict[str, str]:
    """The base for merging once more, when MLflow showed ``shown`` to the merge before.

    What that merge could make no record of counts as changed since ``base`` still.
    """
    items = _items(shown.note, shown.tags, shown.archived)
    found = {digest_of(item): sha256_bytes(value.encode())[:8] for item, value in items.items()}
    for key in merged.foreign:
        name = digest_of(("note", "") if key == NOTE else ("tag", key))
        found.pop(name, None)
        if name in base:
            found[name] = base[name]
    return found


def base_text(state: Annotated) -> str | None:
    """The tag's value for what MLflow shows of ``state`` now; None if that is nothing.

    Tags beyond some hundreds have no place in it: edits of those count as conflicts.
    """
    items = _items(state.note, state.tags, state.archived)
    found = {digest_of(item): _digest(value) for item, value in sorted(items.items())}
    while len(text := json.dumps(found, separators=(",", ":"))) > _BASE_CHARACTERS:
        found.popitem()
    return text if found else None


def note_and_tags(state: Annotated) -> dict[str, str]:
    """What MLflow has to show of ``state`` as tags."""
    note = {} if state.note is None else {NOTE: state.note[:NOTE_CHARACTERS]}
    return {**state.tags, **note}


def renamed(run_id: str, run: MlflowRun) -> str | None:
    """A sentence about a run to which MLflow's UI gave another name, which no record holds."""
    name = run.data.tags.get(RUN_NAME, run_id)
    if name == run_id:
        return None
    return (
        f"Run {run_id} is called {name!r} in MLflow; no record holds that, so a rebuilt MLflow "
        "will not have it: put it into a note or a tag."
    )
