"""What is refused before it costs anything, and what earlier attempts leave behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tessera.errors import DamagedError, InputError, StoreError, SupersededError
from tessera.runs import FINISHED, Ending
from tessera.training.checkpoint import fetch, publish
from tessera.training.checkpoint.fetch import fetch_checkpoint
from tessera.training.checkpoint.publish import guard_publication
from tests.training.conftest import Bench


def test_a_cache_that_cannot_be_written_is_refused_before_the_attempt(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("TESSERA_CACHE", str(file / "below"))
    with pytest.raises(InputError, match=r"cannot be written .*; point TESSERA_CACHE at"):
        bench.train()
    assert bench.only_run().attempts() == []


def test_a_cut_off_shard_is_refused_before_the_run_is_recorded(bench: Bench) -> None:
    shard = next(bench.folder.glob("root/corpora/tiny/*/shards/train-00001*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(DamagedError, match=r"train-00001.*`tessera corpus verify corpora/tiny/"):
        bench.train()
    assert bench.runs() == []


def test_dollars_of_another_run_on_the_instance_are_not_counted_again(bench: Bench) -> None:
    """Both attempts say that the bill began an hour ago; the first one owns that hour."""
    place = bench.place()
    earlier = replace(place, billed_from=place.started_at - 3600, started_at=place.started_at - 1)
    bench.place = lambda: earlier  # type: ignore[method-assign]
    first = bench.train("price.usd_per_hour=1", "seed=1").run
    later = replace(earlier, started_at=place.started_at)
    bench.place = lambda: later  # type: ignore[method-assign]
    second = bench.train("price.usd_per_hour=1", "seed=2").run
    assert first.id != second.id
    dollars = [max(bench.points(run, "cost/usd").values()) for run in (first, second)]
    assert dollars[0] > 1.0
    assert dollars[1] < 0.1, "the hour before the first run was charged to the second as well"


def test_half_a_checkpoint_of_a_dead_attempt_goes_with_the_next_publication(bench: Bench) -> None:
    bench.crash(7)
    run = bench.only_run()
    (dead,) = run.attempts()
    half = run.path(f"checkpoints/step-6-{dead.id}", "__0_0.distcp")
    run.root.publish(half, b"half of it")
    later = run.path("checkpoints/step-6-9-deadbeef", "__0_0.distcp")
    run.root.publish(later, b"of an attempt that may be writing now")
    bench.train()
    assert not run.root.exists(half)
    assert run.root.exists(later)


def test_a_checkpoint_counts_even_if_tidying_up_after_it_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("the store went away")

    monkeypatch.setattr(publish, "tidy", fail)
    run = bench.train().run
    assert bench.checkpoints(run) == [25, 20, 15, 10, 5]
    assert bench.events(run, "checkpoint/failed") == []
    reasons = [event.value["reason"] for event in bench.events(run, "checkpoint/untidy")]
    assert reasons == ["the store went away"] * 5


def test_a_checkpoint_that_a_living_attempt_dropped_is_not_called_damaged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.crash(17)
    bench.forget_local()
    run = bench.only_run()
    check = fetch.check_record  # type: ignore[attr-defined]

    def dropped(record: Any, where: str) -> dict[str, Any]:
        if "/step-15-" in where:  # between listing and fetching, another attempt's retention ran
            run.root.delete_tree(where.split("/COMPLETE")[0])
        return check(record, where)

    monkeypatch.setattr(fetch, "check_record", dropped)
    loaded, notes = fetch_checkpoint(run)
    assert loaded is not None
    assert (loaded.ref.step, notes) == (10, [])


def test_an_outage_is_not_taken_for_damage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.crash(17)
    bench.forget_local()

    def away(*_: Any, **__: Any) -> None:
        raise StoreError("the store does not answer")

    monkeypatch.setattr("tessera.storage.Root.get_file", away)
    with pytest.raises(StoreError, match="does not answer"):
        fetch_checkpoint(bench.only_run())


def test_nothing_is_published_into_a_run_that_another_attempt_finished(bench: Bench) -> None:
    bench.crash(7)
    run = bench.only_run()
    (first,) = run.attempts()
    second = run.start_attempt(bench.place(), None)
    guard_publication(run, second)
    run.end_attempt(first, Ending(FINISHED, 0, 1.0, 30))
    with pytest.raises(SupersededError, match=rf"attempt {first.id} took over"):
        guard_publication(run, second)


def test_auto_precision_is_resolved_in_the_identity(bench: Bench) -> None:
    run = bench.train().run
    assert bench.settings().precision == "auto"
    assert run.record.identity["precision"] == "float32"  # there is no GPU here


def test_a_stop_of_a_named_run_says_how_to_continue_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train()

    def stop(loop: Any) -> None:
        loop._s.stop.signal = "SIGTERM"

    bench.before_step(8, stop, monkeypatch)
    result = bench.train(new=True)
    assert result.run.id.endswith("-2")
    assert f"`--run-id {result.run.id}` continues at step" in result.text
