"""A fine-tuning from its base to a voice that answers, disturbed and damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tessera.errors import InputError, StoreError
from tessera.evaluation.weights import Voice, find_base, load_base, load_voice
from tessera.experiment import Sft
from tessera.model.digest import weights_digest
from tessera.model.loss import IGNORE
from tessera.model.protogpt import ProtoGPT
from tessera.runs import Run
from tessera.training.parallel import World
from tessera.training.sft import SftProgram

if TYPE_CHECKING:
    from tests.training.conftest import Bench, Whole

ADAPTERS = ["ep1", "ep2", "ep3"]


@pytest.fixture
def based(bench: Bench, whole: Whole) -> Bench:
    """A workplace whose root holds the undisturbed base."""
    for file in (whole.root / "runs").rglob("*"):
        target = Path(bench.root.base) / file.relative_to(whole.root)
        if file.is_file() and "checkpoints" not in file.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    return bench


def damage(file: Path, change: Callable[[bytearray], None]) -> None:
    """Replace a file (linked into other roots) by a changed copy."""
    data = bytearray(file.read_bytes())
    change(data)
    file.unlink()
    file.write_bytes(data)


def speak(run: Run, adapter: str) -> Voice:
    return load_voice(run.root, run, adapter, torch.device("cpu"))


def folder_of(bench: Bench, run: Run, adapter: str = "ep1") -> Path:
    return Path(bench.root.base) / run.path("adapters", adapter)


def test_a_voice_from_the_conversations_to_the_answer(based: Bench) -> None:
    result = based.train(name="voice")
    run = based.only_run("sft")
    assert result.exit_code == 0
    assert run.record.base == {
        "run_id": based.only_run().id,
        "weights_digest": based.digest(based.only_run()),
    }
    held = based.points(run, "eval/loss")
    (base_loss,) = based.points(run, "eval/base_loss").values()
    steps = based.last_ending(run).step
    assert list(held) == [0, steps // 3, 2 * steps // 3, steps]
    assert held[0] == base_loss
    assert held[steps] < base_loss - 0.4

    assert based.root.children(run.path("adapters")) == ADAPTERS
    saved = based.events(run, "adapter/saved")
    assert [event.value["name"] for event in saved] == ADAPTERS
    digests = [based.digest(run, f"adapters/{name}") for name in ADAPTERS]
    assert [event.value["weights_digest"] for event in saved] == digests
    assert len(set(digests)) == 3
    base = load_base(based.only_run(), torch.device("cpu"))
    for name, digest in zip(ADAPTERS, digests, strict=True):
        state = load_file(folder_of(based, run, name) / "adapter_model.safetensors")
        assert weights_digest(state) == digest
        voice = speak(run, name)
        assert (voice.adapter_digest, voice.base.digest) == (digest, base.digest)

    voice = speak(run, "ep3")
    answer = voice.answer("noka?")
    assert answer == voice.answer("noka?", temperature=9.0), "no seed is greedy"
    many = voice.answers("noka?", seeds=[1, None, 2], max_new_tokens=8, temperature=1.5, top_p=1.0)
    alone = voice.answer("noka?", seed=2, max_new_tokens=8, temperature=1.5, top_p=1.0)
    assert many[2] == alone
    assert not any("<|" in said for said in many)
    with pytest.raises(InputError, match="This prompt cannot be answered: a prompt of "):
        voice.answer("much too long " * 40)

    # What stock peft makes of the published folder: the same logits up to rounding.
    theirs = PeftModel.from_pretrained(base.model, str(folder_of(based, run, "ep3")))
    ids = torch.tensor([base.tokenizer.encode("yes noka. ok.")])
    with torch.no_grad():
        expected, found = voice.base.model(ids), theirs(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_loss_is_the_mean_over_the_assistants_tokens_of_a_step(based: Bench) -> None:
    common = ("epochs=1", "log_every_steps=1", "optimizer.lr=1e-3")
    alone = based.train(*common, "batch.micro_batch=1", name="voice").run
    together = based.train(*common, "batch.micro_batch=4", name="voice", new=True).run
    losses = based.points(alone)
    # Padding and the cut into micro-batches only change the order of sums.
    assert losses == pytest.approx(based.points(together), abs=1e-5)

    base = load_base(based.only_run(), torch.device("cpu"))
    settings = based.settings(*common, name="voice")
    assert isinstance(settings, Sft)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    program = SftProgram(settings, base, alone.record.fingerprint, world, torch.float32)
    nats, count = 0.0, 0
    for inputs, targets in program.batch(0).micro:
        with torch.no_grad():
            shares = torch.log_softmax(base.model(inputs).double(), -1)
        for row, place in (targets != IGNORE).nonzero().tolist():
            nats -= float(shares[row, place, targets[row, place]])
            count += 1
    assert losses[1] == pytest.approx(nats / count, rel=1e-6)


def test_killed_at_several_moments_the_voice_is_the_same(based: Bench) -> None:
    whole = based.train("batch.micro_batch=1", name="voice").run
    adapters = f"runs/{whole.id}-2/adapters"

    def count(pattern: str) -> int:
        return len(list(Path(based.root.base).glob(f"runs/{whole.id}-2/{pattern}")))

    moments: list[Callable[[], bool]] = [
        lambda: count("checkpoints/*/COMPLETE") >= 1,
        lambda: based.root.exists(f"{adapters}/ep2/adapter_model.safetensors"),
        lambda: based.root.exists(f"{adapters}/ep3/adapter_model.safetensors"),
    ]
    arguments = ["--run-id", f"{whole.id}-2"]
    for reached in moments:
        process = based.start(*arguments, name="voice")
        based.until(process, reached)
        based.kill(process)
    assert based.train("batch.micro_batch=1", name="voice", run_id=f"{whole.id}-2").exit_code == 0

    run = based.runs("sft")[1]
    assert len(run.attempts()) == 4
    assert all(step for step in based.resumed(run)[1:])
    for key in ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "eval/base_loss"):
        assert based.points(run, key) == based.points(whole, key), key
    for name in ADAPTERS:
        assert based.digest(run, f"adapters/{name}") == based.digest(whole, f"adapters/{name}")
        assert speak(run, name).adapter_digest == based.digest(whole, f"adapters/{name}")


# -- the base --------------------------------------------------------------------------------------


def test_another_base_under_the_same_name_is_refused(
    based: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    based.crash(5, name="voice")
    run = based.only_run("sft")
    other = based.train("seed=1").run
    before = based.root.files("")
    refused = based.command(capfd, "--run-id", run.id, "--set", f"base={other.id}", name="voice")
    assert refused.code == 2
    assert refused.err.startswith(
        f"Error: Run {run.id} was started with base.weights_digest = {run.record.base}"[:60]
    )
    assert based.digest(other) in refused.err
    assert refused.err.count("\n") == 1
    assert based.root.files("") == before


def test_a_base_that_is_damaged_is_refused(based: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    file = Path(based.root.base) / based.model_file(based.only_run())

    def flip(data: bytearray) -> None:
        data[-3] ^= 1

    damage(file, flip)
    before = based.root.files("")
    refused = based.command(capfd, name="voice")
    assert refused.code == 2
    assert "has weights digest" in refused.err
    assert "it is damaged" in refused.err
    assert refused.err.count("\n") == 1
    assert based.root.files("") == before


def test_a_base_that_is_not_there_is_refused(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = bench.command(capfd, name="voice")
    assert refused.code == 2
    assert refused.err.startswith("Error: No run is called 'tiny' in ")
    bench.crash(3)
    refused = bench.command(capfd, name="voice")
    assert refused.code == 2
    assert "has not published a model yet" in refused.err
    with pytest.raises(InputError, match="has the weights digest dddddddddddd"):
        find_base(bench.root, "d" * 64)


# -- the adapter -----------------------------------------------------------------------------------


def tamper(where: str) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        if where == "cut":
            del data[len(data) // 2 :]
        elif where == "header":
            data[20] ^= 0x80
        else:
            data[-3] ^= 1

    return change


@pytest.mark.parametrize("where", ["header", "tensors", "cut"])
def test_a_damaged_adapter_is_refused(based: Bench, where: str) -> None:
    run = based.train("epochs=1", name="voice").run
    damage(folder_of(based, run) / "adapter_model.safetensors", tamper(where))
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors .* damaged"):
        speak(run, "ep1")


def test_an_adapter_that_does_not_fit_or_is_not_there_is_refused(based: Bench) -> None:
    run = based.train("epochs=1", name="voice").run
    with pytest.raises(InputError, match="has no adapter 'ep9'; it has: ep1"):
        speak(run, "ep9")
    file = folder_of(based, run) / "adapter_config.json"
    config = json.loads(file.read_bytes())
    file.write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(InputError, match=r"does not fit its base: .* has shape"):
        speak(run, "ep1")
    file.write_text(json.dumps({**config, "target_modules": ["attn.qkv"]}))
    with pytest.raises(InputError, match="differ in 12 tensors"):
        speak(run, "ep1")
    (folder_of(based, run) / "weights.json").unlink()
    with pytest.raises(InputError, match=r"weights\.json is not readable"):
        speak(run, "ep1")


def test_weights_fetched_from_a_store_are_kept_and_fetched_again_if_damaged(
    based: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a bucket: the files of such a root cannot be read in place."""
    run = based.only_run()
    fetched: list[str] = []
    plain = type(run.root).get_file

    def get_file(root: object, path: str, local: Path, **options: str) -> None:
        fetched.append(path)
        plain(run.root, path, local, **options)

    monkeypatch.setattr(type(run.root), "local_path", lambda root, path: None)
    monkeypatch.setattr(type(run.root), "get_file", get_file)
    for _ in range(2):
        assert isinstance(load_base(run, torch.device("cpu")).model, ProtoGPT)
    assert fetched == [based.model_file(run)]
    (kept,) = (based.cache / "weights").iterdir()
    damage(kept, tamper("tensors"))
    load_base(run, torch.device("cpu"))
    assert len(fetched) == 2
