"""A run that a budget ends: where its end is, decided on rank 0 at log points and followed by all.

    log point -> dollars so far, price, seconds a step -> the steps that the rest pays for
              -> far enough from the plan? then a new one: journal, next checkpoint, learning rate
    any step  -> the line reached (budget minus reserve)? then the run ends here

An attempt that continues takes the checkpoint's plan. Where the attempt before it had got further,
the plans that it recorded on the way hold again at their steps, so that the same steps are computed
with the same learning rates; from there on it decides by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tessera.errors import DamagedError, InputError
from tessera.experiment import Experiment, LinearDecay, Pretrain
from tessera.ledger.budget import CHECKPOINT_BYTES, Budget, Plan, kept_back, nothing_left
from tessera.ledger.dollars import as_typed
from tessera.ledger.forecast import Forecast
from tessera.ledger.pace import Pace
from tessera.ledger.prices import EXPERIMENT
from tessera.model.shape import parameters
from tessera.runs import Attempt, CheckpointRef, Run, Segment
from tessera.storage import Root
from tessera.tracking.journal import Journal
from tessera.tracking.records import read_journal
from tessera.training.cost import LOCAL, RunningCost
from tessera.training.parallel import World
from tessera.training.pretrain import model_shape
from tessera.training.program import Program
from tessera.training.progress import ProgressLine, dollars

PLANNED, STOPPED = "budget/planned", "budget/stopped"
MEASURED, MEASURED_AGAIN = 2, 5
"""Log intervals of an attempt before it moves a plan: the first ones are slow, and where another
attempt had a plan already there is no hurry. The very first plan is made at once."""


@dataclass(frozen=True)
class Recorded:
    """What an attempt that was cut off had decided beyond the checkpoint, up to step ``upto``."""

    plans: Mapping[int, Plan] = field(default_factory=dict)
    upto: int = 0


@dataclass(frozen=True)
class Facts:
    """What a decision rests on, as rank 0 sees it; ``usd_per_step`` is None before it is known."""

    usd: float
    usd_per_hour: float
    seconds_per_step: float | None
    usd_per_step: float | None


class BudgetKeeper:
    """Keeps one attempt of a budget-sized run within its budget; every rank has one."""

    def __init__(
        self,
        program: Program,
        experiment: Pretrain,
        attempt: Attempt,
        journal: Journal,
        line: ProgressLine,
        world: World,
        cost: RunningCost | None,
        pace: Pace,
        clock: Callable[[], float],
        recorded: Recorded,
        remote: bool,
    ) -> None:
        """``cost`` is rank 0's; ``remote``: uploads leave this machine, so their traffic counts."""
        assert experiment.budget_usd is not None
        assert isinstance(experiment.schedule, LinearDecay)
        self._program, self._experiment, self._attempt = program, experiment, attempt
        self._journal, self._line, self._world = journal, line, world
        self._cost, self._pace, self._clock, self._recorded = cost, pace, clock, recorded
        self._gb_up = attempt.usd_per_gb_up if remote else 0.0
        self._usd, self._schedule = experiment.budget_usd, experiment.schedule
        self._deadline, self._begun_at = float("inf"), 0
        self._idle_usd = 0.0  # known when it begins
        self._seen: Facts | None = None
        self.stopped = ""

    @property
    def every(self) -> dict[str, int]:
        """Steps between two evaluations and between two saves."""
        return every_steps(self._program)

    def begin(self, done: int) -> None:
        """Before the first step: a run that has spent its money ends at once."""
        self._begun_at = done
        self._idle_usd = self._world.run_on_main(lambda: self._cost.idle_usd if self._cost else 0.0)
        if done >= self._program.steps:  # stopped and saved before, and died before it could say so
            self.stopped = "an earlier attempt had spent it and saved, and this one publishes"
            return
        self._look(done, self._world.run_on_main(self._facts))

    def log_point(self, done: int) -> None:
        """Follow the plan that was recorded for here, or make one; journal what changes."""
        facts = self._world.run_on_main(self._facts)
        self._look(done, facts)
        if done >= self._program.steps:
            return
        if done <= self._recorded.upto:
            plan = self._recorded.plans.get(done, self._program.plan)
        else:
            plan = self._world.broadcast(self._decide(done, facts) if self._world.is_main else None)
        if plan != self._program.plan:
            self._take(done, plan, facts)

    @property
    def told(self) -> str:
        """At the planned end, whose doing it was; empty where the tokens ended the run."""
        limit, seen = self._experiment.steps, self._seen
        if seen is None or (limit is not None and self._program.steps >= limit):
            return ""
        budget = self._budget(seen.usd_per_hour)
        return (
            f"the budget ended it there, {dollars(seen.usd)} of {as_typed(budget.usd)} spent and "
            f"{dollars(budget.reserve_usd)} kept back for the end"
        )

    def spent(self) -> bool:
        """Whether the line is reached, by the price of the last log point; asked at every step."""
        return self._world.any(self._clock() >= self._deadline)

    def stop(self, done: int) -> None:
        """End the run here."""
        self._stop(done, self._world.run_on_main(self._facts))

    def pays_for_evaluation(self) -> bool:
        """Whether one more evaluation still leaves what the end of the run takes."""

        def pays() -> bool:
            facts = self._facts()
            seconds = self._pace.seconds_of("evaluate")
            if seconds is None:  # never measured: as slow as training on these tokens, three times
                tokens = self._experiment.evaluation.tokens
                share = tokens / self._experiment.batch.tokens_per_step
                seconds = share * (facts.seconds_per_step or 0.0)
            due = seconds * facts.usd_per_hour / 3600 + self._closing_usd(facts.usd_per_hour)
            return facts.usd + due <= self._usd - self._idle_usd

        return self._world.run_on_main(pays)

    def bounded(self, found: Forecast, usd: float, usd_per_hour: float) -> Forecast:
        """A forecast, knowing that the end moves with the money; rank 0's."""
        limit, budget = self._experiment.steps, self._budget(usd_per_hour)
        tokens_end_it = limit is not None and self._program.steps >= limit
        aim = 0.0 if tokens_end_it else budget.aim_usd
        return found.within(max(aim, usd), max(budget.line_usd, usd))

    def seconds_for_saving(self) -> float:
        """How long the last save and its upload may take: half of the reserve."""

        def seconds() -> float:
            facts = self._facts()
            half = self._budget(facts.usd_per_hour).reserve_usd / 2
            return half / facts.usd_per_hour * 3600 if facts.usd_per_hour > 0 else 600.0

        return self._world.run_on_main(seconds)

    # -- rank 0 ----------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        assert self._cost is not None
        usd, price = self._cost.usd(), self._cost.usd_per_hour
        if usd is None or price is None:
            raise InputError(_no_price(self._usd))
        seconds = self._pace.seconds_per_step(self.every)
        if seconds is None:
            return Facts(usd, price, None, None)
        saved = CHECKPOINT_BYTES * self._parameters / 1e9 * self._gb_up
        traffic = saved / self._experiment.checkpoint.every_steps
        return Facts(usd, price, seconds, seconds * price / 3600 + traffic)

    @property
    def _parameters(self) -> int:
        return parameters(model_shape(self._experiment.model))

    def _closing_usd(self, usd_per_hour: float) -> float:
        return self._kept_back(None, usd_per_hour)

    def _kept_back(self, given: float | None, usd_per_hour: float) -> float:
        return kept_back(
            given,
            usd_per_hour,
            rented=self._attempt.provider != LOCAL,
            parameters=self._parameters,
            usd_per_gb_up=self._gb_up,
        )

    def _budget(self, usd_per_hour: float) -> Budget:
        reserve = self._kept_back(self._experiment.budget_reserve_usd, usd_per_hour)
        return Budget(self._usd, reserve, self._idle_usd)

    def _decide(self, done: int, facts: Facts) -> Plan:
        now = self._program.plan
        needed = MEASURED_AGAIN if self._begun_at else MEASURED
        if facts.usd_per_step is None or (now.known and self._pace.seen < needed):
            return now
        budget = self._budget(facts.usd_per_hour)
        last = (self._pace.seconds_of("evaluate") or 0.0) * facts.usd_per_hour / 3600
        end = done + budget.steps_left(facts.usd + last, facts.usd_per_step)
        end = min(max(end, done + 1), self._experiment.steps or end)
        warmup, fraction = self._schedule.warmup_steps, self._schedule.decay_fraction
        plan = now.moved(done, end, warmup, fraction)
        return plan if now.differs(plan, done) else now

    # -- every rank ------------------------------------------------------------------------------

    def _look(self, done: int, facts: Facts) -> None:
        """Stop if the line is reached; else note when it will be."""
        self._seen = facts
        left = self._budget(facts.usd_per_hour).line_usd - facts.usd
        if left <= 0 and done < self._program.steps:
            self._stop(done, facts)
        elif facts.usd_per_hour > 0:
            self._deadline = self._clock() + left / facts.usd_per_hour * 3600

    def _stop(self, done: int, facts: Facts) -> None:
        budget = self._budget(facts.usd_per_hour)
        self.stopped = (
            f"{dollars(facts.usd)} of the budget of {as_typed(budget.usd)} are spent and "
            f"{dollars(budget.reserve_usd)} are kept back for the end"
        )
        if budget.idle_usd > 0:
            idle = dollars(budget.idle_usd)
            self.stopped += f", {idle} for earlier machines until they were down"
        self._journal.event(
            STOPPED, done, usd_so_far=facts.usd, budget_usd=budget.usd,
            reserve_usd=budget.reserve_usd, idle_usd=budget.idle_usd,
            planned_end=self._program.steps,
        )  # fmt: skip
        self._line.say(f"{self.stopped}: stopping at step {done}")
        now = self._program.plan
        plan = replace(now, end_step=done, decay_start=min(now.decay_start, done))
        self._take(done, plan, facts)

    def _take(self, done: int, plan: Plan, facts: Facts) -> None:
        before, self._program.plan = self._program.plan, plan
        if done == plan.end_step and not self.stopped:
            self.stopped = "the attempt before had reached the end of the budget here"
        self._journal.event(
            PLANNED, done, end_step=plan.end_step, decay_start=plan.decay_start, level=plan.level,
            usd_so_far=facts.usd, usd_per_hour=facts.usd_per_hour,
            seconds_per_step=facts.seconds_per_step,
            reserve_usd=self._budget(facts.usd_per_hour).reserve_usd, idle_usd=self._idle_usd,
            followed=done <= self._recorded.upto,
        )  # fmt: skip
        if not self.stopped:
            budget = self._budget(facts.usd_per_hour)
            self._line.say(_sentence(done, before, plan, facts, budget))


