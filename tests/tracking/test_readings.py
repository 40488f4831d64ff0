"""What a sync that is repeated reads of a root, and that it sees the same as a first one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tessera.ledger.traffic import UP_BYTES
from tessera.storage import Root
from tessera.tracking import journal
from tessera.tracking.history import bills_of, read_histories, read_history
from tessera.tracking.lineage import Reading
from tessera.tracking.readings import Reader
from tessera.tracking.told import HOUR

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench, Writer


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the journals' segments that were read, from the small ones of this test."""
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 4000)
    paths: list[str] = []
    real: Callable[[Root, str], bytes] = Root.read_bytes

    def read_bytes(self: Root, path: str) -> bytes:
        if "/journal/" in path:
            paths.append(path)
        return real(self, path)

    monkeypatch.setattr(Root, "read_bytes", read_bytes)
    return paths


def facts(reading: Reading) -> object:
    return (
        reading.points,
        reading.at_end,
        reading.furthest,
        reading.history.lineage,
        [(item.attempt, item.records, item.ended_at) for item in reading.history.attempts],
    )


def test_a_beat_reads_the_segments_that_are_new(bench: Bench, fetched: list[str]) -> None:
    run = bench.create(steps=1000)
    writer = bench.launch(run)
    writer.steps(1, 100)
    writer.checkpoint(100)
    writer.steps(101, 160)
    writer.journal.flush()
    reader = Reader(bench.root)
    reader.read([run.id])
    assert len(set(fetched)) > 10
    for step in range(161, 200):  # no checkpoint: what is beyond the last one is not read again
        writer.steps(step, step)
        writer.journal.flush()
        fetched.clear()
        reader.read([run.id])
        assert len(set(fetched)) <= 2
    writer.checkpoint(199)
    fetched.clear()
    (reading,) = reader.read([run.id]).wanted
    assert min(fetched).rsplit("/", 1)[-1] > "000008.jsonl"  # of those within it before, none
    assert facts(reading) == facts(Reader(bench.root).read([run.id]).wanted[0])
    fetched.clear()
    reader.read([run.id])
    assert fetched == []
    writer.end("FINISHED", 199)
    reader.read([run.id])
    fetched.clear()
    assert facts(reader.read([run.id]).wanted[0]) == facts(Reader(bench.root).read().wanted[0])


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize("seed", range(6))
def test_a_reader_that_goes_on_sees_what_a_new_one_sees(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    run = bench.create(steps=1000)
    reader = Reader(bench.root)
    writers: list[tuple[Writer, int]] = [(bench.launch(run), 0)]
    for _ in range(40):
        place = chance.randrange(len(writers))
        writer, step = writers[place]
        further = step + chance.choice([1, 3, 30])
        writer.steps(step + 1, further)
        writers[place] = writer, further
        event = chance.choice(["", "", "checkpoint", "checkpoint", "twice", "more", "attempt"])
        if event == "checkpoint":
            writer.checkpoint(further)
        elif event == "twice":
            writer.evaluate(further, chance.random())
            writer.evaluate(further, chance.random())
            writer.steps(max(1, further - 3), further)
        elif event == "more":
            writer.journal.metric(UP_BYTES, 1e6 * chance.random(), further)
            writer.journal.metric(HOUR, chance.random(), further)
        elif event == "attempt" and len(writers) < 4:
            upto = read_history(run).upto or 0
            bench.clock.now += 5
            writers.append((bench.launch(run, instance=f"i-{len(writers) + 1}"), upto))
        writer.journal.flush()
        (reading,) = reader.read([run.id]).wanted
        assert facts(reading) == facts(Reader(bench.root).read([run.id]).wanted[0])


def test_a_segment_that_was_written_again_is_read_again(bench: Bench, fetched: list[str]) -> None:
    run = bench.create(steps=100)
    writer = bench.launch(run)
    writer.steps(1, 50)
    writer.checkpoint(50)
    reader = Reader(bench.root)
    reader.read([run.id])
    first = min(fetched)
    text = bench.root.read_bytes(first)
    assert b'"value":10.001,' in text
    bench.root.publish(first, text.replace(b'"value":10.001,', b'"value":10.0013,'))
    fetched.clear()
    (reading,) = reader.read([run.id]).wanted
    assert first in fetched
    assert facts(reading) == facts(Reader(bench.root).read([run.id]).wanted[0])


def test_of_others_only_what_the_bill_needs_is_read(bench: Bench, fetched: list[str]) -> None:
    for name in ("one", "two"):
        writer = bench.launch(bench.create(name), instance=f"i-{name}")
        writer.steps(1, 20)
        writer.end("FINISHED", 20)
    beside = bench.create("beside")
    sharing = bench.launch(beside, instance="i-ours")
    run = bench.create("ours")
    writer = bench.launch(run, instance="i-ours")
    sharing.steps(1, 10)
    writer.steps(1, 10)
    sharing.end("FINISHED", 10)
    writer.end("FINISHED", 10)
    readings = Reader(bench.root).read([run.id])
    assert {path.split("/")[1] for path in fetched} == {run.id, beside.id}
    (reading,) = readings.wanted
    whole = read_histories(bench.root)
    expected = bills_of(read_history(run), whole.bills)
    found = bills_of(reading.history, readings.histories.bills)
    assert [bill for _, bill in found] == [bill for _, bill in expected]
