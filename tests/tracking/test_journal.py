from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import DamagedError, StoreError
from tessera.runs import Run, RunRecord
from tessera.storage import Root
from tessera.tracking import journal as module
from tessera.tracking import records
from tessera.tracking.journal import Journal, adopt
from tessera.tracking.records import Point, Record, last_record_time, quick, read_journal

NEVER = 3600.0
"""Seconds between uploads where a test wants none but its own."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "root")


def make_run(folder: Path) -> Run:
    record = RunRecord(
        run_id="r", name="r", kind="pretrain", created_at=0.0, experiment={}, identity={},
        fingerprint="f", data={}, commit=None,
    )  # fmt: skip
    return Run(Root(str(folder), attempts=1), record)


def spooled(cache: Path) -> list[str]:
    """Names of the files that attempts left on this machine."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def values(run: Run, attempt: str = "1-aa") -> list[Any]:
    return [record.value for record in read_journal(run, attempt)]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def break_root(run: Run) -> Callable[[], None]:
    """Make a local root fail with a real error (a file lies where a folder should); undo it."""
    blocked = Path(run.root.base) / "runs" / "r" / "journal"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way")
    return blocked.unlink


# -- records ---------------------------------------------------------------------------------------


def test_records_of_every_kind_come_back_in_order(run: Run) -> None:
    before = time.time()
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.param("optimizer.lr", "0.001")
    journal.tag("host", "箱", step=1)
    journal.metric("train/loss", 3.25, 1)
    journal.span("train", 0.5, 1)
    journal.event("checkpoint/published", 1, seconds=0.25, files=["a", "b"])
    journal.close()
    records = list(read_journal(run, "1-aa"))
    assert [(r.kind, r.key, r.value, r.step) for r in records] == [
        ("param", "optimizer.lr", "0.001", 0),
        ("tag", "host", "箱", 1),
        ("metric", "train/loss", 3.25, 1),
        ("span", "train", 0.5, 1),
        ("event", "checkpoint/published", {"seconds": 0.25, "files": ["a", "b"]}, 1),
    ]
    assert [record.seq for record in records] == [1, 2, 3, 4, 5]
    assert {record.attempt for record in records} == {"1-aa"}
    assert all(before - 0.001 <= record.time <= time.time() + 0.001 for record in records)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e300, 5e-324, 1 / 3])
@pytest.mark.parametrize("kind", ["metric", "span"])
def test_every_number_comes_back(run: Run, kind: str, value: float) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    if kind == "metric":
        journal.metric("train/loss", value, 1)
    else:
        journal.span("train", value, 1)
    journal.close()
    (record,) = read_journal(run, "1-aa")
    assert record.number == value or (math.isnan(value) and math.isnan(record.number))


@given(st.floats())
def test_a_line_is_json_for_any_reader(value: float) -> None:
    spelled = module._spell(value)
    again = json.loads(json.dumps(spelled, allow_nan=False))
    number = Record("metric", "k", again, 1, 0.0, "1-aa", 1).number
    assert number == value or (math.isnan(value) and math.isnan(number))


class _Odd:
    def __repr__(self) -> str:
        raise RuntimeError("not even a name")


def _circle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        (Path("/a"), "PosixPath('/a')"),
        (_Odd(), "<_Odd>"),
        (math.nan, "NaN"),
        ([1.5, -math.inf, None, True], [1.5, "-Infinity", None, True]),
        ({"inner": {1}, (1, 2): math.inf}, {"inner": "{1}", "(1, 2)": "Infinity"}),
        (b"\xff", "b'\\xff'"),
        ("\ud800", "\ud800"),
    ],
    ids=["path", "odd", "nan", "list", "dict", "bytes", "surrogate"],
)  # fmt: skip
def test_a_detail_that_is_not_json_is_told_as_well_as_it_can_be(
    run: Run, detail: object, expected: object
) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.event("odd", 1, detail=detail, plain=3)
    journal.event("after", 1)
    journal.close()
    odd, after = read_journal(run, "1-aa")
    assert odd.value == {"detail": expected, "plain": 3}
    assert after.key == "after"


def test_a_detail_without_an_end_does_not_raise(run: Run) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.event("circle", 1, detail=_circle())
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    journal.event("deep", 1, detail=deep)
    journal.close()
    assert [record.key for record in read_journal(run, "1-aa")] == ["circle", "deep"]
    while deep:  # freed one by one: all at once would be as deep
        deep = deep.pop()


