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
    found = [(held, Move("B", END), on), (held, Move("B", END), dead)]
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


def _moves(*texts: str) -> tuple[Move, ...]:
    """"A before COMPLETE 2" and the like."""
    found = []
    for text in texts:
        who, *rest = text.split()
        until = rest[0] if len(rest) == 1 else Hold(rest[1], int(rest[2]), rest[0])
        found.append(Move(who, until))
    return tuple(found)


def chosen() -> list[Case]:
    """Those that are tried whatever the sample: each has a reason."""
    beyond = _moves(
        "A before COMPLETE 2", "B after latest 1", "B kill", "A end",
    )  # A stands beyond B, which tidies up what A has not completed yet
    tidied = _moves("A before COMPLETE 1", "B after latest 1", "A end", "B end")
    same_number = _moves("A before attempt 1", "B before attempt 1", "A after COMPLETE 1", "B end",
                         "A end")  # fmt: skip
    created = _moves("A before run 1", "B before run 1", "B after run 1", "A after COMPLETE 1",
                     "B end", "A end")  # fmt: skip
    model = _moves("A before model 2", "B end", "A end")
    half_model = _moves("A after model 1", "B end", "A kill")
    both_end = _moves("A before ending 1", "B before ending 1", "A end", "B end")
    both_end_late = _moves("A before ending 1", "B end", "A end")
    dropped = _moves("B before download 1", "A end", "B end")
    dropped_half = _moves("B after download 1", "A before model 1", "B end", "A end")
    dropped_look = _moves("B before look 1", "A before model 1", "B end", "A end")
    guarded = _moves("A after journal 1", "B before COMPLETE 1", "A end", "B end")
    both_orders = [
        (moves, tokens)
        for moves in (same_number, created, both_end)
        for tokens in (Case(()).tokens, SWAPPED)
    ]
    return [
        *(Case(beyond, variant) for variant in (ONE, TWO)),
        *(Case(tidied, variant) for variant in (ONE, TWO)),
        *(Case(moves, TWO, tokens=tokens) for moves, tokens in both_orders),
        Case(same_number, TWO, later=True),
        Case(same_number, TWO, later=True, same_machine=True),
        *(Case(moves, TWO) for moves in (model, half_model, both_end_late, guarded)),
        *(Case(m, ONE, later=True) for m in (dropped, dropped_half, dropped_look)),
        *(Case(m, ONE, later=True, same_machine=True) for m in (dropped, dropped_half)),
        Case(_moves("A before attempt 1", "B end", "A end"), TWO, later=True, same_machine=True),
        *gone_back(),
    ]


def gone_back() -> list[Case]:
    """One of them goes back while the other is alive."""
    texts = (
        ("A before rollback 1", "B end", "A end"),
        ("A before rollback 1", "B after COMPLETE 1", "A end", "B end"),
        ("A after rollback 1", "B end", "A end"),
        ("A after rollback 1", "B after attempt 1", "A after attempt 2", "B end", "A end"),
        ("A before attempt 2", "B before attempt 1", "A end", "B end"),
        ("A before attempt 2", "B before attempt 1", "B end", "A end"),
        ("A after COMPLETE 1", "B before attempt 1", "A after COMPLETE 2", "B end", "A end"),
        ("A after rollback 1", "A kill", "B end"),
        ("A after COMPLETE 2", "B before COMPLETE 1", "A end", "B end"),
    )
    return [Case(_moves(*text), POISONED) for text in texts]


def sampled(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """``count`` of them, the same ones for the same seed."""
    return random.Random(seed).sample(cases, min(count, len(cases)))
