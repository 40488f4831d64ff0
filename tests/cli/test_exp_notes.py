"""``note``, ``tag`` and ``archive``: what they record, show and refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tessera.tracking.annotations import read_annotations

if TYPE_CHECKING:
    from tests.cli.shell import Shell
    from tests.tracking.fabricate import Bench


def test_a_note_is_shown_with_those_before_it(bench: Bench, shell: Shell) -> None:
    run = bench.finished()
    assert "has no note" in shell.said("note", "base")
    assert shell.said("note", "base", "first") == f"{run.id}: noted.\n"
    shell.said("note", "base", "Second.\nWith details.")
    lines = shell.said("note", "base").splitlines()
    assert lines[:2] == ["Second.", "With details."]
    assert lines[2].endswith("cli: Second.")
    assert lines[3].endswith("cli: first")
    assert shell.json("note", "base")[0]["value"] == "first"
    assert "Second." in shell.said("show", "base")
    shell.said("note", "base", "--clear")
    assert "(the note was taken back)" in shell.said("note", "base")
    assert shell.json("show", "base")["annotations"]["note"] is None


def test_a_note_from_the_editor(
    bench: Bench, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.finished()
    shell.said("note", "base", "before")
    monkeypatch.setenv("EDITOR", "sed -i s/before/after/")
    assert "noted" in shell.said("note", "base", "--edit")
    assert shell.json("show", "base")["annotations"]["note"] == "after"
    monkeypatch.setenv("EDITOR", "true")
    assert shell.said("note", "base", "--edit") == "Nothing was changed.\n"


def test_tags_come_and_go(bench: Bench, shell: Shell) -> None:
    run = bench.finished()
    assert shell.said("tag", "base") == f"{run.id}: no tags.\n"
    assert shell.said("tag", "base", "a=1=2", "b") == f"{run.id}: a=1=2, b.\n"
    assert shell.json("tag", "base", "--remove", "a") == {"b": ""}
    assert "tags    " in " ".join(shell.said("show", "base").split("\n"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("note", "base", " "), "The note is empty"),
        (("note", "base", "words", "--clear"), "Give TEXT, --edit or --clear, one of them."),
        (("note", "base", "x" * 8000), "The note has 8,000 characters and may have 7,900"),
        (("note", "nobody", "words"), "No run is called 'nobody'"),
        (("tag", "base", "good=1", "tessera.kind=x"), "begins as those that Tessera"),
        (("tag", "base", "good=1", "--remove", "other"), "has no tag 'other'; it has: none"),
        (("archive", "base", "nobody"), "No run is called 'nobody'"),
    ],
)
def test_what_is_refused_leaves_nothing(
    bench: Bench, shell: Shell, arguments: tuple[str, ...], sentence: str
) -> None:
    run = bench.finished()
    code, out, err = shell(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert read_annotations(bench.root, run.id) == []