# -- segments and uploads --------------------------------------------------------------------------


def test_segments_are_closed_by_size_and_read_as_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1000)
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    for step in range(1, 101):
        journal.metric("train/loss", step, step)
        if step == 50:
            journal.flush()
    journal.close()
    names = run.root.files(run.path("journal", "1-aa"))
    assert len(names) > 5
    assert all(1000 <= len(run.root.read_bytes(name)) < 1200 for name in names[:-1])
    records = list(read_journal(run, "1-aa"))
    assert [record.step for record in records] == list(range(1, 101))
    assert [record.seq for record in records] == list(range(1, 101))
    assert spooled(cache) == []


def test_flush_puts_everything_so_far_into_the_root(run: Run) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    for count in range(1, 6):
        journal.metric("train/loss", count, count)
        assert values(run) == list(range(1, count))
        journal.flush()
        assert values(run) == list(range(1, count + 1))
    journal.close()


def test_a_flush_without_news_writes_nothing(run: Run) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.metric("train/loss", 1, 1)
    journal.flush()
    break_root_by_removal = Path(run.root.base) / "runs"
    before = [p.stat().st_mtime_ns for p in break_root_by_removal.rglob("*.jsonl")]
    journal.flush()
    assert [p.stat().st_mtime_ns for p in break_root_by_removal.rglob("*.jsonl")] == before
    journal.close()


def test_the_heartbeat_uploads_by_itself(run: Run) -> None:
    journal = Journal(run, "1-aa", upload_every_s=0.02)
    journal.metric("train/loss", 1.0, 1)
    wait_for(lambda: values(run)[:1] == [1.0])

    def beats() -> list[Record]:
        return [r for r in read_journal(run, "1-aa") if r.key == "heartbeat"]

    wait_for(lambda: len(beats()) >= 2)
    first, second, *_ = beats()
    assert (first.kind, first.step) == ("event", -1)
    last = last_record_time(run, "1-aa")
    assert last is not None
    assert last >= second.time > first.time
    journal.close()


def test_a_busy_journal_needs_no_heartbeat_of_its_own(run: Run) -> None:
    journal = Journal(run, "1-aa", upload_every_s=0.4)
    until = time.monotonic() + 1.0
    step = 0
    while time.monotonic() < until:
        step += 1
        journal.metric("train/loss", step, step)
        time.sleep(0.001)
    journal.close()
    records = list(read_journal(run, "1-aa"))
    assert [r.step for r in records if r.kind == "metric"] == list(range(1, step + 1))
    gaps = [b.time - a.time for a, b in pairwise(records)]
    if max(gaps) < 0.2:  # a machine that stood still for long may have beaten meanwhile
        assert all(record.kind == "metric" for record in records)


def test_a_root_that_fails_costs_the_loop_nothing_and_loses_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1000)
    repair = break_root(run)
    journal = Journal(run, "1-aa", upload_every_s=0.02)
    for step in range(1, 51):
        journal.metric("train/loss", step, step)
    wait_for(lambda: journal.last_error is not None)
    assert "journal" in str(journal.last_error)
    with pytest.raises(StoreError):  # a checkpoint must not become complete without its records
        journal.flush()
    journal.metric("train/loss", 51, 51)
    repair()
    wait_for(lambda: journal.last_error is None)
    journal.flush()
    journal.close()
    metrics = [r.value for r in read_journal(run, "1-aa") if r.kind == "metric"]
    assert metrics == list(range(1, 52))


def test_closing_on_a_root_that_fails_keeps_the_records_for_the_next_attempt(
    run: Run, cache: Path
) -> None:
    repair = break_root(run)
    loud, quiet = (Journal(run, name, upload_every_s=NEVER) for name in ("1-aa", "2-bb"))
    for journal in (loud, quiet):
        journal.metric("train/loss", 1.0, 1)
    with pytest.raises(StoreError):
        loud.close()
    quiet.close(quiet=True)
    repair()
    assert adopt(run) == ["1-aa", "2-bb"]
    assert values(run, "1-aa") == values(run, "2-bb") == [1.0]
    assert spooled(cache) == []


def test_a_record_after_the_end_does_not_raise(run: Run) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.metric("train/loss", 1.0, 1)
    journal.close()
    journal.metric("train/loss", 2.0, 2)
    assert values(run) == [1.0]
    journal.close()
    assert values(run) == [1.0, 2.0]


