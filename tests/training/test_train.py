"""Pretraining from the experiment to the published model, undisturbed and refused."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import yaml

from tessera.corpus.build import build
from tessera.errors import InputError, StoreError
from tessera.evaluation.weights import load_base
from tessera.model.digest import weights_digest
from tests.training.conftest import as_options, write_corpus

if TYPE_CHECKING:
    from tests.training.conftest import Bench, Whole


def test_a_run_from_the_command_to_the_model(bench: Bench, whole: Whole) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tessera", *bench.arguments()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    run = bench.only_run()
    assert (done.returncode, done.stdout) == (0, f"{run.id}: Finished all 30 steps.\n")
    assert "new run, 30 steps" in done.stderr
    assert "Warning" not in done.stderr, "a library's warning is not ours to show"
    assert all(line.startswith(f"{run.id}: ") for line in done.stderr.splitlines())

    assert run.id.startswith("tiny-")
    (attempt,) = run.attempts()
    ending = bench.last_ending(run)
    assert (ending.outcome, ending.exit_code, ending.step) == ("FINISHED", 0, 30)
    assert attempt.resumed_from is None

    losses = bench.points(run)
    assert list(losses) == list(range(3, 31, 3))
    assert losses[30] < losses[3] - 0.5
    evaluated = bench.points(run, "eval/loss")
    assert list(evaluated) == [10, 20, 30]
    assert evaluated[30] < evaluated[10]
    assert bench.points(run, "progress/tokens")[30] == 30 * 256

    base = load_base(run, torch.device("cpu"))
    assert base.digest == bench.digest(run) == weights_digest(base.model.state_dict())
    # Another process with as many threads comes to the same weights and losses, bit for bit.
    assert base.digest == whole.digest
    assert losses == whole.points["train/loss"]


def test_a_finished_run_says_so_and_new_starts_another(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    first = bench.train().run
    before = bench.root.files("")
    again = bench.command(capfd)
    assert again.code == 0
    assert again.out == (
        f"{first.id}: Run {first.id} is already finished (30 steps); use --new for another.\n"
    )
    assert bench.root.files("") == before

    fresh = bench.command(capfd, "--new", "--quiet")
    assert (fresh.code, fresh.err) == (0, "")
    assert [run.id for run in bench.runs()] == [first.id, f"{first.id}-2"]
    second = bench.runs()[1]
    assert bench.digest(second) == bench.digest(first)
    assert bench.points(second) == bench.points(first)


def test_micro_batches_change_the_memory_and_not_the_run(bench: Bench) -> None:
    whole = bench.train("optimizer.lr=0.001").run
    assert bench.train("optimizer.lr=0.001", "batch.micro_batch=2").run.id == whole.id
    parts = bench.train("optimizer.lr=0.001", "batch.micro_batch=2", new=True).run
    assert parts.record.identity == whole.record.identity
    # The same sums in another order; measured: 6e-7 (2e-5 at ten times the learning rate).
    assert bench.points(parts) == pytest.approx(bench.points(whole), abs=1e-5)
    assert bench.digest(parts) != bench.digest(whole), "else the setting did not arrive"


def test_every_second_is_filed_once(bench: Bench) -> None:
    run = bench.train().run
    (attempt,) = run.attempts()
    spans = [record for record in bench.records(run) if record.kind == "span"]
    assert {span.key for span in spans} >= {"setup", "train", "data_wait", "evaluate", "checkpoint"}
    filed = sum(span.number for span in spans)
    assert filed <= bench.last_ending(run).ended_at - attempt.started_at + 1e-3
    assert all(span.number > 0 for span in spans)


def test_a_first_step_that_compiles_is_filed_apart_and_its_loss_counts(
    bench: Bench, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.training.loop.compiles", lambda program: True)
    monkeypatch.setattr("torch.compile", lambda function: function)
    run = bench.train().run
    assert bench.points(run) == whole.points["train/loss"]
    assert [r.key for r in bench.records(run) if r.kind == "span"].count("compile") == 1


def test_a_first_step_that_compiles_has_no_speed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.training.loop.compiles", lambda program: True)
    monkeypatch.setattr("torch.compile", lambda function: function)
    run = bench.train("log_every_steps=1").run
    assert list(bench.points(run)) == list(range(1, 31))
    assert list(bench.points(run, "train/tokens_per_s")) == list(range(2, 31))


# -- refused, with nothing recorded ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (
            ["--set", "model.vocab_size=301"],
            "Error: --set model.vocab_size=301: model.vocab_size is 301, the tokenizer of corpus",
        ),
        (["--set", "data.corpus=other"], "Error: Corpus 'other' is not built in "),
        (["--set", "data.fingerprint=zz"], "Error: No build of corpus 'tiny' in "),
        (
            ["--set", "data.sequence=null", "--set", "model.context=2048",
             "--set", "batch.tokens_per_step=2048", "--set", "batch.micro_batch=1",
             "--set", "tokens=4096"],
            "Error: No training shard holds 2049 tokens; ",
        ),
        (["--run-id", "No Good"], "Error: The run id 'No Good' is not usable"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(
    bench: Bench, capfd: pytest.CaptureFixture[str], extra: list[str], sentence: str
) -> None:
    before = bench.root.files("")
    refused = bench.command(capfd, *extra)
    assert refused.code == 2
    assert refused.err.startswith(sentence)
    assert refused.err.count("\n") == 1
    assert refused.out == ""
    assert bench.root.files("") == before


CHANGES = [
    ("seed=1", "seed = 20260614, this experiment says 1"),
    ("model.layers=3", "model.layers = 2, this experiment says 3"),
    ("model.context=128", "model.context = 64, this experiment says 128"),
    ("optimizer.lr=0.02", "optimizer.lr = 0.01, this experiment says 0.02"),
    ("optimizer.betas=[0.9, 0.99]", "optimizer.betas = [0.9, 0.95], this experiment says ["),
    ("schedule.final_lr=0.0", "schedule.final_lr = 0.0001, this experiment says 0.0"),
    ("batch.tokens_per_step=512", "batch.tokens_per_step = 256, this experiment says 512"),
    ("data.sequence=16", "data.sequence = 32, this experiment says 16"),
    ("precision=bf16", "precision = float32, this experiment says bf16"),
    ("stability.window=64", "stability.window = 128, this experiment says 64"),
    ("tokens=5120", "tokens = 7680, this experiment says 5120"),
]


def test_a_changed_setting_is_refused_by_name(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.crash(7)
    run = bench.only_run()
    before = bench.root.files("")
    for setting, named in CHANGES:
        refused = bench.command(capfd, "--run-id", run.id, "--set", setting)
        assert refused.code == 2, setting
        assert f"Run {run.id} was started with {named}" in refused.err
        assert refused.err.endswith("; put it back, or start another run with --new.\n")
        assert refused.err.count("\n") == 1
        assert bench.root.files("") == before


@pytest.mark.parametrize("vocabulary", [300, 290], ids=["other texts", "another tokenizer"])
def test_other_data_under_the_same_name_are_refused(
    bench: Bench, capfd: pytest.CaptureFixture[str], vocabulary: int
) -> None:
    bench.crash(7)
    run = bench.only_run()
    (bench.folder / "other").mkdir()
    recipe = write_corpus(bench.folder / "other")
    changed = yaml.safe_load(recipe.read_text())
    changed["tokenizer"]["train"]["vocab_size"] = vocabulary
    changed["holdout"]["salt"] = "t"
    recipe.write_text(yaml.safe_dump(changed))
    other = build(recipe, bench.root).manifest.fingerprint
    settings = [f"data.fingerprint={other}", f"model.vocab_size={vocabulary}"]
    before = bench.root.files("")
    refused = bench.command(capfd, "--run-id", run.id, *as_options(*settings))
    assert refused.code == 2
    assert refused.err == (
        f"Error: Run {run.id} was trained on data {run.record.fingerprint[:12]}, this experiment "
        f"reads {other[:12]}; give the old data back (data.fingerprint) or start another run with "
        "--new.\n"
    )
    assert bench.root.files("") == before


def test_a_free_setting_may_change(bench: Bench, whole: Whole) -> None:
    bench.crash(12)
    run = bench.train("checkpoint.every_steps=7", "checkpoint.keep=5", "price=null").run
    assert bench.checkpoints(run) == [28, 21, 14, 10, 5]
    assert bench.digest(run) == whole.digest


def test_a_damaged_shard_is_not_trained_on(bench: Bench) -> None:
    shard = next(bench.folder.glob("root/corpora/tiny/*/shards/train-00001*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"train-00001.* differs from the manifest"):
        bench.train()


# -- the published model ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", [20, -5], ids=["header", "tensors"])
def test_a_damaged_model_is_not_loaded(bench: Bench, whole: Whole, place: int) -> None:
    run = bench.train().run
    file = bench.folder / "root" / bench.model_file(run)
    data = bytearray(file.read_bytes())
    data[place] ^= 0x80
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"model-[0-9a-f]+\.safetensors .* damaged"):
        load_base(run, torch.device("cpu"))


def test_a_run_without_a_model_is_no_base(bench: Bench) -> None:
    bench.crash(7)
    with pytest.raises(InputError, match="has not published a model yet"):
        load_base(bench.only_run(), torch.device("cpu"))
