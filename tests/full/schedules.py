"""Which interleavings there are, and which of them are tried."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence

from tests.full.interleaving import END, KILL, Case, Hold, Move, Variant

TWO, ONE, POISONED = Variant(keep=2), Variant(keep=1), Variant(keep=2, poisoned=(3,))
SWAPPED = (("A", "d"), ("B", "b"), ("C", "c"))
_STOPS = frozenset({"attempt", "COMPLETE", "rollback", "model", "ending"})


def holds(points: Iterable[tuple[str, str]]) -> list[Hold]:
    """Every place where an attempt with these points can be held."""
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for kind, phase in points:
        counts[kind, phase] += 1
        found.append(Hold(kind, counts[kind, phase], phase))
    return found


def orders(first: Hold, stops: Sequence[Hold]) -> list[tuple[Move, ...]]:
    """What may happen while A is held there."""
    held, on, dead = Move("A", first), Move("A", END), Move("A", KILL)
    found: list[tuple[Move, ...]] = [(held, Move("B", END), on), (held, Move("B", END), dead)]
    for stop in stops:
        other, end = Move("B", stop), Move("B", END)
        found += [
            (held, other, on, end),
            (held, other, dead, end),
            (held, other, Move("B", KILL), on),
            (held, other, Move("C", END), on, end),
        ]
    return found


def every_case(
    variant: Variant, points: Sequence[tuple[str, str]], *, later: bool = False
) -> list[Case]:
    """Every hold of A x every order x machines x tokens."""
    places = holds(points)
    stops = [hold for hold in places if hold.kind in _STOPS]
    return [
        Case(moves, variant, later, same, tokens)
        for place in places
        for moves in orders(place, stops)
        for same, tokens in itertools.product((False, True), (Case(()).tokens, SWAPPED))
    ]


def moves(text: str) -> tuple[Move, ...]:
    """Reads "A before COMPLETE 2 | B end | A kill"."""
    found = []
    for part in text.split(" | "):
        who, *rest = part.split()
        until = rest[0] if len(rest) == 1 else Hold(rest[1], int(rest[2]), rest[0])
        found.append(Move(who, until))
    return tuple(found)


FIRST = (
    # B has tidied up what A had not completed yet; A is no further than B, and then further.
    "A before COMPLETE 1 | B before file 3 | A end | B end",
    (
        "A after attempt 1 | B before attempt 1 | A before COMPLETE 2 | B before file 3 | B kill"
        " | A end"
    ),
    # A has looked for a later attempt, and now there is one.
    "A after journal 1 | B before COMPLETE 1 | A end | B end",
    # While one lists checkpoints the other completes one.
    (
        "A after attempt 1 | B before attempt 1 | A before COMPLETE 2 | B after listing 2"
        " | A after COMPLETE 2 | B end | A end"
    ),
    "A after listing 2 | B after COMPLETE 1 | A end | B end",
    "A after listing 3 | B after COMPLETE 2 | A end | B end",
    # The model is published by both, and the ending.
    "A before model 2 | B end | A end",
    "A after model 1 | B end | A kill",
    "A before ending 1 | B end | A end",
)
TIES = (
    # Both take the same number; both create the run; both finish it.
    "A before attempt 1 | B before attempt 1 | A after COMPLETE 1 | B end | A end",
    "A before run 1 | B before run 1 | B after run 1 | A after COMPLETE 1 | B end | A end",
    "A before ending 1 | B before ending 1 | A end | B end",
)
LATER = (
    # What B wants to continue from is dropped, before and while it is read.
    "B before look 1 | A before model 1 | B end | A end",
    "B before download 1 | A end | B end",
    "B after download 1 | A before model 1 | B end | A end",
)
GOING_BACK = (
    # One decides to go back while the other lives, has taken the next number, or takes it now.
    "A before rollback 1 | B end | A end",
    "A before rollback 1 | B after COMPLETE 1 | A end | B end",
    "A after rollback 1 | B end | A end",
    "A after rollback 1 | B after attempt 1 | A after attempt 2 | B end | A end",
    "A before attempt 2 | B before attempt 1 | A end | B end",
    "A before attempt 2 | B before attempt 1 | B end | A end",
    "A after COMPLETE 1 | B before attempt 1 | A after COMPLETE 2 | B end | A end",
    "A after rollback 1 | A kill | B end",
)
ONE_MACHINE = (
    "A before attempt 1 | B end | A end",
    "A before attempt 1 | B before attempt 1 | A after COMPLETE 1 | B end | A end",
    "A before file 2 | B after COMPLETE 1 | A end | B end",
)
NUDGED = (
    # A's weights differ in their last bits, as on a GPU.
    "A before model 1 | B end | A end",
    "A before model 1 | B end | A after model 1 | A kill",
)


def chosen() -> list[Case]:
    """Those that are tried whatever the sample."""
    straight = Case(()).tokens
    return [
        *(Case(moves(text), variant) for text in FIRST for variant in (ONE, TWO)),
        *(Case(moves(text), TWO, tokens=them) for text in TIES for them in (straight, SWAPPED)),
        *(Case(moves(text), ONE, later=True) for text in LATER),
        *(Case(moves(text), POISONED) for text in GOING_BACK),
        *(Case(moves(text), TWO, later=True, same_machine=True) for text in ONE_MACHINE),
        *(Case(moves(text), ONE, later=True, same_machine=True) for text in LATER),
    ]


def sampled(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """``count`` of them, the same ones for the same seed."""
    return random.Random(seed).sample(cases, min(count, len(cases)))