def test_a_machine_without_a_disk_keeps_the_records_in_memory(run: Run, cache: Path) -> None:
    cache.write_text("a file where the cache should be")
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    assert "local journal cannot be written" in str(journal.last_error)
    journal.metric("train/loss", 1.0, 1)
    journal.close()
    assert values(run) == [1.0]


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(run: Run, cache: Path) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.metric("train/loss", 1.0, 1)
    (file,) = cache.rglob("*.jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
    try:
        for step in (2, 3, 4):
            journal.metric("train/loss", step, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "local journal cannot be written" in str(journal.last_error)
    journal.metric("train/loss", 5.0, 5)
    journal.close()
    assert values(run) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_four_threads_lose_and_repeat_no_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 5000)
    journal = Journal(run, "1-aa", upload_every_s=0.005)

    def work(name: str) -> None:
        for step in range(500):
            journal.metric(name, step, step)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    records = list(read_journal(run, "1-aa"))
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    for name in ("t0", "t1", "t2", "t3"):
        assert [r.step for r in records if r.key == name] == list(range(500))


def test_what_an_append_costs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    started = time.perf_counter()
    for step in range(5000):
        journal.metric("train/loss", 3.0, step)
    cost = (time.perf_counter() - started) / 5000
    journal.close()
    assert len(values(run)) == 5000
    with capsys.disabled():
        print(f"\n  one append to the journal: {1e6 * cost:.1f} microseconds")


# -- killed ----------------------------------------------------------------------------------------

_WRITE_FOR_EVER = """
import sys, itertools
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_journal import make_run
from tessera.tracking import journal as module
from tessera.tracking import records
module.SEGMENT_BYTES = 20_000
journal = module.Journal(make_run(Path(sys.argv[1])), "1-aa", upload_every_s=3600.0)
for step in itertools.count(1):
    journal.metric("train/loss", step, step)
    if step == 300:
        journal.flush()
    if step % 50 == 0:
        print(step, flush=True)
"""


def start_writer(run: Run) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITE_FOR_EVER, run.root.base, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], step: int) -> int:
    assert process.stdout is not None
    last = 0
    while last < step:
        last = int(process.stdout.readline())
    return last


