"""Runs that a budget ends, in simulated time and money: $0.01 a step unless a test says more."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tessera.cli.common import run_command
from tessera.cli.main import tessera
from tessera.evaluation.weights import load_base
from tessera.ledger.budget import Plan
from tessera.runs import Attempt, CheckpointRef, Rollback, list_runs
from tessera.tracking.journal import Journal
from tessera.tracking.queries import summarise_run
from tessera.tracking.records import read_journal
from tessera.training import session
from tessera.training.budget import PLANNED, STOPPED, Recorded, recorded_plans
from tessera.training.pretrain import PretrainProgram
from tests.training.conftest import METRICS, as_options
from tests.training.disturb import CALM, Disturbance, at
from tests.training.simulated import Simulation

if TYPE_CHECKING:
    from tessera.runs import Run
    from tests.training.conftest import Bench

FINAL = 1e-4
DECAY = "schedule={name: linear_decay, warmup_steps: 3, final_lr: 0.0001, decay_fraction: 0.4}"
SIZED = (DECAY, "tokens=null", "log_every_steps=1", "optimizer.lr=0.005")
MONEY = ("budget_usd=0.705", "budget_reserve_usd=0.1", "checkpoint.every_steps=20")
LINE, AIM = 0.605, 0.595
CAP = 59  # steps of a cent that the aim pays for
ENDED = (
    f"Finished all {CAP} steps; the budget ended it there, $0.5900 of $0.705 spent and $0.1000 "
    "kept back for the end."
)


def train(bench: Bench, simulation: Simulation, *overrides: str, **options: Any) -> session.Result:
    with simulation.here() as instruments:
        return bench.train(*SIZED, *MONEY, *overrides, instruments=instruments, **options)


def crash(bench: Bench, simulation: Simulation, step: int, *overrides: str) -> None:
    """Until the plug is pulled before ``step``."""

    def pull(_: Any) -> None:
        raise RuntimeError("the plug")

    with simulation.here() as instruments, pytest.MonkeyPatch.context() as patch:
        bench.before_step(step, pull, patch)
        with pytest.raises(RuntimeError, match="the plug"):
            bench.train(*SIZED, *MONEY, *overrides, instruments=instruments)


def plans(bench: Bench, run: Run) -> dict[int, dict[str, Any]]:
    """The plans of the surviving lineage by step."""
    return {r.step: r.value for r in bench.records(run) if r.key == PLANNED}


def assert_decays_to_the_end(bench: Bench, run: Run) -> None:
    rates = bench.points(run, "train/lr")
    last = max(rates)
    assert list(rates) == list(range(1, last + 1))
    assert rates[last] == pytest.approx(FINAL)
    after = [rates[step] for step in range(3, last + 1)]
    falls = [before - now for before, now in pairwise(after)]
    assert min(falls) >= -1e-12
    assert max(falls) < 0.005 / 4, "no jump"


# -- where the end is ------------------------------------------------------------------------------


def test_the_decay_ends_where_the_money_does(bench: Bench) -> None:
    simulation = Simulation()
    result = train(bench, simulation)
    run = result.run
    assert (result.exit_code, result.text) == (0, ENDED)
    assert bench.last_ending(run).outcome == "FINISHED"
    assert simulation.usd == pytest.approx(0.59)
    assert_decays_to_the_end(bench, run)
    assert load_base(run, torch.device("cpu")).digest == bench.digest(run)
    assert max(bench.points(run, "eval/loss")) == CAP
    (first,) = plans(bench, run).values()
    assert first | {"reserve_usd": 0.1} == {
        "end_step": CAP, "decay_start": 35, "level": 1.0, "usd_so_far": 0.01, "usd_per_hour": 1.0,
        "seconds_per_step": pytest.approx(36.0), "reserve_usd": 0.1, "idle_usd": 0.0,
        "followed": False,
    }  # fmt: skip


def test_a_plan_that_moves_is_told(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    """The first one too, where tokens had given the run an end that the budget does not pay for."""
    simulation = Simulation(prices=((1, 1.0), (20, 2.0)))
    with simulation.here() as instruments:
        settings = (*SIZED, *MONEY, f"tokens={400 * 256}")
        session.train(bench.settings(*settings), bench.root, bench.place(), instruments=instruments)
    said = [line for line in capfd.readouterr().err.splitlines() if " pay for " in line]
    assert "$0.705 pay for 59 (not 400) steps of 36 s at $1/h, the learning rate falls" in said[0]
    assert "$0.1000 are kept back" in said[0]
    assert len(said) > 1
    assert "(not 59)" in said[1]


def test_a_dearer_hour_brings_the_end_nearer(bench: Bench) -> None:
    simulation = Simulation(prices=((1, 1.0), (20, 2.0)))
    run = train(bench, simulation).run
    assert bench.last_ending(run).step == pytest.approx(39, abs=1)
    assert AIM - 0.03 < simulation.usd < LINE
    assert_decays_to_the_end(bench, run)
    assert len(plans(bench, run)) > 1


@pytest.mark.parametrize("turn", [15, 48])
def test_slower_steps_bring_the_end_nearer(bench: Bench, turn: int) -> None:
    simulation = Simulation(seconds=((1, 36.0), (turn, 72.0)))
    run = train(bench, simulation).run
    assert bench.last_ending(run).step < CAP
    assert AIM - 0.04 < simulation.usd < LINE + 0.02
    rates = bench.points(run, "train/lr")
    assert all(now <= before for before, now in pairwise(list(rates.values())[3:]))


def test_a_cheaper_hour_makes_the_run_longer_while_it_decays(bench: Bench) -> None:
    simulation = Simulation(prices=((1, 1.0), (45, 0.5)))
    run = train(bench, simulation).run
    assert bench.last_ending(run).step > CAP + 10
    assert simulation.usd == pytest.approx(AIM, abs=0.01)
    assert_decays_to_the_end(bench, run)


def test_tokens_end_it_where_they_are_fewer(bench: Bench) -> None:
    simulation = Simulation()
    result = train(bench, simulation, f"tokens={40 * 256}")
    assert result.text == "Finished all 40 steps."
    assert simulation.usd == pytest.approx(0.4)
    assert_decays_to_the_end(bench, result.run)


def test_the_money_ends_it_where_that_is_less_than_the_tokens(bench: Bench) -> None:
    result = train(bench, Simulation(), f"tokens={400 * 256}")
    assert result.text == ENDED
    assert_decays_to_the_end(bench, result.run)


def test_the_budgets_evaluations_are_paid_for(bench: Bench) -> None:
    """An evaluation of ten steps' price every ten steps: half of the money is theirs."""
    simulation = Simulation()
    evaluate = PretrainProgram.evaluate

    def slow(program: PretrainProgram, done: int, score: Any) -> dict[str, float]:
        simulation.now += 360.0
        simulation.usd += 0.1
        return evaluate(program, done, score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainProgram, "evaluate", slow)
        run = train(bench, simulation).run
    assert simulation.usd < LINE
    assert bench.last_ending(run).outcome == "FINISHED"
    assert bench.last_ending(run).step in range(22, 36)


