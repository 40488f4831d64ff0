from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from tessera.errors import DamagedError
from tessera.tracking.history import ALIVE_S
from tessera.tracking.queries import RunSummary, summarise, summarise_run, summarise_whole

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench


def only(bench: Bench) -> RunSummary:
    (summary,) = summarise(bench.root)
    return summary


def test_a_finished_run_in_figures(bench: Bench) -> None:
    run = bench.finished(steps=20, final=2.5)
    found = only(bench)
    assert (found.run_id, found.kind, found.status) == (run.id, "pretrain", "finished")
    assert (found.step, found.total_steps, found.tokens) == (20, 20, 20_000)
    assert (found.final_loss, found.best_loss) == (2.5, 2.5)
    assert (found.unigram_entropy, found.base_loss) == (5.5, None)
    assert found.wall_s == pytest.approx(20)
    assert found.cost_usd == pytest.approx(0.02)
    assert found.usd_per_mtok == pytest.approx(1.0)
    assert found.tokens_per_s == pytest.approx(1000)
    assert found.seconds["train"] == pytest.approx(18)
    assert sum(found.seconds.values()) == pytest.approx(20)
    assert not found.cost_estimated
    assert (found.live_step, found.attempts, found.price_sources) == (None, 1, ("provider",))


def test_the_best_loss_need_not_be_the_last(bench: Bench) -> None:
    run = bench.create()
    writer = bench.launch(run)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.4)):
        writer.steps(step - 9, step)
        writer.evaluate(step, loss)
    writer.end("BUDGET", 30)
    found = only(bench)
    assert (found.status, found.final_loss, found.best_loss) == ("budget", 2.4, 2.0)
    assert (found.step, found.total_steps) == (30, 100)


def test_points_beyond_the_checkpoint_that_was_resumed_do_not_count(bench: Bench) -> None:
    run = bench.create()
    first = bench.launch(run)
    first.steps(1, 10)
    first.evaluate(10, 3.0)
    first.checkpoint(10)
    first.steps(11, 15)
    first.evaluate(15, 0.1)
    first.kill()
    bench.clock.now += ALIVE_S
    second = bench.launch(run)
    second.steps(11, 20)
    second.evaluate(20, 2.0)
    second.checkpoint(20)
    second.end("FINISHED", 20)
    found = only(bench)
    assert (found.final_loss, found.best_loss, found.tokens) == (2.0, 2.0, 20_000)
    assert found.seconds["lost"] == pytest.approx(5)
    assert found.tokens_per_s == pytest.approx(1000)
    assert found.cost_usd == pytest.approx(0.025)  # lost seconds were paid for
    assert found.cost_estimated  # the first attempt never said when it ended


def test_a_killed_attempt_ends_at_its_last_record(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 30)
    writer.kill()
    bench.clock.now += ALIVE_S
    found = only(bench)
    assert found.status == "died"
    assert found.cost_usd == pytest.approx(0.03)
    assert found.cost_estimated
    assert found.wall_s == pytest.approx(30)
    assert found.final_loss is None


def test_a_fresh_heartbeat_is_a_running_run_with_a_live_step(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 10)
    writer.checkpoint(10)
    writer.steps(11, 13)
    writer.kill()
    bench.clock.now += ALIVE_S - 1
    found = only(bench)
    assert (found.status, found.ended_at) == ("running", None)
    assert (found.step, found.live_step, found.tokens) == (10, 13, 10_000)
    assert found.live_loss == pytest.approx(10 / 13 + 0.001)
    assert found.seconds["lost"] == 0
    assert not found.cost_estimated


@pytest.mark.parametrize("outcome", ["FAILED", "DIVERGED", "PREEMPTED"])
def test_the_last_attempt_names_the_status(bench: Bench, outcome: str) -> None:
    run = bench.create()
    bench.launch(run).end("PREEMPTED", 0)
    bench.launch(run).end(outcome, 0)
    assert only(bench).status == outcome.lower()


def test_a_run_without_attempts_is_summarised_too(bench: Bench) -> None:
    bench.create()
    assert only(bench).status == "running"
    bench.clock.now += ALIVE_S
    found = only(bench)
    assert (found.status, found.cost_usd, found.attempts) == ("died", 0.0, 0)