def test_after_a_kill_everything_written_is_adopted(run: Run, cache: Path) -> None:
    process = start_writer(run)
    read_until(process, 3000)
    process.kill()
    rest, _ = process.communicate()
    told = int((rest.split() or ["3000"])[-1]) if rest.endswith("\n") else 3000
    assert 300 <= len(values(run)) < 3000
    assert adopt(run) == ["1-aa"]
    steps = [record.step for record in read_journal(run, "1-aa")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= told >= 3000
    assert spooled(cache) == []
    assert adopt(run) == []


def test_a_live_journal_is_not_adopted(run: Run, cache: Path) -> None:
    process = start_writer(run)
    try:
        read_until(process, 1000)
        assert adopt(run) == []
        assert "000000.jsonl" in spooled(cache)
        read_until(process, 2000)
    finally:
        process.kill()
        process.communicate()
    assert adopt(run) == ["1-aa"]
    assert len(values(run)) >= 2000
    mine = Journal(run, "2-bb", upload_every_s=NEVER)  # alive in this very process
    mine.metric("train/loss", 1.0, 1)
    assert adopt(run) == []
    mine.close()


def leave_spool(run: Run, *segments: bytes, attempt: str = "1-aa") -> Path:
    """What a killed attempt leaves on the machine."""
    spool = module._spool_folder(run.root, run.id) / attempt
    spool.mkdir(parents=True)
    (spool / "lock").touch()
    for number, data in enumerate(segments):
        (spool / f"{number:06d}.jsonl").write_bytes(data)
    return spool


def line(seq: int, time_: float = 100.0) -> bytes:
    fields = {"kind": "metric", "key": "k", "value": seq, "step": seq, "time": time_}
    return json.dumps({**fields, "attempt": "1-aa", "seq": seq}).encode() + b"\n"


def test_a_torn_last_line_is_left_out_by_adopt(run: Run) -> None:
    leave_spool(run, line(1) + line(2) + line(3)[:-5])
    assert adopt(run) == ["1-aa"]
    path = run.path("journal", "1-aa", "000000.jsonl")
    assert run.root.read_bytes(path) == line(1) + line(2)
    assert values(run) == [1, 2]


def test_a_root_that_is_away_at_the_end_gets_everything_when_it_is_back(
    run: Run, cache: Path
) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.metric("train/loss", 1.0, 1)
    journal.flush()
    base = Path(run.root.base)
    away = base.rename(base.with_name("away"))
    journal.metric("train/loss", 2.0, 2)
    assert not journal.flush_within(60)
    assert "is gone" in str(journal.last_error)
    journal.close(quiet=True)
    assert not base.exists()
    assert spooled(cache) == ["000000.jsonl", "lock"]
    away.rename(base)
    assert values(run) == [1.0]
    assert adopt(run) == ["1-aa"]
    assert values(run) == [1.0, 2.0]
    assert spooled(cache) == []


def test_a_root_that_is_back_in_time_gets_everything_from_the_attempt_itself(run: Run) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.metric("train/loss", 1.0, 1)
    journal.flush()
    base = Path(run.root.base)
    away = base.rename(base.with_name("away"))
    journal.metric("train/loss", 2.0, 2)
    with pytest.raises(StoreError, match="is gone"):
        journal.flush()
    away.rename(base)
    journal.close()
    assert values(run) == [1.0, 2.0]


def test_adopt_does_not_shorten_what_the_root_has(run: Run) -> None:
    path = run.path("journal", "1-aa", "000000.jsonl")
    run.root.publish(path, line(1) + line(2) + line(3))
    leave_spool(run, line(1) + line(2), line(4))
    assert adopt(run) == ["1-aa"]
    assert values(run) == [1, 2, 3, 4]


def test_adopt_waits_for_a_root_that_fails(run: Run) -> None:
    spool = leave_spool(run, line(1))
    repair = break_root(run)
    with pytest.raises(StoreError):
        adopt(run)
    assert (spool / "000000.jsonl").exists()
    repair()
    assert adopt(run) == ["1-aa"]
    assert values(run) == [1]


@pytest.mark.parametrize(("mine", "other"), [("a/b", "a_b"), ("root", "root2")])
def test_a_run_of_another_root_is_not_adopted(tmp_path: Path, mine: str, other: str) -> None:
    leave_spool(make_run(tmp_path / other), line(1))
    assert adopt(make_run(tmp_path / mine)) == []
    assert adopt(make_run(tmp_path / other)) == ["1-aa"]


# -- reading ---------------------------------------------------------------------------------------


def put(run: Run, *segments: bytes) -> None:
    for number, data in enumerate(segments):
        run.root.publish(run.path("journal", "1-aa", f"{number:06d}.jsonl"), data)


def test_a_torn_last_line_is_left_out(run: Run) -> None:
    for cut in range(1, len(line(2))):
        put(run, line(1) + line(2)[:-1][:-cut])
        assert values(run) == [1], cut


_CHANGES: list[dict[str, object]] = [
    {"step": None}, {"time": "z"}, {"kind": "mystery"}, {"value": None},
    {"value": "much"}, {"value": [1]}, {"seq": []}, {"colour": "blue"},
]  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        b'{"kind": "met\n', b"[]\n", b'{"kind": "metric"}\n', b"\xff\n", *(
            json.dumps(
                {"kind": "metric", "key": "k", "value": 1.0, "step": 3, "time": 1.0,
                 "attempt": "1-aa", "seq": 3} | change
            ).encode() + b"\n"
            for change in _CHANGES
        ),
    ],
)  # fmt: skip
def test_a_damaged_line_is_a_sentence(run: Run, damage: bytes) -> None:
    put(run, line(1), line(2) + damage + line(3))
    with pytest.raises(StoreError) as error:
        values(run)
    text = str(error.value)
    assert "journal/1-aa/000001.jsonl" in text
    assert "line 2" in text
    assert text.endswith(".")
    assert "\n" not in text


def test_a_record_that_is_there_twice_counts_once(run: Run) -> None:
    put(run, line(1) + line(2), line(2) + line(3))
    assert values(run) == [1, 2, 3]


def test_only_the_last_segment_may_be_torn(run: Run) -> None:
    put(run, line(1) + line(2)[:-5], line(3))
    with pytest.raises(DamagedError, match=r"000000\.jsonl in .* is damaged at line 2"):
        values(run)


@pytest.mark.parametrize(
    ("segments", "named"),
    [
        ((line(1) + line(3),), "000000"),
        ((line(1), line(3)), "000001"),
        ((line(2),), "000000"),
        ((line(1) + line(2), line(3) + line(5), line(6)), "000001"),
    ],
)
def test_a_missing_record_is_damage(run: Run, segments: tuple[bytes, ...], named: str) -> None:
    put(run, *segments)
    with pytest.raises(DamagedError, match=rf"{named}\.jsonl in .* only \d are there.*\.$"):
        values(run)