# -- the hard stop ---------------------------------------------------------------------------------


def test_a_step_that_eats_the_rest_ends_the_run(bench: Bench) -> None:
    simulation = Simulation(seconds=((1, 36.0), (30, 36.0 * 33), (31, 36.0)))
    result = train(bench, simulation)
    run, ending = result.run, bench.last_ending(result.run)
    assert (result.exit_code, ending.outcome, ending.step) == (0, "BUDGET", 30)
    assert result.text == (
        "Ended by the budget at step 30: $0.6200 of the budget of $0.705 are spent and $0.1000 "
        "are kept back for the end."
    )
    (stopped,) = bench.events(run, STOPPED)
    assert stopped.value["usd_so_far"] == pytest.approx(0.62)
    assert load_base(run, torch.device("cpu")).digest == bench.digest(run)
    assert 30 in bench.checkpoints(run)
    assert max(bench.points(run, "eval/loss")) == 30
    assert "already finished (30 steps)" in train(bench, simulation).text
    row = summarise_run(bench.root, run)
    assert (row.status, row.step, row.total_steps) == ("budget", 30, 30)


def test_the_last_evaluation_is_left_out_if_it_cannot_be_paid_for(bench: Bench) -> None:
    # 16 bytes a parameter and a minute are due at $3,600 an hour: $60 and something.
    simulation = Simulation(prices=((1, 1.0), (30, 3600.0)))
    run = train(bench, simulation).run
    assert bench.last_ending(run).outcome == "BUDGET"
    assert max(bench.points(run, "eval/loss")) < bench.last_ending(run).step
    assert bench.digest(run)