def test_two_live_attempts_waste_money_but_never_mix(bench: Bench) -> None:
    run = bench.create()
    first = bench.launch(run)
    first.steps(1, 10)
    first.checkpoint(10)
    second = bench.launch(run, instance="i-2")
    first.steps(11, 20)
    first.evaluate(20, 9.0)
    first.checkpoint(20)
    second.steps(11, 30)
    second.evaluate(30, 2.0)
    second.checkpoint(30)
    found = only(bench)
    first.kill()
    second.kill()
    assert (found.status, found.attempts, found.step) == ("running", 2, 30)
    assert (found.best_loss, found.final_loss, found.tokens) == (2.0, 2.0, 30_000)
    # The first lived 20 s up to its last record, the second 30 s from its start to its own.
    assert found.cost_usd == pytest.approx(0.001 * (20 + 30))
    assert found.seconds["lost"] == pytest.approx(10)


def test_an_instance_that_two_runs_shared_is_paid_once(bench: Bench) -> None:
    started = bench.clock()
    costs = []
    for name in ("one", "two"):
        run = bench.create(name)
        writer = bench.launch(run, billed_from=started)
        writer.steps(1, 10)
        writer.end("FINISHED", 10)
        bench.clock.now += 5
    costs = [row.cost_usd for row in summarise(bench.root)]
    assert costs == [pytest.approx(0.010), pytest.approx(0.015)]  # the idle gap is the later one's
    assert summarise_run(bench.root, run).cost_usd == pytest.approx(0.015)


def test_the_loss_of_the_base_is_not_the_result_of_its_fine_tuning(bench: Bench) -> None:
    run = bench.with_adapter()
    found = summarise_run(bench.root, run)
    assert (found.kind, found.base_loss, found.final_loss, found.best_loss) == ("sft", 5, 3.5, 3.5)
    assert found.base is not None
    assert found.base.startswith("base-")


def test_a_base_that_was_never_beaten_is_all_there_is(bench: Bench) -> None:
    run = bench.create(base={"run_id": "b", "weights_digest": "d"})
    writer = bench.launch(run)
    writer.evaluate(0, 4.0)
    writer.end("BUDGET", 0)
    found = only(bench)
    assert (found.base_loss, found.final_loss, found.base) == (4.0, 4.0, "b")


def test_an_unknown_price_is_no_price(bench: Bench) -> None:
    writer = bench.launch(bench.create(), usd_per_hour=None, price_source="unknown")
    writer.steps(1, 5)
    writer.end("FINISHED", 5)
    found = only(bench)
    assert (found.cost_usd, found.usd_per_mtok) == (None, None)


def test_a_price_of_the_experiment_is_an_estimate(bench: Bench) -> None:
    writer = bench.launch(bench.create(), price_source="experiment")
    writer.steps(1, 5)
    writer.end("FINISHED", 5)
    assert only(bench).cost_estimated


def test_nan_is_shown_as_the_final_loss_and_never_as_the_best(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 10)
    writer.evaluate(5, 3.0)
    writer.evaluate(10, math.nan)
    writer.checkpoint(10)
    writer.end("DIVERGED", 10, exit_code=3)
    found = only(bench)
    assert found.final_loss is not None
    assert math.isnan(found.final_loss)
    assert (found.best_loss, found.status) == (3.0, "diverged")


def test_a_truncated_journal_is_damage_and_not_another_figure(bench: Bench) -> None:
    run, whole = bench.finished("cut"), bench.finished("whole")
    (attempt,) = run.attempts()
    path = run.path("journal", attempt.id, "000000.jsonl")
    lines = bench.root.read_bytes(path).splitlines(keepends=True)
    bench.root.publish(path, b"".join(lines[:-1]))
    says = rf"Attempt {attempt.id} of run {run.id} has {len(lines) - 1} of {len(lines)} records"
    with pytest.raises(DamagedError, match=says):
        summarise(bench.root)
    rows, damaged = summarise_whole(bench.root)
    assert [row.run_id for row in rows] == [whole.id]
    assert list(damaged) == [run.id]
    assert summarise_run(bench.root, whole).cost_usd == rows[0].cost_usd