# -- twins: a store that takes damaged bytes -------------------------------------------------------


@pytest.fixture
def far(run: Run) -> Run:
    """A run whose root is no folder of this machine, as far as the journal knows."""
    run.root.is_local = False
    return run


def files(run: Run) -> list[str]:
    return [Path(path).name for path in run.root.files(run.path("journal", "1-aa"))]


def sizes(run: Run) -> list[int]:
    return [len(run.root.read_bytes(run.path("journal", "1-aa", name))) for name in files(run)]


def test_the_open_segment_has_two_copies_written_in_turn_and_ends_as_one(far: Run) -> None:
    journal = Journal(far, "1-aa", upload_every_s=NEVER)
    newest = []
    for step in (1, 2, 3, 4):
        journal.metric("train/loss", step, step)
        journal.flush()
        assert files(far) == ["000000.jsonl", "000000.twin.jsonl"]
        own, twin = sizes(far)
        newest.append("both" if own == twin else "own" if own > twin else "twin")
        assert values(far) == list(range(1, step + 1))
        assert last_record_time(far, "1-aa") == list(read_journal(far, "1-aa"))[-1].time
    assert newest == ["both", "own", "twin", "own"]
    journal.close()
    assert files(far) == ["000000.jsonl"]
    assert values(far) == [1, 2, 3, 4]


def test_a_full_segment_has_no_twin(far: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 500)
    journal = Journal(far, "1-aa", upload_every_s=NEVER)
    for step in range(1, 31):
        journal.metric("train/loss", step, step)
        journal.flush()
        assert values(far) == list(range(1, step + 1))
        twins = [name for name in files(far) if "twin" in name]
        assert twins in ([], [f"{journal._segment:06d}.twin.jsonl"])
    assert journal._segment > 3
    journal.close()
    assert not any("twin" in name for name in files(far))


@pytest.mark.parametrize("flushes", range(5))
@pytest.mark.parametrize("how", ["flush", "close", "rollover"])
@pytest.mark.parametrize("nth", [1, 2])
def test_killed_while_a_damaged_upload_lies_there_loses_nothing_that_was_flushed(
    far: Run, monkeypatch: pytest.MonkeyPatch, flushes: int, how: str, nth: int
) -> None:
    """The store took bytes that changed on their way, and nobody lived to see its answer."""
    journal = Journal(far, "1-aa", upload_every_s=NEVER)
    for step in range(1, flushes + 1):
        journal.metric("train/loss", step, step)
        journal.flush()
    if how == "rollover":
        monkeypatch.setattr(module, "SEGMENT_BYTES", 1)
    journal.metric("train/loss", flushes + 1, flushes + 1)
    plain, uploads = far.root.publish, 0

    def damaged(path: str, data: bytes) -> None:
        nonlocal uploads
        uploads += 1
        if uploads == nth:  # the last line too is no record any more
            plain(path, data.replace(b'"seq":', b'"seq";'))
            raise KeyboardInterrupt
        plain(path, data)

    monkeypatch.setattr(far.root, "publish", damaged)
    with suppress(KeyboardInterrupt):
        journal.close() if how == "close" else journal.flush()
    monkeypatch.setattr(far.root, "publish", plain)
    found = values(far)
    assert found[:flushes] == list(range(1, flushes + 1))
    assert len(found) <= flushes + 1
    journal._lock_file.close()  # type: ignore[union-attr]  # what a death does
    if uploads >= nth:
        assert adopt(far) == ["1-aa"]
    assert values(far) == list(range(1, flushes + 2))


@pytest.mark.parametrize("read", [values, lambda run: [last_record_time(run, "1-aa")]])
def test_a_segment_that_is_closed_while_it_is_read_is_read(
    far: Run, monkeypatch: pytest.MonkeyPatch, read: Callable[[Run], list[Any]]
) -> None:
    """Between the listing and the reading the twin goes and the segment grows."""
    journal = Journal(far, "1-aa", upload_every_s=NEVER)
    for step in (1, 2):
        journal.metric("train/loss", step, step)
        journal.flush()
    journal.metric("train/loss", 3, 3)
    plain = far.root.files

    def closed_after(prefix: str) -> list[str]:
        listed = plain(prefix)
        journal.close()
        return listed

    monkeypatch.setattr(far.root, "files", closed_after)
    found = read(far)
    monkeypatch.setattr(far.root, "files", plain)
    assert found == read(far)


