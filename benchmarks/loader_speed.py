"""Speed of the sample loader: alone, from a cold S3 store, and against a slow one.

    python benchmarks/loader_speed.py
    python benchmarks/loader_speed.py --only waiting --seconds 300 --latency-ms 100 --rate 100000
    AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... \
        python benchmarks/loader_speed.py --only cold --endpoint https://s3.example.com --bucket b

Three parts, each on shards of random tokens that the project's own writer makes in a temporary
folder:

* speed: tokens/s of `SampleLoader.batch` from a warm cache, on one core, against a torch DataLoader
  over the same memory-mapped shards (RandomSampler, num_workers=0), in turns; medians of the
  rounds. The CPU share is the part of a core that the process got while it was measured: far below
  1 the machine was busy, and tokens per CPU second say more than tokens per second.
* cold: MB/s from an S3 server through the tests' proxy (no faults) into an empty cache, digests
  checked, a window of shards at a time, against `s3fs` getting the same files without a check.
* waiting: a consumer that takes steps at a fixed rate from `Prefetcher`, as the training loop does,
  while every request to the store takes --latency-ms more (evenly from nothing to twice that); the
  share of its time that it waits for data, with and without the first step.

The server is one that is started for the run (`--store rclone` or `moto`) or `--endpoint`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from tessera.corpus.manifest import Manifest, ShardEntry, SplitEntry
from tessera.corpus.shards import open_shard, write_shard
from tessera.storage import Root
from tessera.training.loader import SampleLoader, ShardStore
from tessera.training.order import WINDOW
from tessera.training.program import Prefetcher, Program

CHECKOUT = Path(__file__).resolve().parents[1]
MB = 1_000_000
ENTRIES = 65_536  # of the made-up vocabulary

sys.path.insert(0, str(CHECKOUT))  # for tests.services


@dataclass(frozen=True)
class Row:
    """One figure of the table."""

    part: str
    what: str
    value: float
    unit: str
    note: str = ""


def make_shards(folder: Path, count: int, tokens: int) -> Manifest:
    """``count`` shards of ``tokens`` random tokens in the folder root ``folder``."""
    (folder / "shards").mkdir(parents=True)
    chance, entries = np.random.default_rng(20261122), []
    for number in range(count):
        name = f"shards/{number:05}.safetensors"
        ids = chance.integers(1, ENTRIES, tokens - 1, dtype=np.uint16)
        made = write_shard(
            folder / name, [ids], end_of_text_id=0, vocab_size=ENTRIES, tokenizer_sha256="0" * 64
        )
        entries.append(
            ShardEntry(
                path=name, tokens=made.tokens, documents=1, bytes=made.bytes,
                text_bytes=0, sha256=made.sha256,
            )
        )  # fmt: skip
    split = SplitEntry(
        shards=tuple(entries), tokens=count * tokens, documents=count, text_bytes=0,
        unigram_entropy_nats=0,
    )  # fmt: skip
    fields: dict[str, Any] = {"name": "made", "fingerprint": "f" * 64, "splits": {"train": split}}
    return Manifest.model_construct(None, **fields)  # the store asks for nothing else


# -- speed -----------------------------------------------------------------------------------------


class Mapped(Dataset[torch.Tensor]):
    """The alternative: every sample of every shard, in stored order; the sampler shuffles."""

    def __init__(self, paths: list[Path], sequence: int) -> None:
        self._tokens = [open_shard(path).tokens for path in paths]
        self._sequence = sequence
        self._places = [
            (shard, start)
            for shard, tokens in enumerate(self._tokens)
            for start in range(0, len(tokens) - sequence, sequence)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> torch.Tensor:
        shard, start = self._places[index]
        row = self._tokens[shard][start : start + self._sequence + 1]
        return torch.from_numpy(row.astype(np.int64))


def one_round(batches: Iterator[object], tokens: int, seconds: float) -> tuple[float, float]:
    """Tokens/s over about ``seconds``, and the share of a core that the process had."""
    done, cpu, begun = 0, time.process_time(), time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        next(batches)
        done += tokens
    return done / elapsed, (time.process_time() - cpu) / elapsed


def measure_speed(folder: Path, manifest: Manifest, arguments: argparse.Namespace) -> list[Row]:
    """Ours and the DataLoader, in turns, for each length of a sequence."""
    root = Root("memory://loader-speed")
    entries = manifest.splits["train"].shards
    for entry in entries:
        root.put_file(folder / entry.path, entry.path)
    rows, tokens = [], arguments.step_tokens
    for sequence in (4096, 256):
        samples = tokens // sequence
        mine = ours(ShardStore(root, manifest), manifest, sequence, samples)
        stock = theirs([folder / entry.path for entry in entries], sequence, samples)
        for _ in range(sum(entry.tokens for entry in entries) // tokens):
            next(mine)  # an epoch, which fills the cache and the page cache
        next(stock)
        found: dict[str, list[tuple[float, float]]] = {"ours": [], "torch DataLoader": []}
        for _ in range(arguments.rounds):
            for rounds, batches in zip(found.values(), (mine, stock), strict=True):
                rounds.append(one_round(batches, tokens, arguments.seconds / 10))
        rows += speed_rows(sequence, samples, found)
    return rows


def ours(store: ShardStore, manifest: Manifest, sequence: int, samples: int) -> Iterator[object]:
    """Batch after batch of `SampleLoader`."""
    loader = SampleLoader(store, sequence, 1, manifest.fingerprint)
    return (loader.batch(first, samples) for first in itertools.count(0, samples))


def theirs(paths: list[Path], sequence: int, samples: int) -> Iterator[object]:
    """Inputs and targets of a torch DataLoader, epoch after epoch."""
    data = Mapped(paths, sequence)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(data, batch_size=samples, sampler=sampler, drop_last=True)
    while True:
        for window in loader:
            yield window[:, :-1], window[:, 1:]


def speed_rows(
    sequence: int, samples: int, found: dict[str, list[tuple[float, float]]]
) -> list[Row]:
    """Medians, and the ratio of the two."""
    medians, rows = {}, []
    for name, rounds in found.items():
        medians[name] = statistics.median(speed for speed, _ in rounds)
        share = statistics.median(share for _, share in rounds)
        note = f"{samples} samples a batch; {len(rounds)} rounds; CPU share {share:.2f}"
        rows.append(Row("speed", f"{name}, T={sequence}", medians[name], "tokens/s", note))
    ratio = medians["ours"] / medians["torch DataLoader"]
    return [*rows, Row("speed", f"ratio to the DataLoader, T={sequence}", ratio, "x")]


# -- from a store ----------------------------------------------------------------------------------


@contextmanager
def proxied_store(folder: Path, arguments: argparse.Namespace) -> Iterator[Any]:
    """The tests' proxy in front of a server; this process's ``s3://`` goes through it."""
    from tests.services.proxied import proxy_for
    from tests.services.stores import Store, serve

    @contextmanager
    def given() -> Iterator[Store]:
        keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        yield Store("given", arguments.endpoint, *keys, arguments.bucket, region)

    server = given() if arguments.endpoint else serve(arguments.store, folder / "server")
    with server as store, proxy_for(store, folder) as proxy:
        os.environ.update(proxy.store.environment())
        yield proxy


