"""Training with the fused operations, and with float8, through the whole of `tessera train`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tessera.errors import InputError
from tessera.model.fused.engine import Engine
from tessera.training.fused import FusedReplica, wants_fused
from tessera.training.loop import Loop
from tessera.training.parallel import World
from tessera.training.replica import Replica
from tests.training.conftest import as_options, assert_as_if_undisturbed
from tests.training.disturb import CALM, Disturbance

if TYPE_CHECKING:
    from tests.training.conftest import Bench, Whole

FUSED = ("kernels=fused", "batch.micro_batch=2")
EIGHT = ("precision=fp8", "batch.micro_batch=2")


@pytest.fixture(scope="module")
def eight(undisturbed: Callable[..., Whole]) -> Whole:
    return undisturbed(*EIGHT)


def test_fused_losses_are_those_of_torch(bench: Bench) -> None:
    plain = bench.points(bench.train("batch.micro_batch=2", "precision=float32").run)
    fused = bench.points(bench.train(*FUSED, "precision=float32", new=True).run)
    assert fused.keys() == plain.keys()
    assert fused == pytest.approx(plain, rel=1e-5)


def test_who_computes_is_recorded(bench: Bench) -> None:
    run = bench.train("precision=fp8", "batch.micro_batch=2").run
    (event,) = bench.events(run, "attempt/started")
    told = "the fused operations in float32, float8 products in 2 of 2 blocks, attention by math"
    assert event.value["computed_by"] == told
    plain = bench.train("precision=bf16", "kernels=torch", new=True).run
    (event,) = bench.events(plain, "attempt/started")
    assert event.value["computed_by"] == "torch in bf16"


def test_float8_learns_as_bf16_does(bench: Bench) -> None:
    calm = ("batch.micro_batch=2", "optimizer.lr=0.005")
    plain = bench.points(bench.train("precision=bf16", *calm).run)
    eight = bench.points(bench.train("precision=fp8", *calm).run)
    assert eight == pytest.approx(plain, abs=0.05)
    assert eight != pytest.approx(plain, abs=1e-6), "nothing was cast"


def test_precision_is_part_of_the_run_and_kernels_are_not(bench: Bench) -> None:
    plain = bench.train("precision=bf16").run
    assert bench.train("precision=bf16", "kernels=fused").run.id == plain.id
    assert bench.train("precision=fp8").run.id != plain.id


STOCHASTIC = (*EIGHT, "float8.weights=stochastic")


@pytest.mark.parametrize("settings", [FUSED, EIGHT, STOCHASTIC])
def test_a_kill_changes_nothing(
    bench: Bench, undisturbed: Callable[..., Whole], settings: tuple[str, ...]
) -> None:
    disturbance = Disturbance(die_before=17, keep_up=True)
    bench.die_then_finish(disturbance, *settings)
    assert bench.resumed(bench.only_run()) == [None, 15]
    assert_as_if_undisturbed(bench, undisturbed(*settings))


def test_a_preemption_in_mid_step_changes_nothing(bench: Bench, eight: Whole) -> None:
    """The micro-batches of the step that is given up have been seen by the scales."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(loop: Loop) -> None:
            loop.session.stop.signal = "SIGTERM"

        bench.before_step(8, stop, patch)
        assert bench.train(*EIGHT).exit_code == 75
    bench.forget_local()
    bench.train(*EIGHT)
    assert bench.resumed(bench.only_run()) == [None, 7]
    assert_as_if_undisturbed(bench, eight)


def test_blocks_that_misbehave_go_back_to_bf16_and_say_so(bench: Bench) -> None:
    def unfit(engine: Engine) -> dict[int, int]:
        return {1: 24} if 1 in engine.layers_in_float8() else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "take_cut", unfit)
        run = bench.train(*EIGHT, "model.layers=4").run
    (event,) = bench.events(run, "precision/changed")
    assert event.step == 3
    assert event.value["reason"] == (
        "values of block 1 do not fit float8's range; in bf16 from now on"
    )


def test_when_half_of_the_blocks_misbehave_all_go_back(bench: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "take_cut", lambda engine: {0: 24})
        run = bench.train(*EIGHT).run
    (event,) = bench.events(run, "precision/changed")
    assert event.value["reason"] == (
        "1 of 2 blocks have values that do not fit float8's range; the run goes on without "
        "float8, in bf16"
    )