def _sentence(done: int, before: Plan, plan: Plan, facts: Facts, budget: Budget) -> str:
    seconds = facts.seconds_per_step or 0.0
    steps = f"{plan.end_step}" + (f" (not {before.end_step})" if before.known else "")
    falls = "falls" if before.share(done - 1) < 1.0 else f"falls from step {plan.decay_start} on"
    return (
        f"step {done}: {as_typed(budget.usd)} pay for {steps} steps of {seconds:.3g} s at "
        f"{as_typed(facts.usd_per_hour)}/h, the learning rate {falls}; "
        f"{dollars(budget.reserve_usd)} are kept back"
    )


def every_steps(program: Program) -> dict[str, int]:
    """How many steps lie between two evaluations and between two saves."""
    checkpoint = program.experiment.checkpoint
    saved = checkpoint.every_steps
    if checkpoint.local_every_steps is not None:
        saved = min(saved, checkpoint.local_every_steps)
    return {"evaluate": program.evaluates_every, "checkpoint": saved}


def plan_of(state: Mapping[str, object], ref: CheckpointRef) -> Plan:
    """The plan in a checkpoint of a budget-sized run."""
    try:
        return Plan.of(state)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"The checkpoint {ref.name} holds no plan of a budget.") from error


def recorded_plans(run: Run, ref: CheckpointRef | None) -> Recorded:
    """What attempts that came by ``ref`` (None: the start) had decided beyond it.

    Those are the ones that went on from there, and those that went on from the same lineage before
    and had the very plans on the way that led to ``ref``. Of several the one that got furthest. One
    whose further steps a rollback gave up says nothing: the run takes another way from ``ref`` on.
    """
    if run.record.experiment.get("budget_usd") is None:
        return Recorded()
    step = ref.step if ref else 0
    rollbacks, found, attempts = run.rollbacks(), Recorded(), run.attempts()
    segments = _way_to(ref, attempts)
    told = {segment.attempt: _plans(run, segment.attempt)[0] for segment in segments}
    way = {at: plan for s in segments for at, plan in _between(told[s.attempt], s.after, s.upto)}
    for attempt in attempts:
        since = _leaves_at(attempt, segments)
        if since is None:
            continue
        if any(r.gives_up(CheckpointRef(step + 1, attempt.id)) for r in rollbacks):
            continue
        plans, reached = _plans(run, attempt.id)
        if dict(_between(plans, since, step)) != dict(_between(way, since, step)):
            continue
        if reached > max(step, found.upto):
            found = Recorded({at: plan for at, plan in plans.items() if at > step}, reached)
    return found


