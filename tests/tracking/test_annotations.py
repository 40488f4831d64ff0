"""Notes, tags and archive marks: the latest record counts; what MLflow cannot carry is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.errors import DamagedError, InputError
from tessera.storage import Root
from tessera.tracking.annotations import (
    NOTHING,
    Annotated,
    annotate,
    read_all_annotations,
    read_annotations,
)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path))


def test_the_latest_note_tag_and_archive_mark_count(root: Root) -> None:
    annotate(root, "a-1", "note", "first", now=1.0)
    annotate(root, "a-1", "note", "second", now=2.0)
    annotate(root, "a-1", "tag", "blue", key="colour", now=3.0)
    annotate(root, "a-1", "tag", "red", key="colour", now=2.5)  # said earlier, written later
    annotate(root, "a-1", "archive", "because", now=4.0)
    annotate(root, "b-2", "archive", "yes", now=1.0)
    annotate(root, "b-2", "archive", None, now=2.0)
    found = read_all_annotations(root)
    assert found["a-1"] == Annotated("second", {"colour": "blue"}, True)
    assert found["b-2"] == NOTHING
    assert [record.value for record in read_annotations(root, "a-1")] == [
        "first", "second", "red", "blue", "yes",
    ]  # fmt: skip


def test_a_slow_clock_does_not_undo_what_is_said(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotate(root, "a-1", "note", "early", now=1300.0)
    annotate(root, "a-1", "archive", "yes", now=1300.0)
    monkeypatch.setattr("tessera.tracking.annotations.time.time", lambda: 1000.0)
    annotate(root, "a-1", "note", "late")
    annotate(root, "a-1", "archive", None)
    assert read_all_annotations(root)["a-1"] == Annotated("late", {}, False)


def test_an_empty_note_and_a_tag_without_a_value_take_it_back(root: Root) -> None:
    annotate(root, "a-1", "note", "words", now=1.0)
    annotate(root, "a-1", "note", " ", now=2.0)
    annotate(root, "a-1", "tag", "x", key="k", now=1.0)
    annotate(root, "a-1", "tag", None, key="k", now=2.0)
    annotate(root, "a-1", "tag", "", key="empty", now=2.0)
    assert read_all_annotations(root)["a-1"] == Annotated(None, {"empty": ""}, False)


@settings(deadline=None)  # it writes files
@given(st.permutations(range(4)))
def test_the_order_in_which_records_are_read_does_not_matter(order: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        place = Root(folder)
        records = [
            annotate(place, "a-1", "tag", str(number), key="k", now=5.0) for number in range(4)
        ]
    expected = max(records, key=lambda record: record.token).value
    assert Annotated.of([records[number] for number in order]).tags == {"k": expected}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("", "v", "should be 1 to 100 letters"),
        ("tessera.kind", "v", "begins as those"),
        ("mlflow.note.content", "v", "begins as those"),
        ("k", "\udcff", "is no text that can be kept"),
        ("k", "v" * 5001, "has 5,001 characters and may have 5,000"),
    ],
)
def test_what_mlflow_would_not_take_is_refused(
    root: Root, key: str, value: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        annotate(root, "a-1", "tag", value, key=key)
    assert read_all_annotations(root) == {}


def test_a_damaged_record_is_named(root: Root) -> None:
    record = annotate(root, "a-1", "note", "words")
    root.publish_json(record.path, {"run_id": "a-1"})
    with pytest.raises(DamagedError, match=f"{record.path}.*is not an annotation"):
        read_annotations(root, "a-1")
