"""What a plan reads from the root: the corpus, and the speeds of the user's own runs."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tessera.cli import _plan_inputs as inputs
from tessera.cloud.skypilot import TaskFile
from tessera.corpus.build import build
from tessera.corpus.manifest import Manifest
from tessera.errors import InputError
from tessera.experiment import load_experiment
from tessera.storage import Root, open_root

if TYPE_CHECKING:
    from tests.tracking.fabricate import Bench

REPOSITORY = Path(__file__).parents[2]
LONG = ("data.sequence=4096", "model.context=4096", "batch.micro_batch=1")
EVALUATED = ("data.sequence=512", "model.context=512")


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


def build_sample(tmp_path: Path) -> Manifest:
    """A corpus named sample, of 300 entries, in ``tmp_path / "root"``."""
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
    return build(recipe, open_root(str(tmp_path / "root"))).manifest


def test_the_corpus_in_the_root(tmp_path: Path) -> None:
    root = open_root(str(tmp_path / "root"))
    fitting = ["model.vocab_size=300"]
    settings = load_experiment(REPOSITORY / "experiments" / "smoke.yaml", fitting)
    file = TaskFile(REPOSITORY / "sky" / "pretrain_h100.yaml")
    corpus, fingerprint, (sentence,) = inputs._corpus(root, settings, file)
    assert (corpus, fingerprint) == (None, None)
    assert "is not built in" in sentence
    assert "takes it to have just the tokens" in sentence
    manifest = build_sample(tmp_path)
    corpus, fingerprint, notes = inputs._corpus(root, settings, file)
    assert notes == []
    assert fingerprint == manifest.fingerprint
    assert corpus is not None
    assert corpus.tokens == manifest.splits["train"].tokens
    files = (tmp_path / "root" / manifest.folder).rglob("*.safetensors")
    assert corpus.bytes == sum(path.stat().st_size for path in files)


def test_who_builds_a_corpus_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """117 GB are nothing to build on a laptop; a task that builds its own corpus needs nobody."""
    monkeypatch.chdir(REPOSITORY)
    root = open_root(str(tmp_path))

    def note(experiment: str, task: str) -> str:
        settings = load_experiment(Path("experiments") / experiment)
        return inputs._corpus(root, settings, TaskFile(Path("sky") / task))[2][0]

    large = note("tessera_1b.yaml", "pretrain_h100.yaml")
    assert "its recipe reads 117 GB" in large
    assert "sky launch -c corpus sky/corpus_cpu.yaml" in large
    assert "tessera corpus build" not in large
    assert "tessera corpus build data_manifests/sample.yaml" in note(
        "smoke.yaml", "pretrain_h100.yaml"
    )
    built = note("smoke.yaml", "smoke_cpu.yaml")
    assert built.startswith("The job of sky/smoke_cpu.yaml builds corpus sample first")


def test_a_root_that_is_not_reached_is_said_once() -> None:
    reason = "Unable to locate credentials; run `tessera configure`."
    notes = [f"s3://b/x failed on corpora/c: {reason} The plan takes it to have just the tokens."]
    unread = [f"Speeds of your own runs are left out: s3://b/x failed on runs: {reason}"]
    assert inputs._same_reason(notes, unread)
    assert not inputs._same_reason(notes, ["Speeds of your own runs are left out: it is damaged."])
    assert not inputs._same_reason([], unread)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--stop", "x", "experiments/smoke.yaml"), "not both at once"),
        (("--stop", ""), "--stop is empty, so nothing was asked or ended"),
        (("--stop", "  "), "--stop is empty"),
        (("experiments/smoke.yaml", "--run-id", "bad id!"), "run id 'bad id!' is not usable"),
        (("experiments/smoke.yaml", "--run-id", ""), "run id is empty"),
        (("experiments/smoke.yaml", "--provider", " "), "--provider is empty"),
        (("experiments/interview.yaml",), "the suite of an interview"),
        (("data_manifests/sample.yaml",), "the recipe of a corpus"),
        (("sky/smoke_cpu.yaml",), "a task of SkyPilot"),
        (
            ("experiments/smoke.yaml", "--managed", "--bid", "1", "--provider", "runpod"),
            "--bid is an offer to vast.ai, and --provider asks for runpod",
        ),
    ],
)
def test_what_a_launch_refuses_before_it_asks_anybody(
    words: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "env"
    written.write_text("TESSERA_ROOT='s3://bucket/x'\n")
    monkeypatch.setenv("TESSERA_ENV_FILE", str(written))
    monkeypatch.chdir(REPOSITORY)
    called = import_module("tessera.cli.launch").launch
    done = CliRunner().invoke(called, list(words), standalone_mode=False)
    assert isinstance(done.exception, InputError), done.exception
    assert sentence in str(done.exception)


@pytest.mark.parametrize("command", ["plan", "launch"])
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ((), "model.vocab_size is 2048, the tokenizer of corpus sample has 300 entries"),
        (("model.vocab_size=300", *LONG), "No training shard holds 4097 tokens; shorten"),
        (("model.vocab_size=300", *EVALUATED), "the evaluation split has no 513 tokens"),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused_before_money_is_spent(
    command: str,
    settings: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_sample(tmp_path)
    done = refused(command, monkeypatch, tmp_path, *(f"--set={text}" for text in settings))
    assert sentence in str(done)


def refused(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str
) -> InputError:
    """Why smoke.yaml is not planned or launched on the corpus of ``build_sample``."""
    written = tmp_path / "env"
    written.write_text("TESSERA_ROOT='s3://bucket/x'\n")
    monkeypatch.setenv("TESSERA_ENV_FILE", str(written))
    monkeypatch.chdir(REPOSITORY)
    root = str(tmp_path / "root")
    called = getattr(import_module(f"tessera.cli.{command}"), command)
    arguments = ["experiments/smoke.yaml", "--root", root, *words]
    done = CliRunner().invoke(called, arguments, standalone_mode=False)
    assert isinstance(done.exception, InputError), done.exception
    return done.exception


@pytest.mark.parametrize("command", ["plan", "launch"])
def test_a_line_break_in_an_override_is_refused(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job would split it: its words are read a line each."""
    monkeypatch.chdir(REPOSITORY)
    called = getattr(import_module(f"tessera.cli.{command}"), command)
    words = ["experiments/smoke.yaml", "--set", "description=two\nlines"]
    done = CliRunner().invoke(called, words, standalone_mode=False)
    assert isinstance(done.exception, InputError)
    assert "--set description has a line break in its value" in str(done.exception)
