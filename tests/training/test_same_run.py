"""Two first starts under one run id, on a store that lets both create ``run.json``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tessera.errors import ConflictError, SupersededError
from tessera.runs import open_run
from tessera.training.checkpoint.fetch import fetch_checkpoint
from tessera.training.checkpoint.publish import guard_publication
from tests.training.conftest import Bench


def overwrite(bench: Bench) -> None:
    """What the other start wrote last: the same id, another learning rate."""
    run = bench.only_run()
    path = run.path("run.json")
    record = bench.root.read_json(path)
    record["identity"]["optimizer.lr"] = 0.02
    bench.root.publish_json(path, record)


def test_the_one_whose_record_was_overwritten_publishes_nothing_more(bench: Bench) -> None:
    bench.crash(7)
    run = bench.only_run()
    attempt = run.start_attempt(replace(bench.place()), None)
    guard_publication(run, attempt)
    overwrite(bench)
    with pytest.raises(SupersededError, match=r"Another start with other settings.*--run-id"):
        guard_publication(run, attempt)


def test_its_checkpoints_are_not_continued_by_the_other(bench: Bench) -> None:
    bench.crash(7)
    overwrite(bench)
    run = open_run(bench.root, bench.only_run().id)
    for local in (True, False):
        with pytest.raises(ConflictError, match=r"made with other settings than run.json says"):
            fetch_checkpoint(run, local=local)
