"""Samples by number: which tokens they are, and what a step makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.numpy import load_file

from tessera.corpus.manifest import Manifest, ShardEntry, resolve
from tessera.corpus.shards import Shard
from tessera.errors import InputError
from tessera.experiment import Pretrain
from tessera.training.loader import OPEN_SHARDS, SampleLoader, ShardStore, evaluation_tokens
from tessera.training.order import WINDOW, SampleOrder
from tessera.training.pretrain import PretrainProgram

if TYPE_CHECKING:
    from tests.training.conftest import Bench

T = 32


@pytest.fixture
def manifest(bench: Bench) -> Manifest:
    return resolve(bench.root, "tiny")


def tokens_of(bench: Bench, manifest: Manifest, split: str) -> list[list[int]]:
    """Every shard of a split, read without our code."""
    folder = Path(bench.root.base)
    entries = manifest.splits[split].shards
    return [load_file(folder / entry.path)["tokens"].tolist() for entry in entries]


def test_samples_are_windows_of_shards_in_the_order(bench: Bench, manifest: Manifest) -> None:
    loader = SampleLoader(ShardStore(bench.root, manifest), T, 20260614, manifest.fingerprint)
    shards = tokens_of(bench, manifest, "train")
    assert len(shards) > WINDOW
    order = SampleOrder([(len(shard) - 1) // T for shard in shards], 20260614, manifest.fingerprint)
    inputs, targets = loader.batch(0, 2 * order.per_epoch)
    assert inputs.dtype == targets.dtype == torch.int64
    for number, (given, wanted) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        place = order[number]
        start = place.index * T
        assert given == shards[place.shard][start : start + T]
        assert wanted == shards[place.shard][start + 1 : start + T + 1]
    again, _ = loader.batch(17, 3)
    assert torch.equal(again, inputs[17:20])


def test_no_token_but_a_shards_tail_is_left_out(bench: Bench, manifest: Manifest) -> None:
    loader = SampleLoader(ShardStore(bench.root, manifest), T, 1, manifest.fingerprint)
    shards = tokens_of(bench, manifest, "train")
    inputs, _ = loader.batch(0, loader.order.per_epoch)
    seen = sorted(tuple(row) for row in inputs.tolist())
    expected = [
        tuple(shard[start : start + T]) for shard in shards for start in range(0, len(shard) - T, T)
    ]
    assert seen == sorted(expected)


def test_a_step_takes_the_samples_that_follow(bench: Bench, manifest: Manifest) -> None:
    settings = bench.settings("batch.micro_batch=2")
    assert isinstance(settings, Pretrain)
    device, dtype = torch.device("cpu"), torch.float32
    program = PretrainProgram(settings, bench.root, manifest, device, dtype)
    loader = SampleLoader(ShardStore(bench.root, manifest), T, settings.seed, manifest.fingerprint)
    for step in (0, 1, 29):
        batch = program.batch(step)
        inputs, targets = loader.batch(8 * step, 8)
        assert [len(part) for part, _ in batch.micro] == [2, 2, 2, 2]
        assert torch.equal(torch.cat([part for part, _ in batch.micro]), inputs)
        assert torch.equal(torch.cat([part for _, part in batch.micro]), targets)
        assert (batch.tokens, batch.targets) == (256, 256)

    run = bench.train("log_every_steps=1").run
    inputs, targets = loader.batch(0, 8)
    with torch.no_grad():
        shares = torch.log_softmax(program.model(inputs).double(), -1)
    by_hand = -float(shares.gather(-1, targets.unsqueeze(-1)).mean())
    assert bench.points(run)[1] == pytest.approx(by_hand, rel=1e-6)


def test_the_evaluation_reads_the_frozen_split(bench: Bench, manifest: Manifest) -> None:
    found = evaluation_tokens(ShardStore(bench.root, manifest))
    assert [tokens.tolist() for tokens in found] == tokens_of(bench, manifest, "eval")


def test_few_shards_are_open_and_each_is_checked_once(
    bench: Bench, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = ShardStore._open

    def open_shard(store: ShardStore, entry: ShardEntry) -> Shard:
        opened.append(entry.path)
        return plain(store, entry)

    monkeypatch.setattr(ShardStore, "_open", open_shard)
    loader = SampleLoader(ShardStore(bench.root, manifest), T, 1, manifest.fingerprint)
    loader.batch(0, loader.order.per_epoch)
    assert sorted(opened) == sorted(entry.path for entry in manifest.splits["train"].shards)
    assert OPEN_SHARDS >= 2 * WINDOW, "at the border of two windows both are open"


def test_shards_of_a_bucket_are_fetched_once_and_again_if_damaged(
    bench: Bench, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place = SampleLoader(ShardStore(bench.root, manifest), T, 1, manifest.fingerprint)
    expected, _ = in_place.batch(0, in_place.order.per_epoch)
    monkeypatch.setattr(type(bench.root), "local_path", lambda root, path: None)

    def read() -> torch.Tensor:
        store = ShardStore(bench.root, manifest)
        loader = SampleLoader(store, T, 1, manifest.fingerprint)
        return loader.batch(0, loader.order.per_epoch)[0]

    assert torch.equal(read(), expected)
    cached = sorted((bench.cache / "shards").iterdir())
    assert len(cached) == len(manifest.splits["train"].shards)
    times = [file.stat().st_mtime_ns for file in cached]
    data = bytearray(cached[0].read_bytes())
    data[len(data) // 2] ^= 1
    cached[0].write_bytes(data)
    assert torch.equal(read(), expected)
    assert [file.stat().st_mtime_ns for file in cached[1:]] == times[1:]


def test_what_is_not_there_is_named(bench: Bench, manifest: Manifest) -> None:
    store = ShardStore(bench.root, manifest)
    with pytest.raises(InputError, match="has no split 'test'; it has "):
        store.split("test")
    with pytest.raises(InputError, match="No training shard holds 100001 tokens"):
        SampleLoader(store, 100_000, 1, manifest.fingerprint)
