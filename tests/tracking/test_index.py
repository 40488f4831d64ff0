"""A remembered root gives the figures of one read whole, and is read again where it must be."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.ledger.invoices import Invoice
from tessera.runs import Rollback, Run
from tessera.storage import Root
from tessera.tracking import index as index_module
from tessera.tracking import records as records_module
from tessera.tracking.condense import Cut, condense
from tessera.tracking.memory import FORMAT, Memory, _path, forget, remembered
from tessera.tracking.queries import summarise_whole
from tessera.tracking.records import Record
from tests.tracking.fabricate import Bench, Writer

DAY = 86_400.0


@pytest.fixture
def memory(bench: Bench) -> Iterator[Memory]:
    with remembered(bench.root) as found:
        yield found


def equal(one: Any, other: Any) -> bool:
    """As dictionaries, floats to the last digits; NaN is NaN."""
    if isinstance(one, float) and isinstance(other, float):
        both = math.isnan(one) and math.isnan(other)
        return both or math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def expect_same(bench: Bench, memory: Memory) -> None:
    """Figures and damage are those of the root read whole, twice in a row, and later too."""
    for now in (bench.clock.now, bench.clock.now, bench.clock.now + 100, bench.clock.now + 2 * DAY):
        whole, wrong = summarise_whole(bench.root, now=now)
        rows, damaged = summarise_whole(bench.root, now=now, memory=memory)
        assert [row.run_id for row in rows] == [row.run_id for row in whole]
        for row, expected in zip(rows, whole, strict=True):
            assert equal(asdict(row), asdict(expected)), (asdict(row), asdict(expected))
        assert {k: str(v) for k, v in damaged.items()} == {k: str(v) for k, v in wrong.items()}


def killed(bench: Bench, run: Run) -> Writer:
    """An attempt that published step 20 and died at 33."""
    writer = bench.launch(run, usd_per_gb_up=1.0)
    writer.evaluate(0, 6.0, unigram_entropy=5.5)
    writer.steps(1, 20)
    writer.evaluate(20, 4.0)
    writer.checkpoint(20)
    writer.journal.metric("traffic/up_bytes", 5e8, 20)
    writer.steps(21, 33)
    writer.evaluate(30, 3.9)
    writer.kill()
    return writer


def test_figures_are_those_of_the_root_read_whole(bench: Bench, memory: Memory) -> None:
    expect_same(bench, memory)  # nothing there yet
    bench.finished("base")
    run = bench.create("moved", steps=60)
    killed(bench, run)
    expect_same(bench, memory)
    bench.clock.now += 500
    writer = bench.launch(run, instance="i-2")
    writer.journal.metric("cost/usd_per_hour", 7.2, 20)
    writer.steps(21, 40)
    writer.journal.flush()
    expect_same(bench, memory)  # it runs
    writer.checkpoint(40)
    expect_same(bench, memory)  # what was beyond the lineage is within it now
    writer.steps(41, 60)
    writer.evaluate(60, math.nan)
    writer.end("FINISHED", 60)
    expect_same(bench, memory)


def test_a_rollback_and_a_second_attempt_at_once_are_seen(bench: Bench, memory: Memory) -> None:
    run = bench.create("shaken", steps=60)
    writer = killed(bench, run)
    expect_same(bench, memory)
    rollback = Rollback("2-00000000", 0, "spike", ((0, 5),), 1, bench.clock.now)
    run.publish_rollback(rollback)
    expect_same(bench, memory)
    again = bench.launch(run, instance=writer.attempt.instance)
    again.steps(1, 10)
    again.checkpoint(10)
    other = bench.launch(run, instance="i-3")
    other.steps(11, 12)
    other.journal.flush()
    expect_same(bench, memory)
    again.end("SUPERSEDED", 10)
    other.end("DIVERGED", 12, 3)
    expect_same(bench, memory)


def test_an_invoice_changes_the_figures_of_a_run_that_is_over(bench: Bench, memory: Memory) -> None:
    bench.finished("base")
    bench.clock.now += 2 * DAY
    expect_same(bench, memory)
    for usd in (0.5, 0.25):  # the second one replaces the first
        now = bench.clock.now
        invoice = Invoice("vast", "i-base", "", usd, {}, now - 9, now, now, "billed", False)
        bench.root.publish_json("bills/vast/i-base.json", asdict(invoice))
        expect_same(bench, memory)
        (row,) = summarise_whole(bench.root, now=bench.clock.now, memory=memory)[0]
        assert row.billed_usd == usd


def test_damage_is_told_and_hides_no_other_run(bench: Bench, memory: Memory) -> None:
    bench.finished("base")
    run = bench.create("torn", steps=60)
    writer = killed(bench, run)
    expect_same(bench, memory)
    path = run.path("journal", writer.attempt.id, "000000.jsonl")
    lines = bench.root.read_bytes(path).splitlines(keepends=True)
    bench.root.publish(path, b"".join([*lines[:5], b"{torn}\n", *lines[6:]]))
    expect_same(bench, memory)
    bench.root.publish(path, b"".join(lines))
    expect_same(bench, memory)


def test_a_run_that_is_over_is_not_read_again(
    bench: Bench, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.finished("base")
    later = bench.clock.now + DAY
    summarise_whole(bench.root, now=later, memory=memory)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the journal was read")

    monkeypatch.setattr(index_module, "segments", refuse)
    monkeypatch.setattr(records_module, "copy_of", refuse)
    (row,) = summarise_whole(bench.root, now=later, memory=memory)[0]
    assert row.status == "finished"
    with pytest.raises(AssertionError, match="journal was read"):
        summarise_whole(bench.root, now=later, memory=memory, fresh=True)


def test_another_run_in_the_place_of_one_that_is_over_is_seen(bench: Bench, memory: Memory) -> None:
    run = bench.finished("base", final=2.5)
    bench.clock.now += 2 * DAY
    expect_same(bench, memory)
    shutil.rmtree(Path(bench.root.base, "runs", run.id))
    bench.finished("base", final=2.25)
    bench.clock.now += 2 * DAY
    expect_same(bench, memory)
    shutil.rmtree(Path(bench.root.base, "runs", run.id))
    expect_same(bench, memory)  # and none
    assert memory.runs() == {}


def test_of_a_run_that_trains_only_the_open_segment_is_read(
    bench: Bench, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.tracking.journal.SEGMENT_BYTES", 4000)
    run = bench.create("long", steps=400)
    writer = bench.launch(run)
    for step in range(1, 301, 10):
        writer.steps(step, step + 9)
        writer.journal.flush()
    writer.checkpoint(300)
    expect_same(bench, memory)
    segments = len(bench.root.files(run.path("journal")))
    assert segments > 10
    read: list[str] = []
    original = records_module.read_segment

    def spy(run: Run, paths: Any, last: int, *, newest: bool) -> list[Record]:
        read.append(paths[0])
        return original(run, paths, last, newest=newest)

    monkeypatch.setattr(index_module, "read_segment", spy)
    writer.steps(301, 303)
    writer.journal.flush()
    summarise_whole(bench.root, now=bench.clock.now, memory=memory)
    assert 1 <= len(read) <= 2, read
    expect_same(bench, memory)


def test_an_attempt_that_went_on_unseen_is_in_the_figures(bench: Bench, memory: Memory) -> None:
    run = bench.create("twice", steps=40)
    lonely = bench.launch(run, instance="i-1")
    lonely.steps(1, 10)
    lonely.journal.flush()
    other = bench.launch(run, instance="i-2")
    other.steps(1, 40)
    other.checkpoint(40)
    other.end("FINISHED", 40)
    summarise_whole(bench.root, now=bench.clock.now, memory=memory)
    lonely.steps(11, 2000)  # nobody told it
    lonely.kill()
    bench.clock.now += 2 * DAY
    expect_same(bench, memory)


@pytest.mark.parametrize("harm", ["garbage", "version", "read-only"])
def test_a_memory_that_cannot_be_used_costs_time_alone(
    bench: Bench, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.finished("base")
    with remembered(bench.root) as memory:
        expect_same(bench, memory)
        assert memory.runs()
    path = _path(bench.root)
    if harm == "garbage":
        path.write_bytes(b"no database" * 1000)
    elif harm == "version":
        monkeypatch.setattr("tessera.tracking.memory.FORMAT", FORMAT + 1)
    else:
        monkeypatch.setenv("TESSERA_CACHE", "/proc/nothing")
    with remembered(bench.root) as memory:
        assert memory.runs() == {}
        expect_same(bench, memory)
    forget(bench.root)


def test_a_folder_of_small_records_is_read_once(bench: Bench, memory: Memory) -> None:
    root: Root = bench.root
    for name in "ab":
        root.publish(f"registry/x/{name}.json", name.encode())
    assert memory.contents(root, "registry") == {
        "registry/x/a.json": b"a",
        "registry/x/b.json": b"b",
    }
    root.delete("registry/x/a.json")
    root.publish("registry/x/b.json", b"c")
    assert memory.contents(root, "registry") == {"registry/x/b.json": b"c"}
    assert list(memory.objects("registry")) == ["registry/x/b.json"]


steps = st.integers(0, 12)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), steps), max_size=12),
    st.tuples(steps, steps),
    st.tuples(steps, steps),
)
def test_a_stretch_serves_only_cuts_that_would_give_the_same(
    points: list[tuple[str, int]], one: tuple[int, int], other: tuple[int, int]
) -> None:
    found = [
        Record("metric", key, float(n), step, 100.0 + n, "1-aa", n + 1)
        for n, (key, step) in enumerate(sorted(points, key=lambda point: point[1]))
    ]
    cut, asked = Cut(min(one) - 1, max(one)), Cut(min(other) - 1, max(other))
    part = condense(found, cut)
    if part.serves(asked):
        assert condense(found, asked).records == part.records