def test_two_damaged_twins_are_damage(far: Run) -> None:
    put(far, line(1) + b"{\n" + line(2))
    far.root.publish(far.path("journal", "1-aa", "000000.twin.jsonl"), b"{\n")
    with pytest.raises(DamagedError, match=r"000000\.jsonl in .* is damaged at line 2"):
        values(far)


def test_damage_of_equal_length_is_mended_by_who_has_it_right(far: Run) -> None:
    journal = Journal(far, "1-aa", upload_every_s=NEVER)
    journal.metric("train/loss", 1.0, 1)
    journal.flush()
    path = far.path("journal", "1-aa", "000000.jsonl")
    far.root.publish(path, far.root.read_bytes(path).replace(b":", b";", 1))
    journal._lock_file.close()  # type: ignore[union-attr]
    assert adopt(far) == ["1-aa"]
    assert values(far) == [1.0]


def test_a_journal_counts_what_it_wrote(run: Run) -> None:
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    assert journal.written == 0
    for step in (1, 2, 3):
        journal.metric("train/loss", step, step)
    journal.close()
    assert journal.written == len(values(run)) == 3


def test_what_is_spooled_has_no_gap_after_a_disk_was_full(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 1000)
    repair = break_root(run)
    journal = Journal(run, "1-aa", upload_every_s=NEVER)
    journal.metric("train/loss", 1.0, 1)
    journal._drop_spool_file()  # what a failing write does
    for step in range(2, 51):
        journal.metric("train/loss", step, step)
    journal.close(quiet=True)
    repair()
    assert adopt(run) == ["1-aa"]
    assert values(run) == [1.0]


def test_segments_are_read_in_order_of_number(run: Run) -> None:
    put(run, *(line(number) for number in range(1, 13)))
    assert values(run) == list(range(1, 13))


def test_another_attempt_is_another_journal(run: Run) -> None:
    put(run, line(1))
    run.root.publish(run.path("journal", "1-aab", "000000.jsonl"), line(1) + line(2))
    assert values(run) == [1]
    assert values(run, "1-aab") == [1, 2]
    assert values(run, "9-none") == []


def test_the_time_of_the_last_record(run: Run) -> None:
    assert last_record_time(run, "1-aa") is None
    put(run, line(1, 100.0) + line(2, 200.5))
    assert last_record_time(run, "1-aa") == 200.5
    put(run, line(1, 100.0) + line(2, 200.5)[:-3])
    assert last_record_time(run, "1-aa") == 100.0
    put(run, line(1, 100.0), line(2, 300.0)[:-3])  # nothing whole in the last segment
    assert last_record_time(run, "1-aa") == 100.0


@pytest.mark.parametrize(
    "change",
    [
        {}, {"value": "NaN"}, {"value": "-Infinity"}, {"value": -3}, {"value": 1e-300},
        {"kind": "span", "key": "train", "value": 0.25}, {"kind": "span", "value": "Infinity"},
        {"key": "naïve/\\"}, {"step": -1}, {"kind": "event", "value": {"a": 1}}, {"kind": "tag",
        "value": "x"}, {"time": 5}, {"value": 10**30},
    ],
)  # fmt: skip
def test_the_quick_reader_reads_what_the_strict_one_does(change: dict[str, Any]) -> None:
    line = {"kind": "metric", "key": "train/loss", "value": 2.5, "step": 3, "time": 1.7e9 + 0.25}
    line |= {"attempt": "1-ab", "seq": 41} | change
    data = json.dumps(line, separators=(",", ":")).encode()
    found, strict = quick(data), records._record(data)
    if isinstance(found, Point):
        assert strict.kind == "metric"
        assert repr(found) == repr(
            Point(strict.key, strict.number, strict.step, strict.time, strict.seq)
        )
    else:
        assert found == strict


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{}", b'{"kind":"metric"', b"nonsense",
        b'{"kind":"metric","key":"a","value":1,"step":1,"time":1,"attempt":"1-a","seq":1}x',
        b'{"kind":"metric","key":"a","value":"NotANumber","step":1,"time":1,"attempt":"a","seq":1}',
    ],
)  # fmt: skip
def test_the_quick_reader_refuses_what_is_no_record(line: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        quick(line)
