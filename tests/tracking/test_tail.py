"""A journal that grows is read once, from its end, whichever copy is whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tessera.errors import DamagedError
from tessera.storage import Root
from tessera.tracking import journal
from tessera.tracking.records import segment_path
from tessera.tracking.tail import RunTail

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench, Writer


def points(writer: Writer, first: int, last: int) -> None:
    """Log points of six records each, all in the root."""
    for step in range(first, last + 1):
        writer.clock.now += 1
        for key in ("train/loss", "progress/tokens", "cost/usd", "train/lr", "train/mfu"):
            writer.journal.metric(key, 1000.0 * step, step)
        writer.journal.span("train", 1.0, step)
    writer.journal.flush()


def _noting(calls: list[str], method: str) -> Callable[[Root, str], Any]:
    real = getattr(Root, method)

    def call(self: Root, path: str) -> Any:
        calls.append(f"{method} {path}")
        return real(self, path)

    return call


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every request to the root, as ``method path``."""
    calls: list[str] = []
    for method in ("read_bytes", "files", "children", "size", "exists"):
        monkeypatch.setattr(Root, method, _noting(calls, method))
    return calls


def test_of_a_long_journal_only_the_end_is_read(
    bench: Bench, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 20_000)
    run = bench.create(steps=3000)
    writer = bench.launch(run)
    points(writer, 1, 2000)
    segments = bench.root.files(run.path("journal"))
    assert len(segments) > 50
    asked.clear()
    following = RunTail(run, 20)
    first = following.look()
    assert len([record for record in first.records if record.key == "train/loss"]) >= 20
    assert first.records[-1].step == 2000
    reads = [call for call in asked if call.startswith("read_bytes") and "/journal/" in call]
    assert 1 <= len(reads) <= 2
    asked.clear()
    assert following.look().records == ()
    assert sorted(call.split()[0] for call in asked) == ["children", "files", "size"]
    asked.clear()
    points(writer, 2001, 2001)
    fresh = following.look().records
    assert {record.step for record in fresh} == {2001}
    assert len([call for call in asked if call.startswith("read_bytes")]) == 1
    writer.kill()


def test_records_are_told_once_over_many_segments(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 3_000)
    run = bench.create(steps=500)
    writer = bench.launch(run)
    following = RunTail(run, 5)
    following.look()
    seen = []
    for first in range(1, 200, 7):
        points(writer, first, first + 6)
        seen += [record.seq for record in following.look().records]
    assert seen == list(range(1, writer.journal.written + 1))
    writer.kill()


def test_of_two_copies_the_whole_one_counts(bench: Bench) -> None:
    """The open segment has a twin in a store, and an upload may be damaged on its way."""
    run = bench.create()
    writer = bench.launch(run)
    points(writer, 1, 3)
    own = segment_path(run, writer.attempt.id, 0)
    twin = segment_path(run, writer.attempt.id, 0, twin=True)
    whole = bench.root.read_bytes(own)
    short = whole[: whole.rfind(b"\n", 0, -1) + 1]
    bench.root.publish(twin, short)
    following = RunTail(run, 20)
    assert following.look().records[-1].seq == 18
    points(writer, 4, 4)
    longer = bench.root.read_bytes(own)
    bench.root.publish(twin, longer)
    bench.root.publish(own, longer[:-30] + b"?" * 29 + b"\n" + b"x" * 40 + b"\n")
    assert [record.seq for record in following.look().records] == list(range(19, 25))
    bench.root.publish(twin, longer[:-200] + b"?" * 250 + b"\n")
    with pytest.raises(DamagedError, match="is damaged at line"):
        following.look()
    writer.journal.close(quiet=True)


def test_a_torn_last_line_is_waited_for(bench: Bench) -> None:
    run = bench.create()
    writer = bench.launch(run)
    points(writer, 1, 2)
    path = segment_path(run, writer.attempt.id, 0)
    data = bench.root.read_bytes(path)
    bench.root.publish(path, data[:-20])
    following = RunTail(run, 20)
    assert following.look().records[-1].seq == 11
    bench.root.publish(path, data)
    assert [record.seq for record in following.look().records] == [12]
    writer.kill()
