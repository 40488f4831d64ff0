"""Samples by number: which tokens they are, what a step makes of them, and what is fetched when."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tessera.corpus.manifest import Manifest, ShardEntry, SplitEntry, resolve
from tessera.corpus.shards import write_shard
from tessera.errors import DamagedError, InputError, StoreError
from tessera.experiment import Pretrain
from tessera.storage import Root, cache_folder, sha256_file
from tessera.training import cache as cache_module
from tessera.training.loader import SampleLoader, ShardStore, evaluation_tokens
from tessera.training.order import WINDOW, SampleOrder
from tessera.training.parallel import World
from tessera.training.pretrain import PretrainProgram

if TYPE_CHECKING:
    from tests.training.conftest import Bench

T = 32
SAMPLES = 20  # of each shard of a made corpus


def bytes_below(folder: Path) -> int:
    """Bytes of the shards in a folder where other threads come and go."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in (name for name in files if ".safetensors" in name):
            with suppress(FileNotFoundError):
                total += os.stat(f"{where}/{name}").st_size
    return total


class Watched(Root):
    """A root in memory that remembers what was downloaded and how full the cache was."""

    def __init__(self) -> None:
        super().__init__(f"memory://{secrets.token_hex(8)}", attempts=1)
        self.fetched: list[str] = []
        self.most = 0
        self.delay_s = 0.0

    def get_file(self, path: str, local: Path, *, sha256: str | None = None) -> None:
        self.fetched.append(path)
        time.sleep(self.delay_s)
        super().get_file(path, local, sha256=sha256)
        self.most = max(self.most, bytes_below(cache_folder() / "shards"))


def made_corpus(root: Root, folder: Path, shards: int) -> Manifest:
    """``shards`` shards of the same size in ``root``, random tokens."""
    folder.mkdir()
    chance, entries = np.random.default_rng(shards), []
    for number in range(shards):
        ids = chance.integers(1, 300, T * SAMPLES).tolist()
        local = folder / f"{number}.safetensors"
        made = write_shard(
            local, [ids], end_of_text_id=0, vocab_size=300, tokenizer_sha256="0" * 64
        )
        path = f"corpora/made/{local.name}"
        root.put_file(local, path)
        entries.append(
            ShardEntry(
                path=path, tokens=made.tokens, documents=1, bytes=made.bytes,
                text_bytes=0, sha256=made.sha256,
            )
        )  # fmt: skip
    tokens = sum(entry.tokens for entry in entries)
    split = SplitEntry(
        shards=tuple(entries), tokens=tokens, documents=shards, text_bytes=0, unigram_entropy_nats=0
    )
    fields: dict[str, Any] = {"name": "made", "fingerprint": "f" * 64, "splits": {"train": split}}
    return Manifest.model_construct(None, **fields)  # the store asks for nothing else


def loader_of(store: ShardStore, **options: int) -> SampleLoader:
    return SampleLoader(store, T, 1, "f" * 64, **options)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(empty_cache: Path) -> Watched:
    return Watched()


@pytest.fixture
def manifest(bench: Bench) -> Manifest:
    return resolve(bench.root, "tiny")


def tokens_of(bench: Bench, manifest: Manifest, split: str) -> list[list[int]]:
    """Every shard of a split, read without our code."""
    folder = Path(bench.root.base)
    entries = manifest.splits[split].shards
    return [load_file(folder / entry.path)["tokens"].tolist() for entry in entries]


# -- which tokens ----------------------------------------------------------------------------------


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
    world = World(0, 1, 0, 1, torch.device("cpu"))
    program = PretrainProgram(settings, bench.root, manifest, world, torch.float32)
    loader = SampleLoader(ShardStore(bench.root, manifest), T, settings.seed, manifest.fingerprint)
    for step in (0, 1, 29):
        batch = program.batch(8 * step)
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
    assert len(found) == len(manifest.splits["eval"].shards)
    assert [tokens.tolist() for tokens in found] == tokens_of(bench, manifest, "eval")


# -- what is open, checked and fetched -------------------------------------------------------------


