from __future__ import annotations

import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tessera.cli.common import run_command
from tessera.cli.main import tessera
from tessera.runs import list_runs
from tessera.storage import Root
from tessera.tracking.history import ALIVE_S
from tessera.tracking.queries import summarise_run
from tessera.tracking.saved_views import SO_FAR
from tessera.training.clock import now
from tessera.training.cost import RunningCost, earlier_traffic_usd

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench, Writer
    from tests.training.conftest import Bench as Workplace

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

made = importlib.import_module("fabricate").bench


@pytest.fixture
def paid(made: Bench) -> Bench:
    """A root of made-up runs, whose clock the running cost goes by as well."""
    made.monkeypatch.setattr("tessera.training.cost.now", made.clock)
    return made


def upload(writer: Writer, sent: float, step: int) -> None:
    """What the saver records of a checkpoint in the root."""
    writer.journal.metric("traffic/up_bytes", sent, step)


def test_a_machine_without_traffic_costs_its_time(paid: Bench) -> None:
    writer = paid.launch(paid.create())
    cost = RunningCost(writer.run, writer.attempt)
    paid.clock.now += 100
    assert cost.usd() == pytest.approx(0.1)
    assert cost.add_traffic(10**9) == 0.0  # nobody bills it
    assert cost.usd() == pytest.approx(0.1)
    writer.kill()


