from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.errors import DamagedError
from tessera.runs import Attempt, Run
from tessera.storage import Root
from tessera.tracking.checkpoints import summarise_checkpoints
from tessera.tracking.history import ALIVE_S, bill_all, read_histories, read_history
from tessera.tracking.queries import (
    RunSummary,
    summarise,
    summarise_attempts,
    summarise_run,
    summarise_whole,
    usd_by_category,
)

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


# -- traffic ---------------------------------------------------------------------------------------


def test_traffic_of_lost_work_is_paid_for(bench: Bench) -> None:
    run = bench.create()
    first = bench.launch(run, usd_per_gb_up=0.01)
    first.steps(1, 10)
    first.checkpoint(10)
    first.journal.metric("traffic/up_bytes", 2e9, 10)
    first.steps(11, 15)
    first.journal.metric("traffic/up_bytes", 3e9, 15)  # of a checkpoint that became nothing
    first.kill()
    bench.clock.now += ALIVE_S
    second = bench.launch(run, instance="i-2", usd_per_gb_up=0.1)
    second.steps(11, 20)
    second.checkpoint(20)
    second.journal.metric("traffic/up_bytes", 4e9, 20)
    second.end("FINISHED", 20)
    found = only(bench)
    assert found.traffic_bytes == 9_000_000_000
    assert found.traffic_usd == pytest.approx(0.05 + 0.4)
    assert found.cost_usd == pytest.approx(0.025 + 0.45)
    history = read_history(run)
    attempts = summarise_attempts(history, bill_all([history]))
    assert [a.traffic_usd for a in attempts] == [pytest.approx(0.05), pytest.approx(0.4)]
    assert [a.usd for a in attempts] == [pytest.approx(0.065), pytest.approx(0.41)]
    assert [a.usd_per_gb_up for a in attempts] == [0.01, 0.1]
    spent = usd_by_category(attempts)
    assert spent is not None
    assert spent["traffic"] == pytest.approx(0.45)
    assert sum(spent.values()) == pytest.approx(found.cost_usd)


def test_two_uploads_of_one_step_are_two_uploads(bench: Bench) -> None:
    writer = bench.launch(bench.create(), usd_per_gb_up=1.0)
    for _ in range(2):
        writer.journal.metric("traffic/up_bytes", 1e9, 10)
    writer.journal.event("traffic/up_bytes", 10, value=1e9)  # no metric, no bytes
    writer.end("FINISHED", 10)
    assert only(bench).traffic_usd == 2.0


def test_traffic_without_a_price_is_bytes_and_no_dollars(bench: Bench) -> None:
    writer = bench.launch(bench.create())
    writer.steps(1, 10)
    writer.journal.metric("traffic/up_bytes", 5e9, 10)
    writer.end("FINISHED", 10)
    found = only(bench)
    assert (found.traffic_bytes, found.traffic_usd) == (5_000_000_000, 0.0)
    assert found.cost_usd == pytest.approx(0.01)


def test_traffic_is_known_where_the_price_of_an_hour_is_not(bench: Bench) -> None:
    changes = {"usd_per_hour": None, "price_source": "unknown", "usd_per_gb_up": 0.02}
    writer = bench.launch(bench.create(), **changes)
    writer.journal.metric("traffic/up_bytes", 1e9, 5)
    writer.end("FINISHED", 5)
    found = only(bench)
    assert (found.cost_usd, found.usd_per_mtok, found.traffic_usd) == (None, None, 0.02)


def test_what_saving_cost_is_added_up(bench: Bench) -> None:
    run = bench.create()
    first = bench.launch(run, usd_per_gb_up=0.01)
    first.steps(1, 10)  # nine seconds of training
    for step in (4, 8):
        first.journal.metric("checkpoint/stall_s", 0.03, step)
        first.journal.event("checkpoint/published", step, folder="f")
        first.journal.metric("traffic/up_bytes", 1e9, step)
    first.journal.event("checkpoint/published", 10, folder="f")  # its last write failed
    first.journal.event("checkpoint/failed", 10, reason="the store is down")
    first.kill()
    second = bench.launch(run, usd_per_gb_up=0.01)
    second.steps(1, 10)
    second.journal.event("checkpoint/failed", 10, reason="the store is down")
    second.journal.event("checkpoint/published", 10, folder="f")  # tried again before leaving
    second.journal.metric("checkpoint/stall_s", math.nan, 10)
    second.end("FINISHED", 10)
    found = summarise_checkpoints(read_history(run))
    assert (found.published, found.bytes) == (3, 2_000_000_000)
    assert found.stall_s == pytest.approx(0.06)
    assert found.stall_share == pytest.approx(0.06 / 18)
    assert found.usd == pytest.approx(0.02)


def test_nothing_saved_cost_nothing(bench: Bench) -> None:
    found = summarise_checkpoints(read_history(bench.create()))
    assert (found.published, found.bytes, found.stall_s, found.usd) == (0, 0, 0.0, 0.0)
    assert found.stall_share is None


