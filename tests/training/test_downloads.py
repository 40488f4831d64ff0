"""What an attempt fetches from a remote root is on its bill."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tessera.corpus.manifest import resolve
from tessera.storage import Root
from tessera.tracking.history import read_history
from tessera.tracking.queries import summarise_run
from tests.training.conftest import Bench


def test_bytes_are_counted_once_and_only_from_afar(tmp_path: Path) -> None:
    far, near = Root(f"memory://{secrets.token_hex(8)}"), Root(str(tmp_path / "near"))
    for root, expected in ((far, 1000 + 1000), (near, 0)):
        root.publish("a/b", b"x" * 1000)
        root.read_bytes("a/b")
        root.get_file("a/b", tmp_path / "copy")
        assert root.take_received() == expected
        assert root.take_received() == 0


def test_shards_and_checkpoints_that_are_fetched_are_paid_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = Root(f"memory://{secrets.token_hex(8)}")
    for path in bench.root.files("corpora"):
        far.publish(path, bench.root.read_bytes(path))
    bench.root = far
    monkeypatch.setenv("TESSERA_USD_PER_GB_UP", "1")
    monkeypatch.setenv("TESSERA_USD_PER_GB_DOWN", "2000")
    splits = resolve(far, "tiny").splits.values()
    shards = sum(entry.bytes for split in splits for entry in split.shards)
    bench.stop_before(12)
    run = bench.only_run()
    saved = run.furthest()
    assert saved is not None
    checkpoint = sum(far.size(path) for path in far.files(run.path(saved.folder)))
    bench.forget_local()
    assert bench.train().exit_code == 0

    history = read_history(run)
    first, second = history.attempts
    assert (first.attempt.usd_per_gb_down, second.attempt.usd_per_gb_down) == (2000.0, 2000.0)
    records = 100_000  # the manifest, the tokenizer, the records of the run
    assert shards <= first.traffic_down_bytes < shards + records
    assert 0 <= second.traffic_down_bytes - shards - checkpoint < records
    found = summarise_run(far, run)
    down = first.traffic_down_bytes + second.traffic_down_bytes
    assert found.traffic_down_bytes == down
    assert found.traffic_usd == pytest.approx(found.traffic_bytes / 1e9 + 2000 * down / 1e9)
    usd = [point.number for point in history.points if point.key == "cost/usd"]
    assert found.cost_usd is not None
    assert 2000 * down / 1e9 < usd[-1] <= found.cost_usd