@pytest.mark.parametrize("days", [30, -30])
def test_a_clock_that_is_set_meanwhile_spends_nothing(
    made: Bench, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    began = now()
    writer = made.launch(made.create(), started_at=began, billed_from=began - 10)
    cost = RunningCost(writer.run, writer.attempt)
    wrong = time.time() + days * 86400
    monkeypatch.setattr("time.time", lambda: wrong)
    assert cost.usd() == pytest.approx(0.01, abs=0.005)
    monkeypatch.undo()
    writer.kill()


def test_an_attempt_ends_by_the_clock_that_it_began_with(
    bench: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next one would find the days of the jump on the bill."""
    plain, ahead = time.time, [0.0]

    def jump(_: Any) -> None:
        ahead[0] = 30 * 86400.0

    monkeypatch.setattr("time.time", lambda: plain() + ahead[0])
    bench.before_step(10, jump, monkeypatch)
    run = bench.train().run
    assert 0 < bench.last_ending(run).ended_at - run.attempts()[0].started_at < 3600
    usd = list(bench.points(run, "cost/usd").values())
    assert max(usd) < 1.0, "an hour costs $1"


def test_every_evaluation_has_the_dollars_so_far(bench: Workplace) -> None:
    """MLflow draws losses against them, and pairs the two by step."""
    run = bench.train().run
    dollars = bench.points(run, SO_FAR)
    assert list(dollars) == list(bench.points(run, "eval/loss"))
    assert len(dollars) > 2
    values = list(dollars.values())
    assert values == sorted(values)
    assert 0 < values[-1] < 1.0, "an hour costs $1"


def test_earlier_rented_machines_are_allowed_ten_idle_minutes_each(paid: Bench) -> None:
    run = paid.create()
    for place in (
        {"instance": "i-1", "usd_per_hour": 6.0}, {"instance": "i-1", "usd_per_hour": 12.0},
        {"instance": "i-2", "usd_per_hour": 60.0}, {"instance": "i-3", "usd_per_hour": 600.0},
        {"provider": "local", "instance": "box/1", "usd_per_hour": 6000.0},
    ):  # fmt: skip
        paid.clock.now += 10
        paid.launch(run, **place).end("FAILED", 1)
    other = paid.launch(paid.create("other"), instance="i-3", usd_per_hour=7.0)
    other.end("FAILED", 1)
    last = paid.launch(run, instance="i-3")
    cost = RunningCost(run, last.attempt)
    assert cost.idle_usd == pytest.approx(2.0 + 10.0), "neither its own machine nor one's own"
    before = cost.usd()
    assert before is not None
    last.end("FAILED", 1)
    assert summarise_run(paid.root, run).cost_usd == pytest.approx(before), "it is no dollar spent"


def test_earlier_traffic_counts_whatever_became_of_the_work(paid: Bench) -> None:
    run = paid.create()
    first = paid.launch(run, usd_per_gb_up=0.01)
    first.steps(1, 10)
    upload(first, 2e9, 10)
    first.checkpoint(10)
    first.steps(11, 15)
    upload(first, 3e9, 15)
    first.kill()
    paid.clock.now += ALIVE_S
    free = paid.launch(run, instance="i-2")
    upload(free, 7e9, 11)
    free.end("FAILED", 11)
    last = paid.launch(run, instance="i-3", usd_per_gb_up=0.1)
    upload(last, 1e9, 11)  # told as it happens: reading it here too would count it twice
    last.journal.flush()
    cost = RunningCost(run, last.attempt)
    assert cost.traffic_usd == pytest.approx(0.05)
    assert cost.add_traffic(10**9) == pytest.approx(0.1)
    last.steps(11, 20)
    assert cost.traffic_usd == pytest.approx(0.15)
    assert cost.usd() == pytest.approx(0.015 + 0.01 + 0.15)
    last.end("FINISHED", 20)
    assert summarise_run(paid.root, run).cost_usd == pytest.approx(cost.usd())


def test_traffic_of_another_run_on_the_machine_is_its_own(paid: Bench) -> None:
    other = paid.launch(paid.create("other"), usd_per_gb_up=1.0)
    upload(other, 1e9, 1)
    other.end("FINISHED", 1)
    writer = paid.launch(paid.create("mine"), usd_per_gb_up=1.0)
    assert RunningCost(writer.run, writer.attempt).usd() == 0.0
    writer.kill()


def test_an_unknown_price_of_an_hour_leaves_the_traffic_known(paid: Bench) -> None:
    changes = {"usd_per_hour": None, "price_source": "unknown", "usd_per_gb_up": 0.5}
    writer = paid.launch(paid.create(), **changes)
    cost = RunningCost(writer.run, writer.attempt)
    assert cost.add_traffic(10**9) == 0.5
    assert (cost.usd(), cost.traffic_usd) == (None, 0.5)
    writer.kill()


def test_no_upload_is_lost_between_threads(paid: Bench) -> None:
    writer = paid.launch(paid.create(), usd_per_gb_up=1.0)
    cost = RunningCost(writer.run, writer.attempt)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(cost.add_traffic, [10**6] * 4000))
    finally:
        sys.setswitchinterval(before)
    assert cost.traffic_usd == pytest.approx(4.0)
    writer.kill()


def test_a_long_journal_of_several_segments_is_read_whole(paid: Bench) -> None:
    paid.monkeypatch.setattr("tessera.tracking.journal.SEGMENT_BYTES", 2000)
    writer = paid.launch(paid.create(), usd_per_gb_up=1.0)
    for step in range(1, 101):
        writer.steps(step, step)
        if step % 10 == 0:
            upload(writer, 1e9, step)
    writer.kill()
    assert len(paid.root.files(writer.run.path("journal"))) > 10
    assert earlier_traffic_usd(writer.run, [writer.attempt]) == pytest.approx(10.0)


def test_a_record_that_is_there_twice_counts_once_and_a_broken_one_not_at_all(
    paid: Bench,
) -> None:
    writer = paid.launch(paid.create(), usd_per_gb_up=1.0)
    upload(writer, 1e9, 10)
    writer.journal.event("note", 10, text='"traffic/up_bytes"')
    writer.journal.event("traffic/up_bytes", 10, value=5e9)
    writer.kill()
    path = writer.run.path("journal", writer.attempt.id, "000000.jsonl")
    data = paid.root.read_bytes(path)
    odd = [{"kind": "metric", "key": "traffic/up_bytes", "seq": 9, "value": v}
           for v in ("NaN", None, [1], -4.0, {"traffic/up_bytes": 1})]  # fmt: skip
    broken = [json.dumps(line).encode() for line in odd]
    broken += [b'"traffic/up_bytes"', b'["traffic/up_bytes"]', b'{"key":"traffic/up_bytes","kin']
    paid.root.publish(path.replace("000000", "000001"), data + b"\n".join(broken))
    assert earlier_traffic_usd(writer.run, [writer.attempt]) == 1.0


def test_free_traffic_is_not_even_read(paid: Bench) -> None:
    run = paid.create()
    writer = paid.launch(run)
    upload(writer, 1e9, 10)
    writer.end("FAILED", 10)
    asked: list[str] = []
    plain = Root.read_bytes

    def listening(root: Root, path: str) -> bytes:
        asked.append(path)
        return plain(root, path)

    paid.monkeypatch.setattr(Root, "read_bytes", listening)
    last = paid.launch(run)
    RunningCost(run, last.attempt)
    assert not [path for path in asked if "/journal/" in path]
    billed = paid.launch(run, usd_per_gb_up=1.0)
    upload(billed, 1e9, 10)
    billed.end("FAILED", 10)
    asked.clear()
    RunningCost(run, last.attempt)
    assert [p for p in asked if "/journal/" in p] == [
        run.path("journal", billed.attempt.id, "000000.jsonl")
    ]
    last.kill()


# -- the command -----------------------------------------------------------------------------------


def test_the_attempt_records_what_its_traffic_costs(
    bench: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one_step = ["--set", "tokens=256", "--set", "schedule.warmup_steps=0"]
    told = ["--set", "price.usd_per_gb_up=0.05"]
    for extra, variable in ((told, None), (told, "0.02"), ([], None)):
        if variable is not None:
            monkeypatch.setenv("TESSERA_USD_PER_GB_UP", variable)
        else:
            monkeypatch.delenv("TESSERA_USD_PER_GB_UP", raising=False)
        done = bench.command(capfd, *one_step, *extra, "--new")
        assert done.code == 0, done.err
    prices = [run.attempts()[0].usd_per_gb_up for run in list_runs(bench.root)]
    assert prices == [0.05, 0.02, 0.0]


def test_a_price_that_is_none_is_refused_before_anything_is_recorded(
    bench: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TESSERA_USD_PER_GB_UP", "2 cents")
    assert run_command(tessera, bench.arguments()) == 2
    assert capfd.readouterr().err == (
        "Error: TESSERA_USD_PER_GB_UP is '2 cents'; expected US dollars for 10^9 bytes, such as "
        "0.02.\n"
    )
    assert list_runs(bench.root) == []
