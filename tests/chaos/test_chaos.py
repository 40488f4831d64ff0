"""A short chaos run in the core lane, and the parts of the driver that must not be wrong."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.driver import Kill
from tests.chaos.machines import HEARTBEAT_S, PROVISION_S, UPLOAD_S, Life, Machine, compare
from tests.chaos.moments import AT_THE_END, MOMENTS, Aim, Moment, Strike, plan
from tests.chaos.objects import FolderObjects, FolderWatch, RunFiles
from tests.chaos.report import as_json
from tests.chaos.run import Setting, prepare, run_store
from tests.chaos.verdict import points, repeated
from tests.services.faults import MODERATE
from tests.services.proxied import Entry
from tests.services.trainers import Forker


def test_killed_on_a_faulty_store_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    faults = replace(MODERATE, stall_s=0.5)
    setting = Setting(kills=3, seed=20261122, faults=faults, margin_steps=60)
    seen: list[Kill] = []
    with Forker() as forker:
        bench = prepare(forker, tmp_path, setting)
        outcome = run_store(
            "moto", forker, bench, tmp_path / "moto", setting, lambda _, kill, __: seen.append(kill)
        )
    assert outcome.stopped is None
    assert [check for check in outcome.checks if not check.holds] == []
    assert outcome.kills == seen
    assert outcome.good, outcome
    assert '"good": true' in as_json([outcome], setting)


# -- the plan --------------------------------------------------------------------------------------


def test_a_plan_is_the_seeds_and_holds_every_moment() -> None:
    strikes = plan(40, random.Random(1), reads_visible=True)
    assert strikes == plan(40, random.Random(1), reads_visible=True)
    assert strikes != plan(40, random.Random(2), reads_visible=True)
    assert len(strikes) == 40
    counts = Counter(strike.moment for strike in strikes)
    assert set(counts) == {*MOMENTS, *AT_THE_END}
    assert min(counts[moment] for moment in MOMENTS) >= 4
    assert not strikes[0].moment.early, "there must be something to resume from"
    hows = Counter(strike.how for strike in strikes)
    assert hows.keys() == {"SIGKILL", "SIGTERM", "SIGTERM+SIGKILL"}
    due = [strike.due_at_step for strike in strikes[:-3]]
    assert due == sorted(due)
    assert 5 <= sum(strike.new_machine for strike in strikes) <= 35
    for before, strike in itertools.pairwise(strikes):
        assert before.new_machine or not strike.moment.reads


def test_nothing_waits_for_reads_that_nobody_can_see() -> None:
    strikes = plan(40, random.Random(1), reads_visible=False)
    assert not any(strike.moment.reads for strike in strikes)


@pytest.mark.parametrize("kills", [1, 2, 3, 8])
def test_small_plans(kills: int) -> None:
    assert len(plan(kills, random.Random(3), reads_visible=True)) == kills


def written(step: int) -> Entry:
    key = f"chaos/runs/r/checkpoints/step-{step}-1-abcd/COMPLETE"
    return Entry(0.0, "end", 1, "PUT", key, "", 200, None)


def moment_named(name: str) -> Moment:
    return next(moment for moment in MOMENTS if moment.name == name)


def test_a_strike_waits_for_its_turn_and_its_moment() -> None:
    aim = Aim(Strike(moment_named("after COMPLETE"), 0.0, 10, (9,), 0.0, False), furthest=0)
    assert not aim.look([])
    assert not aim.look([written(5)])
    assert not aim.look([written(10)]), "this one made it due"
    assert not aim.look([])
    assert aim.look([written(15)])
    assert aim.furthest == 15
    assert not aim.forced


def test_a_refused_write_is_no_checkpoint() -> None:
    aim = Aim(Strike(moment_named("at any time"), 0.0, 5, (9,), 0.0, False), furthest=0)
    refused = Entry(0.0, "end", 1, "PUT", written(5).key, "", 503, "slow_down")
    assert not aim.look([refused])
    assert aim.look([written(5)])


# -- the clock -------------------------------------------------------------------------------------


def machine(*lives: Life) -> Machine:
    return Machine(1, Path(), 1000.0 - PROVISION_S, list(lives))


def test_what_the_root_may_not_have_heard_of() -> None:
    tail = 1.5 * HEARTBEAT_S + UPLOAD_S
    long = Life(1000.0, 1100.0, "1-a")
    assert machine(long).paid_s == 100.0 + PROVISION_S
    assert machine(long).unheard_s == tail
    assert machine(Life(1000.0, 1001.0, "1-a")).unheard_s == 1.0
    unrecorded = Life(1110.0, 1120.0, None)
    assert machine(long, unrecorded).unheard_s == 20.0 + tail
    assert machine(unrecorded, long).unheard_s == tail, "a gap before an attempt is heard of"
    assert machine(unrecorded).unheard_s == machine(unrecorded).paid_s


def test_dollars_may_be_below_the_clock_by_what_was_not_heard_and_never_above() -> None:
    one = machine(Life(1000.0, 1100.0, "1-a"))
    clock = compare(0.0, [one]).clock
    tolerance = compare(0.0, [one]).tolerance
    assert compare(clock, [one]).fits
    assert compare(clock - tolerance, [one]).fits
    assert not compare(clock * 1.001, [one]).fits
    assert not compare(clock - 1.001 * tolerance - 1e-4, [one]).fits


# -- reading the root ------------------------------------------------------------------------------


def test_a_folder_tells_the_beginning_and_the_end_of_a_write(tmp_path: Path) -> None:
    watch = FolderWatch(tmp_path)
    assert watch.fresh() == []
    temporary = tmp_path / ".partial-0123abcd-COMPLETE"
    temporary.write_text("x")
    assert [(e.event, e.key) for e in watch.fresh()] == [("begin", "COMPLETE")]
    temporary.rename(tmp_path / "COMPLETE")
    assert [(e.event, e.key, e.arrived) for e in watch.fresh()] == [("end", "COMPLETE", True)]
    assert watch.fresh() == []


def test_only_the_surviving_lineage_counts(tmp_path: Path) -> None:
    root = FolderObjects(tmp_path)

    def attempt(name: str, resumed: str, steps: range, ending: str | None = None) -> None:
        folder = "runs/r"
        start = f'{{"resumed_from": {resumed}}}'
        root.write(f"{folder}/attempts/{name}.json", start.encode())
        if ending:
            root.write(f"{folder}/attempts/{name}.end.json", ending.encode())
        line = '{{"kind": "metric", "key": "train/loss", "value": {}, "step": {}}}\n'
        data = "".join(line.format(f"{name[0]}.{step}", step) for step in steps)
        root.write(f"{folder}/journal/{name}/000000.jsonl", data.encode())

    attempt("1-a", "null", range(1, 8))
    attempt("2-b", '{"step": 5, "attempt": "1-a"}', range(6, 9))
    done = '{"outcome": "FINISHED", "ended_at": 1.0}'
    attempt("3-c", '{"step": 5, "attempt": "1-a"}', range(6, 11), done)
    files = RunFiles(root)
    losses = points(files)["train/loss"]
    assert losses == {step: float(f"{1 if step <= 5 else 3}.{step}") for step in range(1, 11)}
    assert repeated(files) == []
    attempt("3-c", '{"step": 4, "attempt": "1-a"}', range(5, 11), done)
    attempt("1-a", "null", range(8))
    root.write("runs/r/journal/1-a/000001.jsonl", root.read("runs/r/journal/1-a/000000.jsonl"))
    assert [step for _, step, _ in repeated(files)] == [0, 1, 2, 3, 4]
