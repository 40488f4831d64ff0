"""Told to go: what is saved in which order, how fast the process leaves, what the next one says."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tessera.storage import Root
from tessera.tracking.records import read_journal
from tests.training.conftest import as_options, assert_as_if_undisturbed
from tests.training.disturb import Disturbance
from tests.training.gated_store import URL, GatedStore, serving

if TYPE_CHECKING:
    from tests.training.conftest import Bench, Finished, Launched, Whole

# One sequence at a time: eight micro-batches a step, and steps slow enough to be interrupted.
SLOW = ("batch.micro_batch=1", "checkpoint.every_steps=1000")


@pytest.fixture(scope="module")
def slow(undisturbed: Callable[..., Whole]) -> Whole:
    """The undisturbed run in micro-batches of one."""
    return undisturbed("batch.micro_batch=1")


@pytest.fixture
def store(bench: Bench) -> Iterator[GatedStore]:
    """Where the launched processes of ``bench`` have their root."""
    with serving() as store:
        store.fill(Path(bench.root.base))
        bench.environ = store.environ()
        bench.url = URL
        yield store


def look_into(bench: Bench, store: GatedStore) -> None:
    """From here on ``bench`` looks at what the store holds now."""
    folder = bench.folder / "copy"
    store.copy_to(folder)
    bench.root = Root(str(folder), attempts=1)


def spooled(bench: Bench, text: str) -> Callable[[], bool]:
    """Whether the journal on this machine says so."""
    return lambda: any(
        text.encode() in file.read_bytes() for file in bench.cache.glob("journal/**/*.jsonl")
    )


def local(bench: Bench) -> list[str]:
    """The whole checkpoints on this machine's disk."""
    return [file.parent.name for file in bench.cache.glob("checkpoints/*/*/step-*/COMPLETE")]


def told_to_go(process: Launched) -> tuple[Finished, float]:
    """SIGTERM; how it ended, and after how many seconds."""
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    done = process.end()
    return done, time.monotonic() - began


def step_of(done: Finished) -> int:
    """The step at which it says that it stopped."""
    match = re.search(r"Stopped by SIGTERM at step (\d+) of ", done.out)
    assert match, done
    return int(match[1])


def test_it_leaves_after_the_micro_step_and_not_after_the_step(bench: Bench) -> None:
    """A step of 8,192 micro-batches takes more than ten seconds on the fastest machine."""
    huge = ("batch.micro_batch=1", "batch.tokens_per_step=262144", "tokens=1048576")
    process = bench.start(*as_options(*huge))
    bench.until(process, spooled(bench, "attempt/started"))
    time.sleep(0.5)
    done, took = told_to_go(process)
    assert done.code == 75
    assert took < 5.0
    assert step_of(done) == 0
    assert "stopping after this micro-step and saving; once more leaves at once" in done.err
    ending = bench.last_ending(bench.only_run())
    assert (ending.outcome, ending.exit_code, ending.step) == ("PREEMPTED", 75, 0)
    assert local(bench) == [], "nothing was done, nothing is saved"


def test_first_the_journal_then_the_disk_then_the_root(
    bench: Bench, slow: Whole, store: GatedStore
) -> None:
    store.look = lambda: len(local(bench))
    process = bench.start(*as_options(*SLOW))
    bench.until(process, spooled(bench, "train/loss"))
    before = len(store.seen)
    done, _ = told_to_go(process)
    assert done.code == 75
    puts = [(r, seen) for r, seen in store.seen[before:] if r.startswith("PUT ")]
    kinds = [(request.split("/")[5], seen) for request, seen in puts]  # below runs/<run_id>
    assert kinds[0] == ("journal", 0), "before anything is on the disk"
    files = [place for place, (kind, _) in enumerate(kinds) if kind == "checkpoints"]
    assert len(files) > 2
    assert {kinds[place][1] for place in files} == {1}, "whole on the disk before the root"
    *_, records, complete, hint = [r.split("?")[0].split("/")[-1] for r, _ in puts][: files[-1] + 2]
    assert (records[-6:], complete, hint) == (".jsonl", "COMPLETE", "latest.json")
    assert kinds[-1][0] == "attempts", "last its ending"

    look_into(bench, store)
    run, step = bench.only_run(), step_of(done)
    assert bench.checkpoints(run) == [step]
    assert done.out.endswith(f"of 30; the same command continues at step {step}.\n")
    bench.train("batch.micro_batch=1")
    assert bench.resumed(run) == [None, step]
    assert_as_if_undisturbed(bench, slow)


def test_a_second_signal_leaves_at_once(bench: Bench, store: GatedStore) -> None:
    store.hold("PUT .*/checkpoints/")
    process = bench.start(*as_options(*SLOW, "preemption.grace_s=100"))
    bench.until(process, spooled(bench, "train/loss"))
    os.kill(process.pid, signal.SIGTERM)
    bench.until(process, lambda: store.waiting > 0)
    done, took = told_to_go(process)
    assert done.code == 75
    assert took < 5.0
    (kept,) = local(bench)
    assert kept.startswith("step-")


