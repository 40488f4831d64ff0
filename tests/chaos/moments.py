"""When to strike: moments in the life of a trainer, seen from outside.

A moment looks at what the trainer asked of the store (the proxy's log, or new files of a folder)
and at the clock. The steps at which kills are due are spread over the run, so that a trainer gets
far enough to have something to lose.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.objects import COMPLETE
from tests.services.proxied import Entry

FORCED_AFTER_S = 12.0
"""A moment that has not come this long after it was due is forced: some may never come."""
DUE_EVERY_STEPS = 20
"""How many more steps must be safe in the root before the next kill is due."""


def _at(event: str, method: str, pattern: str) -> Callable[[Entry], bool]:
    wanted = re.compile(pattern)
    return lambda e: e.event == event and e.method == method and bool(wanted.search(f"/{e.key}"))


@dataclass(frozen=True)
class Moment:
    """``seen`` starts a delay of up to ``longest_delay_s``; None: the delay starts at once.

    ``early`` moments lie before the trainer's own first checkpoint, so they do not wait for their
    turn of steps. ``reads`` marks those that only a proxy can see.
    """

    name: str
    seen: Callable[[Entry], bool] | None
    longest_delay_s: float
    early: bool = False
    reads: bool = False


_DATA = r"/checkpoints/[^/]+/(?!COMPLETE$)[^/]+$"
AT_ANY_TIME = Moment("at any time", None, 0.6)
STARTING = Moment("while starting", None, 1.5, early=True)
MOMENTS = (
    AT_ANY_TIME,
    STARTING,
    Moment("checkpoint being uploaded", _at("begin", "PUT", _DATA), 0.05),
    Moment("before COMPLETE", _at("begin", "PUT", COMPLETE.pattern), 0.0),
    Moment("after COMPLETE", _at("end", "PUT", COMPLETE.pattern), 0.03),
    Moment("journal being uploaded", _at("begin", "PUT", r"/journal/"), 0.01),
    Moment("resume being downloaded", _at("begin", "GET", _DATA), 0.02, early=True, reads=True),
    Moment(
        "attempt being recorded",
        _at("begin", "PUT", r"/attempts/\d+-[0-9a-f]+\.json$"),
        0.005,
        early=True,
    ),
)
AT_THE_END = (
    Moment("model being published", _at("begin", "PUT", r"/model/model-[^/]*\.safetensors$"), 0.01),
    Moment("model just published", _at("end", "PUT", r"/model/weights\.json$"), 0.0),
    Moment("ending being recorded", _at("begin", "PUT", r"/attempts/.*\.end\.json$"), 0.0),
)


@dataclass(frozen=True)
class Strike:
    """One planned kill. ``due_at_step``: not before so many steps are safe in the root.

    ``signals`` are sent in turn, with ``between_s`` between them.
    """

    moment: Moment
    delay_s: float
    due_at_step: int
    signals: tuple[int, ...]
    between_s: float
    new_machine: bool

    @property
    def how(self) -> str:
        """The signals, for people."""
        return "+".join(signal.Signals(number).name for number in self.signals)


def plan(kills: int, chance: random.Random, *, reads_visible: bool) -> list[Strike]:
    """``kills`` strikes, every moment about equally often.

    The last ones fall on the publication of the model, with -9: a trainer that has just published
    may well answer SIGTERM by finishing.
    """
    final = AT_THE_END[: max(1, min(len(AT_THE_END), kills // 8))] if kills > 2 else ()
    usable = [moment for moment in MOMENTS if reads_visible or not moment.reads]
    spread = kills - len(final)
    moments = (usable * (spread // len(usable) + 1))[:spread]
    chance.shuffle(moments)
    late = next((n for n, moment in enumerate(moments) if not moment.early), 0)
    moments[0], moments[late] = moments[late], moments[0]  # so that there is something to resume
    strikes = []
    every = (*moments, *final)
    for number, moment in enumerate(every):
        # A machine that holds a checkpoint itself may have nothing to download.
        download_next = number + 1 < len(every) and every[number + 1].reads
        hard = moment in final or chance.random() < 0.6
        polite = (signal.SIGTERM,) if chance.random() < 0.6 else (signal.SIGTERM, signal.SIGKILL)
        strikes.append(
            Strike(
                moment,
                chance.uniform(0, moment.longest_delay_s),
                0 if moment in final else DUE_EVERY_STEPS * (number + 1),
                (signal.SIGKILL,) if hard else polite,
                chance.uniform(0, 0.5),
                chance.random() < 0.35 or download_next,
            )
        )
    return strikes


class Aim:
    """Follows one trainer until its strike's moment has come."""

    def __init__(self, strike: Strike, furthest: int) -> None:
        self._strike, self.furthest = strike, furthest
        self._due_since = time.monotonic() if self._due() else None
        self._seen_at: float | None = None
        self.forced = False

    def _due(self) -> bool:
        return self._strike.moment.early or self.furthest >= self._strike.due_at_step

    def look(self, entries: list[Entry]) -> bool:
        """Whether to strike now, given what happened since the last look."""
        now, moment = time.monotonic(), self._strike.moment
        for entry in entries:
            match = COMPLETE.search(f"/{entry.key}")
            if match and entry.method == "PUT" and entry.arrived:
                self.furthest = max(self.furthest, int(match[1]))
            waiting = self._due_since is not None and self._seen_at is None
            if waiting and moment.seen is not None and moment.seen(entry):
                self._seen_at = now
        if self._due_since is None and self._due():
            self._due_since = now
        if self._due_since is None:
            return False
        if moment.seen is None and self._seen_at is None:
            self._seen_at = self._due_since
        if self._seen_at is not None:
            return now >= self._seen_at + self._strike.delay_s
        self.forced = moment not in AT_THE_END and now - self._due_since > FORCED_AFTER_S
        return self.forced
