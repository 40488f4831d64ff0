"""What a plan reads from the root: the corpus, and the speeds of the user's own runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tessera.cli import _plan_inputs as inputs
from tessera.corpus.build import build
from tessera.experiment import load_experiment
from tessera.storage import Root, open_root

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench

REPOSITORY = Path(__file__).parents[2]


def test_speeds_of_own_runs(bench: Bench) -> None:
    """A minute of training on one kind of card counts; the figure is that of the lineage."""
    long = bench.create("long", steps=100)
    writer = bench.launch(long, device="NVIDIA H100 80GB HBM3")
    writer.steps(1, 100)
    writer.checkpoint(100)
    writer.end("FINISHED", 100)
    short = bench.create("short", steps=100)
    writer = bench.launch(short, device="NVIDIA H200", instance="i-2")
    writer.steps(1, 10)
    writer.checkpoint(10)
    writer.end("FINISHED", 10)
    mixed = bench.create("mixed", steps=100)
    for number, device in enumerate(("NVIDIA H200", "NVIDIA H100 PCIe")):
        writer = bench.launch(mixed, device=device, instance=f"i-3{number}")
        writer.steps(50 * number + 1, 50 * number + 50)
        writer.checkpoint(50 * number + 50)
        writer.end("PREEMPTED" if number == 0 else "FINISHED", 50 * number + 50)
    found, unread = inputs._own_runs(bench.root)
    assert unread == []
    (one,) = found
    assert (one.gpu, one.gpus, one.kind) == ("H100 SXM", 1, "own")
    assert one.source == f"run {long.id}"
    from tessera.tracking.queries import summarise_run

    assert one.tokens_per_s == summarise_run(bench.root, long).tokens_per_s


def test_a_root_that_cannot_be_read_costs_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tessera.errors import StoreError

    root = open_root(str(tmp_path))

    def fail(*_: object) -> bool:
        raise StoreError("The store is down; try later.")

    monkeypatch.setattr(Root, "is_absent", fail)
    found, (sentence,) = inputs._own_runs(root)
    assert found == []
    assert sentence == "Speeds of your own runs are left out: The store is down; try later."


def test_the_corpus_in_the_root(tmp_path: Path) -> None:
    root = open_root(str(tmp_path / "root"))
    settings = load_experiment(REPOSITORY / "experiments" / "smoke.yaml")
    corpus, fingerprint, (sentence,) = inputs._corpus(root, settings)
    assert (corpus, fingerprint) == (None, None)
    assert "is not built in" in sentence
    assert "takes it to have just the tokens" in sentence
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(60):
            file.write(json.dumps({"id": str(number), "text": f"a small text {number} " * 9}))
            file.write("\n")
    recipe = tmp_path / "recipe.yaml"
    source = {"name": "a", "format": "jsonl", "path": "a.jsonl", "language": "en", "licence": "CC0"}
    tokenizer = {"train": {"vocab_size": 300}}
    recipe.write_text(
        json.dumps(
            {
                "name": "sample",
                "sources": [source],
                "tokenizer": tokenizer,
                "holdout": {"fraction": 0.2, "salt": "s"},
            }
        )
    )
    manifest = build(recipe, root).manifest
    corpus, fingerprint, notes = inputs._corpus(root, settings)
    assert notes == []
    assert fingerprint == manifest.fingerprint
    assert corpus is not None
    assert corpus.tokens == manifest.splits["train"].tokens
    files = (tmp_path / "root" / manifest.folder).rglob("*.safetensors")
    assert corpus.bytes == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("command", ["plan", "launch"])
def test_a_line_break_in_an_override_is_refused(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job would split it: its words are read a line each."""
    from importlib import import_module

    from click.testing import CliRunner

    from tessera.errors import InputError

    monkeypatch.chdir(REPOSITORY)
    called = getattr(import_module(f"tessera.cli.{command}"), command)
    words = ["experiments/smoke.yaml", "--set", "description=two\nlines"]
    done = CliRunner().invoke(called, words, standalone_mode=False)
    assert isinstance(done.exception, InputError)
    assert "--set description has a line break in its value" in str(done.exception)