def test_between_two_log_points_the_line_is_watched_too(bench: Bench) -> None:
    simulation = Simulation(seconds=((1, 36.0), (30, 360.0)))
    run = train(bench, simulation, "log_every_steps=25").run
    assert (bench.last_ending(run).outcome, bench.last_ending(run).step) == ("BUDGET", 33)
    assert simulation.usd < 0.7


def test_a_budget_that_is_spent_at_the_next_attempt_ends_the_run_at_once(bench: Bench) -> None:
    simulation = Simulation()
    crash(bench, simulation, 23)
    simulation.usd = 0.65  # the machine stood there for a night
    with simulation.here():
        before = simulation.now
    result = train(bench, simulation)
    run, ending = result.run, bench.last_ending(result.run)
    assert (ending.outcome, ending.exit_code, ending.step) == ("BUDGET", 0, 20)
    assert simulation.now == before, "no step was taken"
    assert "$0.6500 of the budget of $0.705 are spent" in ending.reason
    published = load_base(run, torch.device("cpu"))
    assert published.digest == bench.digest(run)


def test_a_death_between_the_last_save_and_the_model_leaves_it_to_the_next(bench: Bench) -> None:
    simulation = Simulation(seconds=((1, 36.0), (30, 36.0 * 33)))

    def pull(*_: Any) -> None:
        raise RuntimeError("the plug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainProgram, "publish", pull)
        with pytest.raises(RuntimeError, match="the plug"):
            train(bench, simulation)
    run = bench.only_run()
    assert run.finished() is None
    assert 30 in bench.checkpoints(run)
    result = train(bench, simulation)
    assert (result.exit_code, bench.last_ending(run).outcome) == (0, "BUDGET")
    assert bench.last_ending(run).step == 30
    assert load_base(run, torch.device("cpu")).digest == bench.digest(run)


def test_a_budget_that_is_spent_before_the_first_step_leaves_no_model(bench: Bench) -> None:
    result = train(bench, Simulation(usd=0.69))
    assert (result.exit_code, bench.last_ending(result.run).outcome) == (0, "BUDGET")
    assert result.text.endswith("Nothing was trained, so there is no model.")
    assert bench.root.files(result.run.path("model")) == []


@pytest.mark.parametrize("seed", range(4))
def test_simulated_runs_overspend_less_than_the_reserve(bench: Bench, seed: int) -> None:
    """Prices and speeds that jump to anything between a third and three times as much."""
    chance = random.Random(seed)

    def jumps(value: float) -> tuple[tuple[int, float], ...]:
        turns = range(1, 200, 7)
        return tuple((turn, value * chance.uniform(1 / 3, 3)) for turn in turns)

    simulation = Simulation(seconds=jumps(36.0), prices=jumps(1.0))
    run = train(bench, simulation).run
    assert bench.last_ending(run).outcome in ("FINISHED", "BUDGET")
    assert simulation.usd - LINE < 0.1
    assert simulation.usd < 0.7
    assert bench.digest(run)


# -- killed and continued --------------------------------------------------------------------------

DEARER: dict[str, Any] = {"prices": ((1, 1.0), (37, 2.0))}
"""From step 37 on: plans change between the checkpoint at 35 and the kill before step 41."""


def test_a_kill_between_a_plan_and_a_checkpoint_changes_no_loss(bench: Bench) -> None:
    every_5 = "checkpoint.every_steps=5"
    killed = Disturbance(die_before=40, keep_up=True, simulated=DEARER)
    options = as_options(*SIZED, *MONEY, every_5)
    died = bench.start(*options, disturb=killed).end()
    assert died.code == -signal.SIGKILL, died
    run = bench.only_run()
    # The next machine is as cheap as the first one was: by itself it would plan otherwise.
    simulation = Simulation(usd=0.45)
    assert train(bench, simulation, every_5).exit_code == 0
    first, second = run.attempts()
    assert bench.resumed(run) == [None, 35]

    def told(attempt: str, key: str) -> dict[int, Any]:
        records = read_journal(run, attempt)
        return {r.step: r.value for r in records if r.key == key and 35 < r.step < 40}

    assert told(first.id, PLANNED).keys() & {37, 38, 39}, "plans were made before the kill"
    for key in ("train/loss", "train/lr", "train/grad_norm"):
        assert told(second.id, key) == told(first.id, key) != {}, key
    for name in ("end_step", "decay_start", "level"):
        one, two = (
            {step: value[name] for step, value in told(a.id, PLANNED).items()}
            for a in (first, second)
        )
        assert one == two, name
    assert all(v["followed"] for v in told(second.id, PLANNED).values())
    assert simulation.usd < 0.7
    points = {key: bench.points(run, key) for key in METRICS}
    digest, lineage = bench.digest(run), plans(bench, run)

    # An undisturbed run that makes the same plans at the same steps.
    given = {step: Plan.of({"steps": plan["end_step"], **plan}) for step, plan in lineage.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "recorded_plans", lambda *_: Recorded(given, 10**9))
        whole = train(bench, Simulation(seconds=((1, 1.0),)), every_5, new=True).run
    assert whole.id != run.id
    assert {key: bench.points(whole, key) for key in METRICS} == points
    assert bench.digest(whole) == digest


def test_a_continued_run_without_a_new_plan_is_the_undisturbed_one(bench: Bench) -> None:
    whole = train(bench, Simulation()).run
    expected, digest = {key: bench.points(whole, key) for key in METRICS}, bench.digest(whole)
    simulation = Simulation()

    def pull(_: Any) -> None:
        raise RuntimeError("the plug")

    with simulation.here() as instruments, pytest.MonkeyPatch.context() as patch:
        bench.before_step(45, pull, patch)
        with pytest.raises(RuntimeError, match="the plug"):
            bench.train(*SIZED, *MONEY, instruments=instruments, run_id="again")
    simulation.usd = 0.4  # what was lost costs nothing here, so that the plan need not move
    assert train(bench, simulation, run_id="again").exit_code == 0
    again = next(run for run in bench.runs() if run.id == "again")
    assert bench.resumed(again) == [None, 40]
    assert {key: bench.points(again, key) for key in METRICS} == expected
    assert bench.digest(again) == digest


def test_a_rollback_takes_the_checkpoints_plan_and_gives_no_dollar_back(bench: Bench) -> None:
    bad = Disturbance(nan=at(22, 23, 24), keep_up=True)
    simulation = Simulation(prices=((1, 1.0), (22, 3.0)))
    with bad.here():
        result = train(bench, simulation, *CALM)
    run = result.run
    assert bench.resumed(run) == [None, 20]
    first, second = run.attempts()
    assert run.endings()[first.id].outcome == "ROLLED_BACK"
    lost = [e for e in bench.events(run, PLANNED) if e.attempt == first.id and e.step > 20]
    assert lost, "there were plans beyond the checkpoint"
    followed = [e for e in bench.events(run, PLANNED) if e.attempt == second.id]
    assert not any(event.value["followed"] for event in followed)
    # 24 steps were paid for and 4 of them twice.
    assert simulation.usd > 0.21 + 0.09
    assert simulation.usd < 0.7
    assert result.exit_code == 0


def tell(run: Run, attempt: Attempt, upto: int, ends: dict[int, int]) -> None:
    """Publish ``attempt`` as one that came to ``upto`` with these planned ends by their steps."""
    run.publish_attempt(attempt)
    journal = Journal(run, attempt.id)
    for step, end in ends.items():
        journal.event(PLANNED, step, end_step=end, decay_start=30, level=1.0)
    journal.metric("progress/tokens", 1.0, upto)
    journal.close()


def test_plans_of_the_one_that_got_furthest_hold_over_several_deaths(bench: Bench) -> None:
    """1 came to 60; 2 follows it from 35 on, saves at 40 and dies at 45; 3 goes on from there."""
    crash(bench, Simulation(), 5)
    run = bench.only_run()
    (one,) = run.attempts()
    one = replace(one, number=2, token="aa")
    tell(run, one, 60, {10: 100, 37: 90, 50: 80})
    two = replace(one, number=3, token="bb", resumed_from=CheckpointRef(35, one.id))
    tell(run, two, 45, {37: 90})
    at_40 = CheckpointRef(40, two.id)
    found = recorded_plans(run, at_40)
    assert (found.upto, {at: plan.end_step for at, plan in found.plans.items()}) == (60, {50: 80})
    again = replace(two, number=4, token="cc")  # went on from 35 as well, with plans of its own
    tell(run, again, 70, {36: 95, 55: 99})
    beside = replace(two, number=5, token="dd", resumed_from=CheckpointRef(38, again.id))
    tell(run, beside, 75, {})
    assert recorded_plans(run, at_40) == found
    assert recorded_plans(run, CheckpointRef(38, again.id)) == Recorded({}, 75)
    assert recorded_plans(run, CheckpointRef(36, again.id)).upto == 70
    assert recorded_plans(run, CheckpointRef(35, one.id)).upto == 70, "none of them counts more"
    run.publish_rollback(Rollback("6-ee", 40, "bad", (), 1, 0.0))
    assert recorded_plans(run, at_40) == Recorded()


def test_earlier_machines_that_stood_idle_are_allowed_for(bench: Bench) -> None:
    simulation = Simulation(idle_usd=0.2)
    run = train(bench, simulation).run
    assert (bench.last_ending(run).outcome, bench.last_ending(run).step) == ("FINISHED", CAP - 20)
    assert simulation.usd < LINE - 0.2
    (first,) = plans(bench, run).values()
    assert first["idle_usd"] == 0.2
    assert_decays_to_the_end(bench, run)


def test_the_allowance_for_earlier_machines_is_said_where_the_budget_ends_it(bench: Bench) -> None:
    result = train(bench, Simulation(usd=0.5, idle_usd=0.2))
    assert bench.last_ending(result.run).outcome == "BUDGET"
    assert (
        "$0.1000 are kept back for the end, $0.2000 for earlier machines until they were down"
        in result.text
    )


# -- what people see -------------------------------------------------------------------------------


def test_the_runs_own_budget_holds_where_none_is_given(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation()
    crash(bench, simulation, 23)
    run = bench.only_run()
    assert run.record.experiment["budget_usd"] == 0.705
    assert summarise_run(bench.root, run).total_steps == CAP
    with simulation.here() as instruments:
        result = bench.train(*SIZED, instruments=instruments)
    assert result.run.id == run.id
    assert "Finished all" in result.text
    assert simulation.usd < LINE


def command(bench: Bench, *extra: str) -> int:
    return run_command(tessera, bench.arguments(*as_options(*SIZED), "--quiet", *extra))


def test_option_before_variable_before_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given: list[float | None] = []

    def listen(settings: Any, *_: Any, **__: Any) -> None:
        given.append(settings.budget_usd)
        raise KeyboardInterrupt

    monkeypatch.setattr("tessera.training.session.train", listen)
    in_file = ("--set", "budget_usd=3")
    assert command(bench, *in_file) == 130
    monkeypatch.setenv("TESSERA_BUDGET_USD", "2")
    assert command(bench, *in_file) == 130
    assert command(bench, *in_file, "--budget", "1") == 130
    assert given == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "cheap", ""])
