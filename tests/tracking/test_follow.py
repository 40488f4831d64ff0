from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tessera.errors import InputError, StoreError
from tessera.tracking.follow import follow


def passes(*answers: int | Exception) -> Callable[[], int]:
    """Gives or raises one after the other."""
    left = list(answers)

    def once() -> int:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return once


def test_an_outage_is_said_once_and_survived() -> None:
    said: list[str] = []
    gone = [StoreError("The server is away."), StoreError("The server is away.")]
    once = passes(1, *gone, StoreError("It refuses."), 2, 3)
    assert follow(once, every_s=0.01, is_last=lambda n: n == 3, say=said.append)
    assert said == ["Paused: The server is away.", "Paused: It refuses.", "It goes on."]


def test_what_no_other_moment_mends_is_raised() -> None:
    with pytest.raises(InputError):
        follow(passes(1, InputError("The experiment was deleted.")), every_s=0.01)


def test_the_pass_after_the_end_is_the_last() -> None:
    over = threading.Event()
    count = 0

    def once() -> int:
        nonlocal count
        count += 1
        if count == 2:
            over.set()
        return count

    assert follow(once, every_s=60.0 if over.is_set() else 0.01, over=over)
    assert count == 3
    assert not follow(passes(StoreError("Away.")), over=over, say=lambda _: None)


def test_an_answer_is_told_when_it_is_worth_it() -> None:
    said: list[str] = []
    tell = lambda n: f"{n} new" if n else None  # noqa: E731
    follow(passes(2, 0, 1), every_s=0.01, is_last=lambda n: n == 1, tell=tell, say=said.append)
    assert said == ["2 new", "1 new"]