def upload(folder: Path, manifest: Manifest, proxy: Any) -> Root:
    """The shards in a prefix of their own."""
    root = Root(proxy.store.url(f"loader-speed-{os.getpid()}"))
    for entry in manifest.splits["train"].shards:
        root.put_file(folder / entry.path, entry.path)
    return root


def measure_cold(
    root: Root, manifest: Manifest, folder: Path, arguments: argparse.Namespace
) -> list[Row]:
    """MB/s into an empty cache, a window of shards at a time."""
    import s3fs

    entries = manifest.splits["train"].shards
    size = sum(entry.bytes for entry in entries) / MB
    ours, stock = [], []
    for number in range(arguments.rounds):
        os.environ["TESSERA_CACHE"] = str(folder / f"cold-{number}")
        store, begun = ShardStore(root, manifest), time.perf_counter()
        for at in range(0, len(entries), WINDOW):
            store.prefetch(entries[at : at + WINDOW])
            for entry in entries[at : at + WINDOW]:
                store.open(entry)
        ours.append(size / (time.perf_counter() - begun))
        store.close()
        fs = s3fs.S3FileSystem(
            skip_instance_cache=True, endpoint_url=os.environ["AWS_ENDPOINT_URL"]
        )
        base = root.url.removeprefix("s3://")
        fs.ls(base)  # connected before the clock runs, as ours is
        names = [f"{base}/{entry.path}" for entry in entries]
        targets = [str(folder / f"stock-{number}" / entry.path) for entry in entries]
        begun = time.perf_counter()
        fs.get(names, targets, batch_size=WINDOW)
        stock.append(size / (time.perf_counter() - begun))
    mine, theirs = statistics.median(ours), statistics.median(stock)
    note = f"{len(entries)} shards of {entries[0].bytes / MB:.1f} MB; {arguments.rounds} rounds"
    return [
        Row("cold", "ours, sha256 checked", mine, "MB/s", note),
        Row("cold", "s3fs get, unchecked", theirs, "MB/s", f"{WINDOW} files at a time"),
        Row("cold", "ratio to s3fs get", mine / theirs, "x"),
    ]