def test_blocks_that_never_had_float8_do_not_count(bench: Bench) -> None:
    """Of the three that had it one may give it up, and two may not."""
    for unfit, left in (({1: 24}, [2, 3]), ({1: 24, 2: 24}, [])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "take_cut", lambda engine, unfit=unfit: unfit)
            run = bench.train(*EIGHT, "model.layers=4", "float8.keep_first=1", new=True).run
        (event,) = bench.events(run, "precision/changed")
        said = "values of block 1" if left else "2 of 3 blocks have values that do not fit"
        assert event.value["reason"].startswith(said)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("gradients=e4m3", "2 of 2"),
        ("weights=stochastic", "2 of 2"),
        ("sums=exact", "2 of 2"),
        ("keep_last=1", "1 of 2"),
    ],
)
def test_how_float8_multiplies_is_part_of_the_run(
    bench: Bench, eight: Whole, setting: str, told: str
) -> None:
    run = bench.train(*EIGHT, f"float8.{setting}").run
    assert run.id != bench.train(*EIGHT).run.id
    (event,) = bench.events(run, "attempt/started")
    assert f"float8 products in {told} blocks" in event.value["computed_by"]
    same = all(bench.points(run, key) == expected for key, expected in eight.points.items())
    assert same == (setting == "sums=exact"), "a CPU sums all products alike"


def test_a_block_that_went_back_stays_so_after_a_kill(bench: Bench) -> None:
    states: list[list[int]] = []

    def note(loop: Loop) -> None:
        states.append(loop._replica._engine.layers_in_float8())  # type: ignore[attr-defined]

    def unfit(engine: Engine) -> dict[int, int]:
        return {1: 24}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "take_cut", unfit)
        bench.crash(8, *EIGHT, "model.layers=4")
    with pytest.MonkeyPatch.context() as patch:
        bench.before_step(6, note, patch)
        bench.train(*EIGHT, "model.layers=4")
    assert states == [[0, 2, 3]]


def test_a_run_that_went_back_continues_without_float8(bench: Bench) -> None:
    """Whichever process continues it: the rollback is in the root, and says so."""
    with Disturbance(nan=(80, 88, 96), keep_up=True).here():
        run = bench.train("precision=fp8", *CALM).run
    assert run.rollbacks()
    (event,) = bench.events(run, "precision/changed")
    assert event.value["reason"] == "the run goes on without float8, in bf16"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["precision=fp8", "kernels=torch"], "needs the fused operations, which kernels: torch"),
        (["precision=fp8", "deterministic=true"], "which deterministic: true rules out"),
        (["kernels=fused", "attention=flash4"], "cannot be used here: it needs an NVIDIA GPU, not"),
        (["kernels=fused", "deterministic=true"], "add up in no fixed order on a GPU; set"),
        (["precision=bf16", "float8.sums=exact"], "and precision is bf16; set precision: fp8, or"),
        (["precision=fp8", "model.d_model=24"], "are multiples of 16, and 24 is none; change it"),
    ],
)
def test_what_does_not_go_together_is_refused(
    bench: Bench, capfd: pytest.CaptureFixture[str], settings: list[str], said: str
) -> None:
    done = bench.command(capfd, *as_options(*settings))
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") <= 2
    assert bench.runs() == []


@pytest.mark.parametrize("form", ["torch", "fused"])
def test_a_forbidden_step_changes_no_weight_and_leaves_no_gradient(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """And one that is not forbidden is that of torch, to the bit on a CPU."""
    after: dict[str, dict[str, Tensor]] = {}

    def apply(replica: Replica, optimizer: torch.optim.Optimizer, forbidden: Tensor) -> None:
        before = {n: p.detach().clone() for n, p in replica.trainable.items()}
        plain(replica, optimizer, torch.ones(()))
        for name, parameter in replica.trainable.items():
            assert parameter.equal(before[name]), name
            assert parameter.grad is None or not bool(parameter.grad.any()), name
        after["weights"] = before

    kind: Any = FusedReplica if form == "fused" else Replica
    plain = kind.apply
    monkeypatch.setattr(kind, "apply", apply)
    settings = FUSED if form == "fused" else ("kernels=torch", "batch.micro_batch=2")
    bench.train(*settings, "precision=float32", new=True)
    assert after["weights"], "it was called"


@pytest.mark.parametrize(
    ("capability", "settings", "fused"),
    [
        ((9, 0), (), True),
        ((8, 0), (), False),
        ((10, 0), (), False),
        ((9, 0), ("kernels=torch",), False),
        ((9, 0), ("precision=float32",), False),
        ((9, 0), ("deterministic=true",), False),
        ((9, 0), ("compile=on",), False),
        ((9, 0), ("compile=off",), False),
        ((8, 0), ("kernels=fused",), True),
    ],
)
def test_auto_takes_the_fused_operations_where_they_were_measured(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    settings: tuple[str, ...],
    fused: bool,
) -> None:
    """There is no such GPU here, so torch is told what it would say of one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    experiment = bench.settings("precision=bf16", "compile=auto", *settings)
    assert wants_fused(experiment, World(0, 1, 0, 1, torch.device("cuda"))) == fused


def test_several_gpus_are_torchs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    world = World(0, 2, 0, 2, torch.device("cuda"))
    assert not wants_fused(bench.settings("precision=bf16", "compile=auto"), world)


def test_fine_tuning_knows_no_float8(bench: Bench) -> None:
    with pytest.raises(InputError, match="precision"):
        bench.settings("precision=fp8", name="voice")