def _plans(run: Run, attempt: str) -> tuple[dict[int, Plan], int]:
    """All plans of an attempt by their steps, and the last step that it told of."""
    plans, reached = {}, 0
    for record in read_journal(run, attempt):
        if record.key == "progress/tokens":
            reached = max(reached, record.step)
        if record.key == PLANNED:
            plans[record.step] = Plan.of({"steps": record.value["end_step"], **record.value})
    return plans, reached


def _between(plans: Mapping[int, Plan], after: int, upto: int) -> list[tuple[int, Plan]]:
    return [(step, plan) for step, plan in plans.items() if after < step <= upto]


def _way_to(ref: CheckpointRef | None, attempts: Sequence[Attempt]) -> list[Segment]:
    """The attempts that led to ``ref``, latest first."""
    known, way = {attempt.id: attempt for attempt in attempts}, list[Segment]()
    while ref is not None:
        attempt = known.get(ref.attempt)
        before = attempt.resumed_from if attempt else None
        way.append(Segment(ref.attempt, before.step if before else 0, ref.step))
        ref = before
    return way


def _leaves_at(attempt: Attempt, way: Sequence[Segment]) -> int | None:
    """The step of ``way`` at which ``attempt`` went on from it; None: it is elsewhere."""
    ref = attempt.resumed_from
    if ref is None:
        return 0
    on_way = any(s.attempt == ref.attempt and s.after < ref.step <= s.upto for s in way)
    return ref.step if on_way else None