@dataclass(frozen=True)
class Life:
    """One attempt that a property test makes up; times in seconds."""

    run: int
    instance: str
    wait: int
    billed_before: int
    seconds: int
    usd_per_hour: float
    usd_per_gb_up: float
    uploads: list[int]
    end: str
    sent_twice: bool
    torn: bool


_LIVES = st.lists(
    st.builds(
        Life,
        run=st.integers(0, 1),
        instance=st.sampled_from(["i-1", "i-2"]),
        wait=st.integers(-20, 20),
        billed_before=st.integers(0, 40),
        seconds=st.integers(1, 20),
        usd_per_hour=st.sampled_from([0.0, 3.6, 7.2]),
        usd_per_gb_up=st.sampled_from([0.0, 0.01, 1.0]),
        uploads=st.lists(st.integers(1, 10**11), max_size=3),
        end=st.sampled_from(["kill", "FAILED", "ROLLED_BACK", "SUPERSEDED", "FINISHED"]),
        sent_twice=st.booleans(),
        torn=st.booleans(),
    ),
    min_size=1,
    max_size=5,
)
_numbers = itertools.count()


def _live(bench: Bench, run: Run, life: Life) -> Attempt:
    """Live that life: its seconds, uploads, an end, and what a bad store made of its journal."""
    bench.clock.now += life.wait
    writer = bench.launch(
        run,
        instance=life.instance,
        billed_from=bench.clock() - life.billed_before,
        usd_per_hour=life.usd_per_hour,
        usd_per_gb_up=life.usd_per_gb_up,
    )
    writer.steps(1, life.seconds)
    for number, sent in enumerate(life.uploads):
        writer.journal.metric("traffic/up_bytes", sent, life.seconds - number % 2)
    if life.end == "kill":
        writer.kill()
    else:
        writer.end(life.end, life.seconds)
    segment = run.path("journal", writer.attempt.id, "000000.jsonl")
    data = bench.root.read_bytes(segment)
    if life.sent_twice:
        bench.root.publish(segment.replace("000000", "000001"), data)
    if life.torn:
        last = segment.replace("000000", "000001") if life.sent_twice else segment
        bench.root.publish(last, data + b'{"kind":"metric","key":"traffic/up_bytes","value":9')
    return writer.attempt


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lives=_LIVES, damaged=st.none() | st.integers(0, 1))
def test_no_dollar_is_lost_or_counted_twice(
    bench: Bench, lives: list[Life], damaged: int | None
) -> None:
    """The sum over attempts of seconds and bytes, whatever their order, repetitions or damage."""
    bench.root = Root(str(bench.folder / f"root-{next(_numbers)}"))
    runs = [bench.create(name) for name in ("one", "two")]
    lived = [(runs[life.run].id, _live(bench, runs[life.run], life), life) for life in lives]
    if damaged is not None:
        for path in bench.root.files(runs[damaged].path("journal")):
            lines = bench.root.read_bytes(path).splitlines(keepends=True)
            bench.root.publish(path, b"".join([lines[0], b"{}\n", *lines[2:]]))
    bench.clock.now += 1000

    owners: dict[tuple[str, int], str] = {}
    price: dict[str, float] = {}
    expected: defaultdict[str, float] = defaultdict(float)
    for run_id, attempt, life in sorted(
        lived, key=lambda item: (item[1].started_at, f"{item[0]}/{item[1].id}")
    ):
        name = f"{run_id}/{attempt.id}"
        price[name] = life.usd_per_hour
        end = int(attempt.started_at) + life.seconds
        for second in range(int(attempt.billed_from), end):
            owners.setdefault((life.instance, second), name)
        expected[name] += sum(life.uploads) * life.usd_per_gb_up / 1e9
    for name in owners.values():
        expected[name] += price[name] / 3600

    read = read_histories(bench.root)
    hurt = {runs[damaged].id} if damaged in [life.run for life in lives] else set()
    assert read.damaged.keys() == hurt
    bills = bill_all([*read.billable, *reversed(read.whole), *read.whole])
    for history, row in zip(read.whole, summarise_whole(bench.root)[0], strict=True):
        attempts = summarise_attempts(history, bills)
        for found in attempts:
            assert found.usd == pytest.approx(expected[f"{row.run_id}/{found.attempt}"])
        own = [usd for name, usd in expected.items() if name.startswith(f"{row.run_id}/")]
        assert row.cost_usd == pytest.approx(sum(own))
        assert sum((usd_by_category(attempts) or {}).values()) == pytest.approx(sum(own))
        assert summarise_run(bench.root, history.run).cost_usd == pytest.approx(row.cost_usd)
    whole = [life for life in lives if runs[life.run].id not in hurt]
    rows = summarise_whole(bench.root)[0]
    assert sum(row.traffic_bytes for row in rows) == sum(sum(life.uploads) for life in whole)