def measure_waiting(
    root: Root, manifest: Manifest, folder: Path, proxy: Any, arguments: argparse.Namespace
) -> list[Row]:
    """The share of a consumer's time that goes into waiting for the next step's data."""
    from tests.services.faults import Faults

    proxy.set(Faults(latency_s=arguments.latency_ms / 1000))
    os.environ["TESSERA_CACHE"] = str(folder / "waiting")
    sequence = 4096
    samples = arguments.step_tokens // sequence
    per_step = samples * sequence / arguments.rate
    steps = max(2, round(arguments.seconds / per_step))
    begun = time.perf_counter()
    store = ShardStore(root, manifest)
    loader = SampleLoader(store, sequence, 1, manifest.fingerprint, samples=steps * samples)
    ready = time.perf_counter() - begun
    program = SimpleNamespace(steps=steps, batch=lambda first: loader.batch(first, samples))
    source = Prefetcher(cast("Program", program), 0, lambda step: step * samples)
    waits, begun = [], time.perf_counter()
    for step in range(steps):
        asked = time.perf_counter()
        source.take(step)
        waits.append(time.perf_counter() - asked)
        time.sleep(per_step)
    total = time.perf_counter() - begun
    window = WINDOW * manifest.splits["train"].shards[0].tokens / arguments.rate
    note = (
        f"{steps} steps of {samples * sequence:,} tokens at {arguments.rate:,} tokens/s, "
        f"{arguments.latency_ms:g} ms a request; a window lasts {window:.0f} s"
    )
    return [
        Row("waiting", "share, all steps", 100 * sum(waits) / total, "%", note),
        Row("waiting", "share, without the first", 100 * sum(waits[1:]) / total, "%"),
        Row("waiting", "first step", waits[0], "s", "a window of shards is fetched"),
        Row("waiting", "longest later wait", max(waits[1:]), "s"),
        Row("waiting", "before: sizes of all shards", ready, "s"),
    ]


# -- the report ------------------------------------------------------------------------------------


def conditions() -> dict[str, Any]:
    """Where and when this ran."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="speed,cold,waiting", help="parts, with commas")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--shard-tokens", type=int, default=4_000_000)
    parser.add_argument("--step-tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of waiting; a round of speed is a tenth"
    )
    parser.add_argument("--rate", type=int, default=100_000, help="tokens/s that are consumed")
    parser.add_argument("--latency-ms", type=float, default=100.0)
    parser.add_argument("--store", choices=("rclone", "moto"), default="rclone")
    parser.add_argument("--endpoint", help="an S3 server instead of --store; keys from AWS_*")
    parser.add_argument("--bucket", default="tessera-test")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for and print it."""
    arguments = parse()
    parts = arguments.only.split(",")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="loader-speed-") as name:
        folder = Path(name)
        manifest = make_shards(folder / "made", arguments.shards, arguments.shard_tokens)
        if "speed" in parts:
            os.environ["TESSERA_CACHE"] = str(folder / "warm")
            torch.set_num_threads(1)
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {max(cores)})
            rows += measure_speed(folder / "made", manifest, arguments)
            os.sched_setaffinity(0, cores)
        if {"cold", "waiting"} & set(parts):
            with proxied_store(folder, arguments) as proxy:
                root = upload(folder / "made", manifest, proxy)
                if "cold" in parts:
                    rows += measure_cold(root, manifest, folder, arguments)
                if "waiting" in parts:
                    rows += measure_waiting(root, manifest, folder, proxy, arguments)
                root.delete_tree("shards")
    found = conditions()
    if arguments.json:
        print(json.dumps({"conditions": found, "rows": [vars(row) for row in rows]}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in found.items() if key != "command"))
    print(f"\n    {found['command']}\n")
    print("| part | what | value | unit | note |\n|---|---|---|---|---|")
    for row in rows:
        value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
        print(f"| {row.part} | {row.what} | {value} | {row.unit} | {row.note} |")


if __name__ == "__main__":
    main()