def test_a_nonsense_budget_is_refused(
    bench: Bench, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(bench, "--budget", text) == 2
    assert capfd.readouterr().err == (
        f"Error: --budget is {text!r}; expected US dollars above 0, such as 315.\n"
    )
    assert list_runs(bench.root) == []


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            ("--budget", "5", "--set", "schedule={name: cosine, warmup_steps: 1, final_lr: 0}"),
            "--budget 5: budget_usd: a cosine has to know its last step",
        ),
        (("--budget", "5", "--set", "price=null"), "nobody told the price of this machine"),
        (("--budget", "5", "--set", "price.usd_per_hour=0"), "At $0 an hour (experiment) a budget"),
        (("--budget", "0.001"), "Nothing can be trained for a budget of $0.001 at $1 an hour"),
        ((), "gives neither tokens nor budget_usd, and no run of it is there to be continued"),
        (("--budget", "5", "--set", "budget_reserve_usd=6"), "a reserve of $6 leaves nothing"),
    ],
)
def test_a_budget_that_cannot_work_is_one_sentence_and_no_run(
    bench: Bench, extra: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(bench, *extra) == 2
    said = capfd.readouterr().err
    assert says in said
    assert (said.count("\n"), said[:7]) == (1, "Error: ")
    assert list_runs(bench.root) == []


def test_the_experiments_guess_is_no_price_of_a_rented_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """However dear the machine is, the budget would believe $1 an hour."""
    monkeypatch.setenv("RUNPOD_POD_ID", "p1")
    assert command(bench, "--budget", "5") == 2
    assert capfd.readouterr().err == (
        "Error: A budget of $5 cannot rest on the experiment's guess of $1 an hour on a machine "
        "rented from runpod; set TESSERA_USD_PER_HOUR to its price, or use a provider that tells "
        "it.\n"
    )
    assert list_runs(bench.root) == []
    few = ("--set", f"tokens={3 * 256}", "--set", "schedule.warmup_steps=1")
    for name in ("TESSERA_CATALOG_USD_PER_HOUR", "TESSERA_USD_PER_HOUR"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, "2")
            assert command(bench, *few, "--budget", "5", "--new") == 0
    assert command(bench, *few, "--new") == 0, "without a budget the guess will do"


def test_a_fine_tuning_takes_no_budget(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(tessera, bench.arguments("--budget", "5", name="voice")) == 2
    assert "a budget ends a pretraining" in capfd.readouterr().err


@pytest.mark.parametrize(("first", "then"), [(None, "5"), ("5", "6")])
def test_another_budget_is_another_run(
    bench: Bench, first: str | None, then: str, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = ("--set", f"tokens={3 * 256}", "--set", "schedule.warmup_steps=1")
    before = () if first is None else ("--budget", first)
    assert command(bench, *tokens, *before) == 0
    assert command(bench, *tokens, "--budget", then) == 2
    had = "without a budget" if first is None else f"with a budget of ${first}"
    assert f"was started {had}, this attempt says ${then}" in capfd.readouterr().err
    assert command(bench, *tokens, "--budget", then, "--new") == 0
    assert len(bench.runs()) == 2


def test_two_workers_follow_one_plan(bench: Bench) -> None:
    """Real time and money: $3,600 an hour, which two workers spend in seconds."""
    options = as_options(*SIZED, "price.usd_per_hour=3600", "budget_reserve_usd=60")
    done = subprocess.run(
        [sys.executable, "-m", "tessera", *bench.arguments(*options), "--gpus", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TESSERA_BUDGET_USD": "100"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = bench.only_run()
    ending = bench.last_ending(run)
    assert ending.outcome in ("FINISHED", "BUDGET")
    assert run.record.experiment["budget_usd"] == 100.0
    if ending.outcome == "FINISHED":
        assert list(bench.points(run, "train/lr").values())[-1] == pytest.approx(FINAL)
    row = summarise_run(bench.root, run)
    assert row.cost_usd is not None
    assert row.cost_usd < 100
    assert json.dumps(row.total_steps) == str(ending.step)