def test_a_store_that_hangs_takes_the_grace_period_and_no_more(
    bench: Bench, slow: Whole, store: GatedStore
) -> None:
    process = bench.start(*as_options(*SLOW, "preemption.grace_s=4"))
    bench.until(process, spooled(bench, "train/loss"))
    store.hold(".")
    told_at = time.time()
    done, took = told_to_go(process)
    assert done.code == 75
    assert 3.9 < took < 9.0
    (complete,) = bench.cache.glob("checkpoints/*/*/step-*/COMPLETE")
    assert complete.stat().st_mtime - told_at < 2.5, "the disk does not wait for the store"
    assert "the grace period is over: leaving now" in done.err
    (kept,) = local(bench)
    step = int(kept.split("-")[1])

    store.release()
    again = bench.start(*as_options("batch.micro_batch=1")).end()
    assert again.code == 0, again.err
    look_into(bench, store)
    run = bench.only_run()
    first, _second = run.attempts()
    assert bench.resumed(run) == [None, step]
    assert list(run.endings()) == [_second.id], "the first could not say how it ended"
    (event,) = bench.events(run, "attempt/resumed")
    assert (event.value["local"], event.value["adopted"]) == (True, [first.id])
    assert event.value["lost_steps"] == 0
    assert_as_if_undisturbed(bench, slow)


def test_no_grace_leaves_at_once_and_costs_what_was_not_saved(bench: Bench, slow: Whole) -> None:
    process = bench.start(*as_options(*SLOW, "preemption.grace_s=0"))
    bench.until(process, spooled(bench, "train/loss"))
    done, took = told_to_go(process)
    assert done.code == 75
    assert took < 3.0
    assert bench.only_run().endings() == {}
    assert bench.train("batch.micro_batch=1").exit_code == 0
    (event,) = bench.events(bench.only_run(), "attempt/resumed")
    assert event.value["lost_steps"] >= 3
    assert_as_if_undisturbed(bench, slow)


def test_a_signal_before_the_attempt_is_recorded_leaves_nothing(bench: Bench) -> None:
    """Preparing takes as long as this pipe takes to become the corpus's tokenizer."""
    (tokenizer,) = Path(bench.root.base).glob("corpora/tiny/*/tokenizer.json")
    tokenizer.unlink()
    os.mkfifo(tokenizer)

    process = bench.start()
    writer: list[int] = []

    def reader_waits() -> bool:
        with suppress(OSError):  # ENXIO: nobody reads yet
            writer.append(os.open(tokenizer, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writer)

    bench.until(process, reader_waits)
    done, took = told_to_go(process)
    os.close(writer[0])
    assert done.code == 75
    assert took < 3.0
    assert done.err == (
        "Error: Stopped by SIGTERM before the training began; nothing is lost, and the same "
        "command starts it.\n"
    )
    assert done.out == ""
    assert bench.runs() == []


def test_an_upload_that_does_not_fit_is_not_begun(
    bench: Bench, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = type(bench.root).put_file
    uploaded: list[str] = []

    def put_file(root: Any, file: Path, path: str, **options: Any) -> None:
        uploaded.append(path)
        time.sleep(0.15)  # nine files: more than the second that is left
        plain(root, file, path, **options)

    monkeypatch.setattr(type(bench.root), "put_file", put_file)
    result = bench.stop_before(8, "preemption.grace_s=1")
    assert result.text == (
        "Stopped by SIGTERM at step 8 of 30; the same command continues at step 8 on this "
        "machine, earlier on another."
    )
    run = bench.only_run()
    assert {path.split("/")[3].split("-")[1] for path in uploaded} == {"5"}
    (event,) = bench.events(run, "checkpoint/stays_local")
    assert event.step == 8
    assert bench.checkpoints(run) == [5]
    bench.train()
    assert bench.resumed(run) == [None, 8]
    assert_as_if_undisturbed(bench, whole)


def test_what_a_kill_cost_is_said_in_steps_and_dollars(
    bench: Bench, whole: Whole, capfd: pytest.CaptureFixture[str]
) -> None:
    died = bench.start(disturb=Disturbance(die_before=15, keep_up=True)).end()
    assert died.code == -signal.SIGKILL
    done = bench.command(capfd)
    assert done.code == 0
    run = bench.only_run()
    first, _ = run.attempts()
    records = list(read_journal(run, first.id))
    # Log points at 12 and, filed then, all that was done since the checkpoint of step 10.
    spans = [record for record in records if record.kind == "span"]
    seconds = sum(span.number for span in spans if span.step > 10)
    seconds += max(record.time for record in records) - spans[-1].time
    (event,) = bench.events(run, "attempt/resumed")
    assert event.value["lost_attempt"] == first.id
    assert event.value["lost_steps"] == 2, "what is known of: the last log point was at step 12"
    assert event.value["lost_s"] == pytest.approx(seconds, abs=1e-6)
    assert event.value["lost_usd"] == pytest.approx(seconds / 3600, abs=1e-9)
    assert re.search(
        rf"attempt {first.id} had done 2 steps more, which are done again: \d+ s of its time "
        r"\(\$\d\S*\) lost",
        done.err,
    )
    assert bench.resumed(run) == [None, 10]
    assert_as_if_undisturbed(bench, whole)
