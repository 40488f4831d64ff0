"""``tessera-exp tail``: a run that grows between looks, its deaths, and how little is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tessera.cli import exp_tail
from tessera.cli.common import run_command
from tessera.cli.exp import exp
from tessera.errors import StoreError
from tessera.runs import Run
from tessera.storage import Root
from tessera.tracking.alert_records import record
from tessera.tracking.alerts import Alert
from tessera.tracking.records import segment_path

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench, Writer

Tail = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def tail(bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tail:
    """``tessera-exp tail``; each of ``then`` happens while it sleeps, after the last comes Ctrl-C.

    Returns the exit code, the lines of stdout and stderr.
    """

    def run(run: Run, *arguments: str, then: Any = ()) -> tuple[int, list[str], str]:
        coming = iter(then)

        def sleep(seconds: float) -> None:
            bench.clock.now += seconds
            happens = next(coming, None)
            if happens is None:
                raise KeyboardInterrupt
            happens()

        monkeypatch.setattr(exp_tail, "time", SimpleNamespace(time=bench.clock, sleep=sleep))
        code = run_command(exp, ["tail", run.id, *arguments, "--root", bench.root.url])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err

    return run


def points(writer: Writer, first: int, last: int) -> None:
    """Log points as the trainer writes them."""
    for step in range(first, last + 1):
        writer.clock.now += 1
        figures = {
            "train/loss": 10.0 / step, "progress/tokens": 1000.0 * step, "cost/usd": 0.001 * step,
            "train/tokens_per_s": 1000.0, "forecast/seconds_left": 100.0 - step,
        }  # fmt: skip
        for key, value in figures.items():
            writer.journal.metric(key, value, step)
        writer.journal.span("train", 1.0, step)
    writer.journal.flush()


def test_it_follows_until_the_run_ends(bench: Bench, tail: Tail) -> None:
    run = bench.create()
    writer = bench.launch(run)
    points(writer, 1, 3)

    def more() -> None:
        writer.evaluate(3, 2.5, unigram_entropy=5.5)
        points(writer, 4, 5)

    def spike() -> None:
        writer.journal.event(
            "stability/skipped", 6, loss=9.5, grad_norm=100.0, first_sample=10, end_sample=20
        )
        writer.journal.event("checkpoint/published", 6, folder="x")  # everyday
        writer.journal.flush()

    def end() -> None:
        points(writer, 6, 7)
        writer.end("FINISHED", 7)

    code, out, err = tail(run, then=[more, spike, end])
    assert (code, err) == (0, "")
    assert out[0] == (
        f"{run.id} is running: attempt 1 (1 x H200, vast/i-1, $3.6 an hour), last heard of 0 s ago."
    )
    said = [line.split("  ", 1)[1] for line in out[1:-1]]
    assert said == [
        "attempt 1 began: 1 x H200, vast/i-1, $3.6 an hour",
        "step 1/100  loss 10.0000  1,000 tok/s  $0.0010  ETA 1 min 39 s",
        "step 2/100  loss 5.0000  1,000 tok/s  $0.0020  ETA 1 min 38 s",
        "step 3/100  loss 3.3333  1,000 tok/s  $0.0030  ETA 1 min 37 s",
        "step 3  evaluation: loss 2.5000, unigram_entropy 5.5000",
        "step 4/100  loss 2.5000  1,000 tok/s  $0.0040  ETA 1 min 36 s",
        "step 5/100  loss 2.0000  1,000 tok/s  $0.0050  ETA 1 min 35 s",
        "step 6  step not applied: loss 9.5, gradient norm 100; samples 10 to 19 skipped",
        "step 6/100  loss 1.6667  1,000 tok/s  $0.0060  ETA 1 min 34 s",
        "step 7/100  loss 1.4286  1,000 tok/s  $0.0070  ETA 1 min 33 s",
        "step 7  attempt 1 ended (finished)",
    ]
    assert out[-1] == f"{run.id} ended at step 7: finished."


def test_ctrl_c_stops_the_looking_only(bench: Bench, tail: Tail) -> None:
    run = bench.create()
    writer = bench.launch(run)
    points(writer, 1, 2)
    code, out, err = tail(run, then=[lambda: None])
    assert code == 0
    assert "step 2/100" in out[-1], "a point that nothing follows is shown a look later"
    assert err == "Stopped looking; the run itself is not touched.\n"
    writer.kill()


def test_json_is_an_object_a_line(bench: Bench, tail: Tail) -> None:
    run = bench.create()
    writer = bench.launch(run, price_source="experiment")
    points(writer, 1, 1)
    writer.journal.metric("train/loss", float("nan"), 2)
    writer.evaluate(2, 2.5)
    writer.end("FINISHED", 2)
    code, out, err = tail(run, "--json")
    assert (code, err) == (0, "")
    items = [json.loads(line) for line in out]
    assert [item["what"] for item in items] == [
        "attempt", "point", "point", "evaluation", "attempt", "state",
    ]  # fmt: skip
    assert items[1] == {
        "what": "point", "attempt": writer.attempt.id, "step": 1, "time": items[1]["time"],
        "total_steps": 100, "estimated": True, "loss": 10.0, "tokens": 1000.0, "usd": 0.001,
        "tokens_per_s": 1000.0, "seconds_left": 99.0,
    }  # fmt: skip
    assert items[2]["loss"] is None
    assert items[3]["loss"] == 2.5
    assert (items[5]["state"], items[5]["heard_s"]) == ("ended", None)


def test_no_follow_shows_the_last_lines_in_order(bench: Bench, tail: Tail) -> None:
    run = bench.create()
    first = bench.launch(run)
    points(first, 1, 30)
    first.end("PREEMPTED", 30, exit_code=75)
    second = bench.launch(run, instance="i-2")
    points(second, 31, 33)
    code, out, err = tail(run, "--no-follow", "--lines", "6")
    assert (code, err) == (0, "")
    assert out[0].startswith(f"{run.id} is running: attempt 2 (1 x H200, vast/i-2")
    said = [line.split("  ")[1] for line in out[1:]]
    assert said[:3] == [
        "step 30/100",
        "step 30",
        "attempt 2 began: 1 x H200, vast/i-2, $3.6 an hour",
    ]
    assert said[3:] == ["step 31/100", "step 32/100", "step 33/100"]
    second.kill()


def test_an_attempt_dies_and_another_takes_over(bench: Bench, tail: Tail) -> None:
    run = bench.create()
    writers = [bench.launch(run)]
    points(writers[0], 1, 2)
    writers[0].checkpoint(2)

    def dies() -> None:
        points(writers[0], 3, 3)
        writers[0].kill()
        bench.clock.now += 100

    def takes_over() -> None:
        writers.append(bench.launch(run, instance="i-2"))

    def goes_on() -> None:
        points(writers[1], 3, 4)
        writers[1].end("DIVERGED", 4, exit_code=3)

    code, out, err = tail(run, then=[dies, lambda: None, takes_over, goes_on])
    assert (code, err) == (0, "")
    assert out[0].startswith(f"{run.id} is running: attempt 1")
    assert [line.split("  ")[1] for line in out if "step 3" in line][:1] == ["step 3/100"]
    (silent,) = [line for line in out if "has died, or its machine cannot reach" in line]
    assert "nothing was heard of attempt 1 for 1 min 4" in silent
    after = out[out.index(silent) + 1 :]
    assert "attempt 2 began: 1 x H200, vast/i-2" in after[0]
    assert after[1] == (
        f"{run.id} is running: attempt 2 (1 x H200, vast/i-2, $3.6 an hour), last heard of 0 s "
        "ago, no record yet."
    )
    assert [line.split("  ")[1] for line in after[2:4]] == ["step 3/100", "step 4/100"]
    assert after[-1] == f"{run.id} ended at step 4: diverged."


@pytest.mark.parametrize(("exit_code", "over"), [(1, True), (2, True), (75, False)])
def test_a_failure_that_another_machine_may_mend_is_waited_for(
    bench: Bench, tail: Tail, exit_code: int, over: bool
) -> None:
    run = bench.create()
    writer = bench.launch(run)
    points(writer, 1, 2)
    writer.end("FAILED", 2, exit_code=exit_code)
    code, out, err = tail(run)
    assert code == 0
    assert (err == "") is over
    if over:
        assert out[-1] == f"{run.id} ended at step 2: failed."
    else:
        assert out[0] == f"{run.id}: attempt 1 ended at step 2 (failed); another may follow."


def test_a_run_without_attempts_and_one_without_points(bench: Bench, tail: Tail) -> None:
    run = bench.create()
    code, out, _ = tail(run, "--no-follow")
    assert (code, out) == (0, [f"{run.id} has no attempt yet."])
    writer = bench.launch(run)
    code, out, _ = tail(run, "--no-follow")
    assert out[0].endswith("last heard of 0 s ago, no record yet.")
    writer.kill()
    bench.clock.now += 95
    code, out, _ = tail(run, "--no-follow")
    assert code == 0
    assert out[0] == (
        f"{run.id} has died, or its machine cannot reach the root: nothing was heard of attempt 1 "
        "for 1 min 35 s, and it left no ending."
    )


def test_an_unknown_run_is_a_sentence(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.create()
    assert run_command(exp, ["tail", "nobody", "--root", bench.root.url]) == 2
    assert capfd.readouterr().err.startswith("Error: No run is called 'nobody' in ")


def test_recorded_alerts_are_among_the_lines(bench: Bench, tail: Tail) -> None:
    run = bench.create()
    writer = bench.launch(run)
    points(writer, 1, 2)
    now = bench.clock()
    alerts = [
        Alert(run.id, "spike", str(step), now - age, f"step {step} was not applied.", step, "1-ab")
        for step, age in ((1, 90_000), (2, 50), (3, 10))
    ]
    for alert in alerts[:2]:
        record(bench.root, alert, now)

    def another() -> None:
        record(bench.root, alerts[2], now)
        bench.clock.now += 30

    _, out, _ = tail(run, then=[another, lambda: None])
    told = [line.split("  ", 1)[1] for line in out if "ALERT" in line]
    assert told == [
        "step 2  ALERT spike: step 2 was not applied.",
        "step 3  ALERT spike: step 3 was not applied.",
    ]
    writer.kill()


def test_a_store_that_is_down_for_a_while(
    bench: Bench, tail: Tail, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.create()
    writer = bench.launch(run)
    points(writer, 1, 1)
    children = Root.children

    def down(*_: object) -> list[str]:
        raise StoreError("The store is down; try later.")

    def up() -> None:
        monkeypatch.setattr(Root, "children", children)
        points(writer, 2, 3)
        writer.end("FINISHED", 3)

    breaks = lambda: monkeypatch.setattr(Root, "children", down)  # noqa: E731
    code, out, err = tail(run, then=[breaks, lambda: None, up])
    assert code == 0
    assert err == "Error: The store is down; try later. Looking again.\n"
    assert out[-1] == f"{run.id} ended at step 3: finished."


def test_a_damaged_journal_is_a_sentence(bench: Bench, tail: Tail) -> None:
    run = bench.create()
    writer = bench.launch(run)
    points(writer, 1, 3)
    path = segment_path(run, writer.attempt.id, 0)
    data = bench.root.read_bytes(path)
    code, _, err = tail(
        run, then=[lambda: bench.root.publish(path, data + b'{"kind": "nonsense"}\n')]
    )
    assert code == 2
    assert err.startswith(f"Error: {path} in {bench.root.url} is damaged at line 19 (")
    writer.kill()
