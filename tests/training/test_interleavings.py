"""Two attempts of one run at once, in the orders in which they are most likely to harm each other.

All orders, and stores with and without conditional writes: ``tests/full/test_interleavings.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.full.interleaving import Case, Theatre
from tests.full.lineages import Whole
from tests.full.schedules import ONE, TWO, moves
from tests.full.stage import Folder, Stage, Tally


@pytest.fixture(scope="module")
def stage(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A folder as the root."""
    folder = tmp_path_factory.mktemp("stage")
    shutil.copytree(corpus, folder / "root")
    with Theatre() as theatre:
        yield Stage(theatre, folder, str(folder / "root"), Folder(folder / "root"), {})


@pytest.fixture(scope="module")
def whole(stage: Stage) -> Whole:
    return stage.undisturbed(TWO)[0]


CASES = {
    # B tidies up what A is about to complete; then A, which is further, tidies up in turn.
    "overtaken while completing": Case(
        moves(
            "A after attempt 1 | B before attempt 1 | A before COMPLETE 2 | B before file 3"
            " | B kill | A end"
        ),
        ONE,
    ),
    "finished while completing": Case(moves("A before COMPLETE 1 | B end | A end"), TWO),
    "the same number": Case(
        moves("A before attempt 1 | B before attempt 1 | A after COMPLETE 1 | B end | A end"),
        TWO,
        same_machine=True,
    ),
    "both publish": Case(moves("A before model 2 | B before ending 1 | A end | B end"), TWO),
    # What A is about to load lies on the disk that B prunes.
    "pruned while loading": Case(
        moves("A before attempt 1 | B end | A end"), TWO, later=True, same_machine=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_two_attempts_at_once_never_mix(stage: Stage, whole: Whole, name: str) -> None:
    tally = Tally()
    stage.judge(CASES[name], whole, tally)
    assert not tally.problems, "\n".join(tally.problems)