def require_payable(experiment: Experiment, place: Attempt, root: Root) -> None:
    """Raise ``InputError`` where a budget cannot work: no price, a price of nothing, too little."""
    if not isinstance(experiment, Pretrain) or experiment.budget_usd is None:
        return
    budget, price = experiment.budget_usd, place.usd_per_hour
    if price is None:
        raise InputError(_no_price(budget))
    if place.price_source == EXPERIMENT and place.provider != LOCAL:
        raise InputError(
            f"A budget of {as_typed(budget)} cannot rest on the experiment's guess of "
            f"{as_typed(price)} an hour on a machine rented from {place.provider}; set "
            "TESSERA_USD_PER_HOUR to its price, or use a provider that tells it."
        )
    if price == 0 and experiment.tokens is None:
        raise InputError(
            f"At $0 an hour ({place.price_source}) a budget of {as_typed(budget)} never ends; give "
            "the price of this machine in TESSERA_USD_PER_HOUR, or tokens."
        )
    reserve = kept_back(
        experiment.budget_reserve_usd,
        price,
        rented=place.provider != LOCAL,
        parameters=parameters(model_shape(experiment.model)),
        usd_per_gb_up=0.0 if root.is_local else place.usd_per_gb_up,
    )
    found = Budget(budget, reserve)
    if found.eaten_up:
        raise InputError(nothing_left(found, price))


def _no_price(budget: float) -> str:
    return (
        f"A budget of {as_typed(budget)} needs to know what an hour costs, and nobody told "
        "the price of this machine; set TESSERA_USD_PER_HOUR to it."
    )
