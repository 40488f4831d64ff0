"""One run of the tiny experiment under fire: start, strike, start again, until it is finished."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.chaos.machines import Life, Machine
from tests.chaos.moments import Aim, Strike
from tests.chaos.objects import RunFiles
from tests.services.proxied import Entry
from tests.services.trainers import Finished, Forker, Running

LOOK_EVERY_S = 0.003
STUCK_AFTER_S = 120.0
GAVE_UP = 75
_TRIES = 5


class Watch(Protocol):
    """What happened at the store since the last look."""

    def fresh(self) -> list[Entry]:
        """The entries."""


class ChaosError(Exception):
    """Something that must not happen, in a sentence."""


@dataclass(frozen=True)
class Kill:
    """One kill that was done. ``step``: how far the root's checkpoints were."""

    number: int
    moment: str
    how: str
    exit_code: int
    step: int
    machine: int
    after_s: float


@dataclass
class Course:
    """What came of a run under fire."""

    machines: list[Machine]
    kills: list[Kill] = field(default_factory=list)
    gave_up: int = 0
    faults_of_promise: list[str] = field(default_factory=list)
    furthest: int = 0


@dataclass
class Driver:
    """Everything that one run under fire needs. ``environment`` leads to its root."""

    forker: Forker
    arguments: list[str]
    environment: dict[str, str]
    files: RunFiles
    watch: Watch
    folder: Path
    course: Course
    report: Callable[[Kill], None]

    def run(self, strikes: list[Strike]) -> None:
        """Carry out the strikes one after the other, then let the run finish."""
        course, tries = self.course, 0
        for number, strike in enumerate(strikes, 1):
            done = False
            while not done:
                done, finished = self._strike(number, strike)
                if finished:
                    return
                tries = 0 if done else tries + 1
                if tries > _TRIES:
                    raise ChaosError(f"it gave up {tries} times in a row with exit code {GAVE_UP}")
            if strike.new_machine:
                course.machines.append(Machine.rent(len(course.machines) + 1, self.folder))
        for _ in range(_TRIES):
            end = self._live(lambda process: process.wait(STUCK_AFTER_S))
            if end.code == 0:
                return
            self._require_giving_up(end)
        raise ChaosError(f"it gave up {_TRIES} times in a row with exit code {GAVE_UP}")

    def _strike(self, number: int, strike: Strike) -> tuple[bool, bool]:
        """Start a trainer and strike; whether that came to pass, and whether the run is done."""
        course = self.course
        aim = Aim(strike, course.furthest)
        sent: list[int] = []

        def pursue(process: Running) -> Finished:
            deadline = time.monotonic() + STUCK_AFTER_S
            while not process.ended() and not aim.look(self.watch.fresh()):
                if time.monotonic() > deadline:
                    raise ChaosError(f"no progress for {STUCK_AFTER_S:.0f} s: {process.said()}")
                time.sleep(LOOK_EVERY_S)
            if process.ended():
                return process.wait()
            for place, signal_number in enumerate(strike.signals):
                if place:
                    time.sleep(strike.between_s)
                if not process.ended():
                    process.kill(signal_number)
                    sent.append(signal_number)
            return process.wait(STUCK_AFTER_S)

        end = self._live(pursue)
        # SIGTERM may come before the trainer listens for it; later it saves and answers with 75.
        struck = bool(sent) and end.code in (-signal.SIGKILL, -signal.SIGTERM, GAVE_UP)
        if struck:
            name = strike.moment.name + (" (forced)" if aim.forced else "")
            machine = course.machines[-1].number
            after_s = end.ended_at - end.started_at
            kill = Kill(number, name, strike.how, end.code, course.furthest, machine, after_s)
            course.kills.append(kill)
            self.report(kill)
        elif end.code != 0:
            self._require_giving_up(end)
        return struck, end.code == 0

    def _require_giving_up(self, end: Finished) -> None:
        """A store that is bad enough may end a trainer with 75; nothing else may."""
        if end.code != GAVE_UP:
            raise ChaosError(f"exit code {end.code} out of the blue: {(end.out + end.err)[-3000:]}")
        self.course.gave_up += 1

    def _live(self, follow: Callable[[Running], Finished]) -> Finished:
        """One process from its start to its end, and what it did to the root's checkpoints."""
        course, machine = self.course, self.course.machines[-1]
        before, known = self._furthest(), set(self.files.attempt_names())
        self.watch.fresh()
        environment = self.environment | machine.environment()
        process = self.forker.start(self.arguments, environment, self.folder / "output")
        end = follow(process)
        with (self.folder / "trainers.log").open("a", encoding="utf-8") as log:
            log.write(f"== machine {machine.number}, exit code {end.code}\n{end.out}{end.err}\n")
        fresh = [name for name in self.files.attempt_names() if name not in known]
        if len(fresh) > 1:
            raise ChaosError(f"one process recorded the attempts {', '.join(fresh)}")
        for name in fresh:
            try:
                resumed = (self.files.attempt(name)["resumed_from"] or {"step": 0})["step"]
            except ValueError as error:
                raise ChaosError(f"the record of attempt {name} is damaged: {error}") from error
            if resumed < before:
                course.faults_of_promise.append(
                    f"attempt {name} resumed at step {resumed}, {before} was complete"
                )
        machine.lives.append(Life(end.started_at, end.ended_at, next(iter(fresh), None)))
        after = self._furthest()
        if after < before:
            course.faults_of_promise.append(f"the checkpoint of step {before} went, {after} left")
        course.furthest = after
        return end

    def _furthest(self) -> int:
        return max(self.files.complete(), default=0)