def test_few_shards_are_open_and_each_is_read_once_for_its_digest(
    remote: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(cache_module, "sha256_file", digest)
    in_place = Root(str(tmp_path / "root"))
    made = made_corpus(in_place, tmp_path / "made", 3 * WINDOW)
    store = ShardStore(in_place, made)
    loader = loader_of(store)
    for first in range(0, 2 * loader.order.per_epoch, 10):
        loader.batch(first, 10)
        assert len(store._shards) + len(store._ahead) <= 2 * WINDOW
    assert len(read) == 3 * WINDOW
    path = tmp_path / "root" / made.splits["train"].shards[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"\1")  # other bytes: read again, and refused
    store.close()
    with pytest.raises(DamagedError, match=r"0\.safetensors"):
        loader.batch(0, loader.order.per_epoch)


def test_the_next_window_is_fetched_while_this_one_is_read(remote: Watched, tmp_path: Path) -> None:
    made = made_corpus(remote, tmp_path / "made", 3 * WINDOW)
    entries = made.splits["train"].shards
    loader = loader_of(ShardStore(remote, made))
    order, at = loader.order, 0
    wanted: set[str] = set()

    def arrived(wanted: set[str]) -> bool:
        return set(remote.fetched) == wanted

    for number in range(3):
        loader.batch(at, 1)
        for window in (order.window(at), order.window(order.window(at).stop)):
            wanted |= {entries[shard].path for shard in window.shards}
        assert len(wanted) == min(3, number + 2) * WINDOW
        until(partial(arrived, wanted))
        at = order.window(at).stop
    assert len(remote.fetched) == 3 * WINDOW


def test_across_the_end_of_an_epoch_and_not_beyond_the_end_of_training(
    remote: Watched, tmp_path: Path
) -> None:
    made = made_corpus(remote, tmp_path / "made", 3 * WINDOW)
    last = 2 * WINDOW * SAMPLES
    loader = loader_of(ShardStore(remote, made), samples=3 * WINDOW * SAMPLES)
    loader.batch(last, 1)
    time.sleep(0.2)
    assert len(remote.fetched) == WINDOW
    longer = loader_of(ShardStore(remote, made))
    longer.batch(last, 1)
    both = {*longer.order.window(last).shards, *longer.order.window(3 * WINDOW * SAMPLES).shards}
    until(lambda: len(remote.fetched) == len(both))
    assert {made.splits["train"].shards[shard].path for shard in both} == set(remote.fetched)


@pytest.mark.parametrize("room", [WINDOW, WINDOW + 2, 2 * WINDOW])
def test_ranks_share_a_cache_that_holds_little_more_than_a_window(
    remote: Watched, tmp_path: Path, room: int
) -> None:
    """Two ranks, each a step ahead in a thread, wait for one another after every step."""
    shards = 2 * WINDOW
    made = made_corpus(remote, tmp_path / "made", shards)
    size = made.splits["train"].shards[0].bytes
    in_place = Root(str(tmp_path / "root"))
    there = made_corpus(in_place, tmp_path / "p", shards)
    total = 3 * shards * SAMPLES
    expected, _ = loader_of(ShardStore(in_place, there)).batch(0, total)
    remote.delay_s, meeting, step = 0.01, threading.Barrier(2, timeout=20), 24

    def rank(number: int) -> list[torch.Tensor]:
        loader = loader_of(ShardStore(remote, made, limit_bytes=room * size))
        seen = []
        with ThreadPoolExecutor(1) as pool:
            firsts = range(number * step // 2, total, step)
            coming = pool.submit(loader.batch, firsts[0], step // 2)
            for following in [*firsts[1:], None]:
                inputs, _ = coming.result()
                if following is not None:
                    coming = pool.submit(loader.batch, following, step // 2)
                seen.append(inputs)
                meeting.wait()
        return seen

    with ThreadPoolExecutor(2) as pool:
        parts: list[Future[list[torch.Tensor]]] = [pool.submit(rank, number) for number in (0, 1)]
        found = [part.result() for part in parts]
    pairs = [half for both in zip(*found, strict=True) for half in both]
    assert torch.equal(torch.cat(pairs), expected)
    assert WINDOW * size <= remote.most <= room * size


@pytest.mark.parametrize("shards", [WINDOW + 1, 2 * WINDOW + 3])
def test_room_for_one_window_is_enough(remote: Watched, tmp_path: Path, shards: int) -> None:
    made = made_corpus(remote, tmp_path / "made", shards)
    size = made.splits["train"].shards[0].bytes
    in_place, total = Root(str(tmp_path / "root")), 5 * shards * SAMPLES
    there = made_corpus(in_place, tmp_path / "p", shards)
    expected, _ = loader_of(ShardStore(in_place, there)).batch(0, total)
    loader = loader_of(ShardStore(remote, made, limit_bytes=WINDOW * size))
    parts = [loader.batch(first, 50)[0] for first in range(0, total, 50)]
    assert torch.equal(torch.cat(parts), expected)
    assert remote.most == WINDOW * size


def test_a_window_that_cannot_fit_is_refused_before_anything_is_fetched(
    remote: Watched, tmp_path: Path
) -> None:
    made = made_corpus(remote, tmp_path / "made", WINDOW + 1)
    size = made.splits["train"].shards[0].bytes
    with pytest.raises(InputError, match=r"^data\.cache_gib is .* set it to at least"):
        loader_of(ShardStore(remote, made, limit_bytes=WINDOW * size - 1))
    loader_of(ShardStore(remote, made, limit_bytes=WINDOW * size))
    in_place = Root(str(tmp_path / "root"))
    loader_of(ShardStore(in_place, made_corpus(in_place, tmp_path / "p", 5), limit_bytes=1))
    assert remote.fetched == []


def test_a_shard_is_held_while_an_array_of_it_lives(remote: Watched, tmp_path: Path) -> None:
    made = made_corpus(remote, tmp_path / "made", 2)
    one, other = made.splits["train"].shards
    store = ShardStore(remote, made, limit_bytes=one.bytes)
    some = store.open(one).tokens[5:9]
    store.close()
    with pytest.raises(StoreError, match="has no room"):
        store.map(other, patience_s=0)
    del some
    assert store.map(other, patience_s=0).tokens.size == other.tokens


def test_prefetch_returns_at_once_and_its_error_is_kept_for_open(
    remote: Watched, tmp_path: Path
) -> None:
    made = made_corpus(remote, tmp_path / "made", 2)
    one, other = made.splits["train"].shards
    remote.delay_s = 0.5
    store = ShardStore(remote, made)
    remote.delete(other.path)
    begun = time.monotonic()
    store.prefetch([one, other])
    store.prefetch([one, other])
    assert time.monotonic() - begun < 0.3
    assert store.open(one).tokens.size == one.tokens
    assert sorted(remote.fetched) == sorted([one.path, other.path]), "opening waits for it"
    with pytest.raises(StoreError) as error:
        store.open(other)
    assert other.path in str(error.value)
    assert remote.url in str(error.value)
    assert remote.fetched.count(other.path) == 2


def test_shards_of_a_bucket_survive_a_restart_and_damage(
    remote: Watched, tmp_path: Path, empty_cache: Path
) -> None:
    made = made_corpus(remote, tmp_path / "made", WINDOW)

    def read() -> torch.Tensor:
        return loader_of(ShardStore(remote, made)).batch(0, WINDOW * SAMPLES)[0]

    expected = read()
    cached = sorted((empty_cache / "shards").glob("*.safetensors"))
    assert len(cached) == WINDOW
    data = bytearray(cached[0].read_bytes())
    data[len(data) // 2] ^= 1
    cached[0].write_bytes(data)
    assert torch.equal(read(), expected)
    assert len(remote.fetched) == WINDOW + 1


def test_what_is_not_there_is_named(bench: Bench, manifest: Manifest) -> None:
    store = ShardStore(bench.root, manifest)
    with pytest.raises(InputError, match="has no split 'test'; it has "):
        store.split("test")
    with pytest.raises(InputError, match="No training shard holds 100001 tokens"):
        SampleLoader(store, 100_000, 1, manifest.fingerprint)


def test_a_missing_or_cut_off_shard_is_named_before_training(
    remote: Watched, tmp_path: Path
) -> None:
    made = made_corpus(remote, tmp_path / "made", 40)
    entries = made.splits["train"].shards
    store = ShardStore(remote, made)
    store.check_sizes(entries)
    remote.delete(entries[30].path)
    with pytest.raises(DamagedError, match=r"/30\.safetensors in memory"):
        store.check_sizes(entries)
    remote.publish(entries[20].path, remote.read_bytes(entries[20].path)[:-1])
    with pytest.raises(DamagedError, match=r"/20\.safetensors in memory"):
        store.check_sizes(entries)
