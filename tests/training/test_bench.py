"""``tessera bench``: its figures follow from each other, and what it measures is what trains."""

from __future__ import annotations

import dataclasses
import statistics
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tessera.errors import InputError
from tessera.experiment import Pretrain, load_experiment
from tessera.ledger.prices import HourlyPrice
from tessera.model.peak import Peak
from tessera.model.probe import AttentionSpeed, Rates, describe_card
from tessera.model.shape import ModelShape, flops_per_token, parameters
from tessera.training.bench import ladder, session
from tessera.training.bench.document import (
    Basis,
    _reference,
    attention_entry,
    floor_entry,
    ladder_row,
    opening,
    quick_row,
)
from tessera.training.bench.embedded import experiment_to_measure, is_reference
from tessera.training.bench.floor import Ceilings, elementwise_bytes, floor_of_step
from tessera.training.bench.ladder import (
    NAMES,
    TECHNIQUES,
    Measured,
    Technique,
    applied,
    best_of,
    chosen,
    reason_of,
    same_as,
)
from tessera.training.bench.quick import (
    Depth,
    Projection,
    depths,
    measure_quickly,
    on_the_line,
    project,
    with_micro_batch,
)
from tessera.training.bench.runner import StepRunner, Timing
from tessera.training.bench.session import Bench as Measuring
from tessera.training.bench.session import Subject
from tessera.training.bench.tokens import corpus_batches, random_batches
from tessera.training.pretrain import model_shape

if TYPE_CHECKING:
    from tests.training.conftest import Bench

CPU = torch.device("cpu")
DOCS = Path(__file__).parents[2] / "docs" / "speed.md"
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = ("model.layers=2", "model.d_model=32", "model.vocab_size=300", "batch.tokens_per_step=256")
HERE = HourlyPrice(2.0, "--price")


@pytest.fixture(autouse=True)
def _a_peak_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "peak_flops", lambda device, dtype: Peak(1e12, "the tests"))


def small(*overrides: str) -> Pretrain:
    return experiment_to_measure(None, (*SMALL, *overrides), "cpu")[0]


def timing(*seconds: float, peak: int | None = None) -> Timing:
    return Timing(list(seconds), first_s=9.0, peak_bytes=peak, losses=[])


def basis(experiment: Pretrain, ceilings: Ceilings | None = None) -> Basis:
    shape = model_shape(experiment.model)
    peak = Peak(2e12, "the tests")
    return Basis(experiment, shape, 4, peak, HERE, own_attention="math", ceilings=ceilings)


# -- figures ---------------------------------------------------------------------------------------


def test_the_figures_of_a_row_follow_from_the_time_of_a_step() -> None:
    experiment = small("tokens=256000")
    seconds = [0.5, 0.1, 0.2, 0.3, 0.4]
    measured = Measured(TECHNIQUES[0], experiment, 2, timing(*seconds, peak=2**30))
    row = ladder_row(basis(experiment), measured)
    assert row["steps"] == 5
    assert row["step_s"] == pytest.approx({"median": 0.3, "p10": 0.14, "p90": 0.46})
    assert row["tokens_per_s"] * row["step_s"]["median"] == pytest.approx(256)
    assert row["hours"] * 3600 == pytest.approx(1000 * 0.3)
    assert row["usd"] == pytest.approx(row["hours"] * 2.0)
    flops = flops_per_token(model_shape(experiment.model), experiment.sequence)
    assert row["mfu"] == pytest.approx(flops * 256 / 0.3 / 2e12)
    assert row["peak_memory_bytes"] == 2**30
    assert row["first_step_s"] == 9.0
    assert row["reason"] is None
    assert measured.tokens_per_s == row["tokens_per_s"]


def test_without_a_price_there_are_no_dollars() -> None:
    experiment = small()
    nothing = dataclasses.replace(basis(experiment), price=HourlyPrice(None, "unknown"))
    row = ladder_row(nothing, Measured(TECHNIQUES[0], experiment, 2, timing(1.0, 1.0)))
    assert row["usd"] is None
    assert row["hours"] > 0


def ceilings(**changes: Any) -> Ceilings:
    values: dict[str, Any] = {
        "copy": 1e9,
        "matrix": Rates(blocks=1e9, head=2e9),
        "float8": Rates(blocks=4e9, head=0.0),
        "attention": [AttentionSpeed("a", 1e9, 1e9), AttentionSpeed("b", 5e8, 4e9)],
    }
    return Ceilings(**{**values, **changes})


def test_the_floor_is_work_over_speed() -> None:
    shape = ModelShape(layers=3, d_model=10, heads=2, context=8, vocab_size=20)
    floor = floor_of_step(shape, 8, 16, ceilings(), element=2, float8=False)
    assert floor is not None
    assert floor.blocks_s == pytest.approx(6 * 16 * 3 * 12 * 10 * 10 / 1e9)
    assert floor.head_s == pytest.approx(6 * 16 * 10 * 20 / 2e9)
    forward = 2 * 16 * 8 * 10
    assert floor.attention_s == pytest.approx(3 * (forward / 5e8 + 2.5 * forward / 4e9))
    assert floor.optimizer_s == pytest.approx(38 * parameters(shape) / 1e9)
    # A block's norms 16 and GELU 5 x 4 widths, 12 widths around the blocks, the logits three times.
    assert floor.elementwise_s == pytest.approx(16 * 2 * (3 * 360 + 120 + 60) / 1e9)
    parts = dataclasses.astuple(floor)
    assert floor.total_s == pytest.approx(sum(parts))


def test_float8_multiplies_blocks_faster_and_casts() -> None:
    shape = ModelShape(layers=3, d_model=10, heads=2, context=8, vocab_size=20)
    plain = floor_of_step(shape, 8, 16, ceilings(), element=2, float8=False)
    eight = floor_of_step(shape, 8, 16, ceilings(), element=2, float8=True)
    assert plain is not None
    assert eight is not None
    assert eight.blocks_s == pytest.approx(plain.blocks_s / 4)
    assert (eight.head_s, eight.attention_s) == (plain.head_s, plain.attention_s)
    assert elementwise_bytes(shape, 16, 2, True) - elementwise_bytes(shape, 16, 2, False) == (
        16 * 24 * 3 * 10
    )


@pytest.mark.parametrize(
    ("float8", "changes"), [(True, {"float8": None}), (False, {"attention": []})]
)
def test_no_floor_without_the_ceiling_that_it_stands_on(
    float8: bool, changes: dict[str, Any]
) -> None:
    shape = ModelShape(layers=1, d_model=8, heads=1, context=8, vocab_size=20)
    found = floor_of_step(shape, 8, 16, ceilings(**changes), element=2, float8=float8)
    assert found is None


def test_the_fraction_is_the_floor_over_the_step() -> None:
    experiment = small()
    known = basis(experiment, ceilings())
    row = ladder_row(known, Measured(TECHNIQUES[0], experiment, 2, timing(0.5, 0.5)))
    floor = known.floor(False)
    assert floor is not None
    assert row["ceiling_fraction"] == pytest.approx(floor.total_s / 0.5)
    assert ladder_row(
        basis(experiment), Measured(TECHNIQUES[0], experiment, 2, timing(0.5, 0.5))
    )["ceiling_fraction"] is None  # fmt: skip


# -- few layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "measured"), [(32, (2, 6)), (7, (2, 6)), (6, (6,)), (2, (2,)), (1, (1,))]
)
def test_which_depths_are_measured(layers: int, measured: tuple[int, ...]) -> None:
    assert depths(layers) == measured


@pytest.mark.parametrize(("layers", "measured"), [(32, (5, 9)), (10, (5, 9)), (9, (9,))])
def test_blocks_kept_in_bf16_are_in_both_depths(layers: int, measured: tuple[int, ...]) -> None:
    assert depths(layers, kept=3) == measured


def test_a_linear_cost_is_projected_exactly() -> None:
    """0.05 s and 3 GiB whatever the depth, 0.01 s and 1 GiB a layer; the median counts."""

    def at(layers: int) -> Depth:
        step = 0.05 + 0.01 * layers
        return Depth(layers, timing(step, 7 * step, step, peak=(3 + layers) * 2**30))

    found = project([at(2), at(6)], 32)
    assert found.layers == (2, 6)
    assert found.step_s == pytest.approx(0.05 + 0.32)
    assert found.peak_bytes == 35 * 2**30
    assert found.steps == 3
    whole = project([at(6)], 6)
    assert whole.step_s == pytest.approx(0.11)
    assert on_the_line([(2, 1.0), (6, 3.0)], 4) == pytest.approx(2.0)


def test_a_deeper_model_that_was_faster_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="something else keeps this machine busy"):
        project([Depth(2, timing(0.2)), Depth(6, timing(0.1))], 32)


def test_a_projection_is_called_one() -> None:
    experiment = small("model.layers=8")
    few = Projection((2, 6), 0.5, 1.0, None, 5)
    row = quick_row(basis(experiment), experiment, few, None)
    assert row["projected_from_layers"] == [2, 6]
    assert row["tokens_per_s"] * 0.5 == pytest.approx(256)
    assert row["step_s"] == {"median": 0.5, "p10": None, "p90": None}
    assert row["attention"] is None
    all_of_it = dataclasses.replace(few, layers=(2,), attention="cudnn")
    whole = quick_row(basis(experiment), experiment, all_of_it, None)
    assert whole["projected_from_layers"] is None
    assert whole["attention"] == "cudnn"


def test_shallow_models_are_really_measured() -> None:
    experiment = small("model.layers=7")
    ticks: list[int] = []
    found, reason = measure_quickly(
        experiment, random_batches(experiment, CPU), CPU, 2, lambda: ticks.append(1)
    )
    # On a busy machine six layers may be faster than two; then it says so.
    assert (found is None) == (reason is not None)
    assert len(ticks) == 2 * (2 + 2)
    if found is not None:
        assert found.layers == (2, 6)
        assert found.steps == 2


def test_a_size_left_to_the_machine_is_chosen_for_the_whole_model() -> None:
    experiment = with_micro_batch(small("batch.micro_batch=auto"), CPU)
    assert experiment.batch.micro_batch == 4  # all of a step's samples; they fit anywhere
    assert with_micro_batch(small(), CPU).batch.micro_batch == 2


# -- what is measured ------------------------------------------------------------------------------


def test_the_embedded_reference_is_the_shipped_one() -> None:
    embedded, source = experiment_to_measure(None, (), "cuda")
    shipped = load_experiment(EXPERIMENTS / "tessera_1b.yaml")
    assert isinstance(shipped, Pretrain)
    assert embedded.identity == shipped.identity
    for name in ("batch", "tokens", "precision", "compile", "recompute"):
        assert getattr(embedded, name) == getattr(shipped, name), name
    assert embedded.price is not None
    assert shipped.price is not None
    assert embedded.price.usd_per_hour == shipped.price.usd_per_hour
    assert source == "embedded tessera-1b"
    assert is_reference(shipped)
    assert not is_reference(small())


def test_the_embedded_experiments_take_overrides() -> None:
    assert experiment_to_measure(None, ("batch.micro_batch=8",), "cuda")[0].batch.micro_batch == 8
    with pytest.raises(InputError, match=r"--set model.layers=0: model.layers"):
        experiment_to_measure(None, ("model.layers=0",), "cpu")


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_what_is_measured_is_what_trains(bench: Bench, kernels: str) -> None:
    """The losses of the measured steps are those of `tessera train`, to the last bit."""
    settings = ("log_every_steps=1", "batch.micro_batch=2", f"kernels={kernels}")
    trained = bench.points(bench.train(*settings).run)
    experiment = bench.settings(*settings)
    assert isinstance(experiment, Pretrain)
    batches = corpus_batches(experiment, bench.root, CPU, count=8)
    runner = StepRunner(experiment, CPU)
    measured = runner.time(batches, 5, 3, lambda: None)
    assert len(measured.seconds) == 5
    assert dict(enumerate(measured.losses, 1)) == {step: trained[step] for step in range(1, 9)}


def test_a_loss_that_is_no_number_is_no_measurement() -> None:
    experiment = small()
    runner = StepRunner(experiment, CPU)
    runner.replica.trainable["norm.weight"].data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss is not a number"):
        runner.time(random_batches(experiment, CPU), 3, 3, lambda: None)


def test_random_tokens_are_as_frequent_as_words() -> None:
    experiment = small("batch.tokens_per_step=65536", "tokens=65536")
    batches = random_batches(experiment, CPU)
    inputs, targets = batches.steps[0]
    assert inputs.shape == targets.shape == (1024, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    counts = torch.bincount(inputs.flatten(), minlength=300)
    assert len(counts) == 300
    weights = 1 / (torch.arange(300) + 3.7)
    expected = weights / weights.sum() * inputs.numel()
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()
    assert not torch.equal(inputs, batches.steps[1][0])
    again = random_batches(experiment, CPU)
    assert torch.equal(inputs, again.steps[0][0])
    micro = batches.micro_batches(len(batches.steps), 256)
    assert len(micro) == 4
    assert torch.equal(micro[1][0], inputs[256:512])


def test_a_corpus_of_another_tokenizer_is_refused(bench: Bench) -> None:
    experiment = bench.settings("model.vocab_size=64")
    assert isinstance(experiment, Pretrain)
    with pytest.raises(InputError, match=r"model.vocab_size is 64, the tokenizer of corpus tiny"):
        corpus_batches(experiment, bench.root, CPU, count=1)


# -- the ladder ------------------------------------------------------------------------------------


def test_rows_are_chosen_by_name() -> None:
    assert [t.name for t in chosen(())] == list(NAMES)
    assert [t.name for t in chosen(("fp8", "eager"))] == ["eager", "fp8"]
    with pytest.raises(InputError, match="--only fast is no row of the ladder; choose of eager, "):
        chosen(("fast",))


def named(name: str) -> Technique:
    return next(technique for technique in TECHNIQUES if technique.name == name)


def test_a_technique_is_what_one_would_write_into_the_experiment() -> None:
    experiment = small("precision=fp8")
    eager = applied(named("eager"), experiment, CPU)
    assert (eager.kernels, eager.compile, eager.precision) == ("torch", "off", "float32")
    fused = applied(named("fused-x2"), small("precision=bf16"), CPU)
    assert (fused.kernels, fused.precision, fused.batch.micro_batch) == ("fused", "bf16", 4)
    eight = applied(named("fp8"), small("precision=bf16"), CPU)
    assert (eight.precision, eight.batch.micro_batch) == ("fp8", 2)
    flash4 = applied(named("fused-flash4"), small(), CPU)
    assert (flash4.kernels, flash4.attention) == ("fused", "flash4")


def test_the_experiments_attention_stays_in_rows_that_name_none() -> None:
    """But plain torch has no such choice, so there it is to be taken out again."""
    experiment = small("kernels=fused", "attention=math")
    known = basis(experiment)

    def row_of(name: str) -> tuple[str, dict[str, Any]]:
        changed = applied(named(name), experiment, CPU)
        row = ladder_row(known, Measured(named(name), changed, 2, None))
        return changed.attention, row["settings"]

    assert row_of("fused") == ("math", {"kernels": "fused"})
    assert row_of("fused-cudnn") == ("cudnn", {"kernels": "fused", "attention": "cudnn"})
    plain = {"kernels": "torch", "compile": "off", "attention": "auto"}
    assert row_of("eager") == ("auto", plain)


def test_how_float8_multiplies_is_taken_out_of_rows_without_it() -> None:
    experiment = small("precision=fp8", "float8.gradients=e4m3")
    known = basis(experiment)
    for name, gradients in (("fp8", "e4m3"), ("fused", None), ("compiled", None)):
        changed = applied(named(name), experiment, CPU)
        assert (changed.float8 and changed.float8.gradients) == gradients
        settings = ladder_row(known, Measured(named(name), changed, 2, None))["settings"]
        assert settings.get("float8", "as it is") == ("as it is" if gradients else None)


def test_an_attention_that_is_not_here_ends_it_before_anything_is_measured() -> None:
    experiment = small("kernels=fused", "attention=cudnn")
    with pytest.raises(InputError, match="--set attention=cudnn: attention backend 'cudnn' cannot"):
        measuring(experiment)


@pytest.mark.parametrize(
    ("own", "others", "same"),
    [
        ("cudnn", NAMES, "fused"),
        ("flash4", NAMES, None),
        ("cudnn", ("fused-cudnn", "fused-x2", "fp8"), None),
    ],
)
def test_a_row_that_names_what_is_taken_anyway_measures_the_same(
    own: str, others: Sequence[str], same: str | None
) -> None:
    assert same_as(named("fused-cudnn"), chosen(others), own) == same
    assert same_as(named("fused"), chosen(others), own) is None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("batch.micro_batch=4", "micro-batch 8 does not divide the step's 4 samples"),
        ("batch.micro_batch=auto", "batch.micro_batch is auto, so as many as fit already"),
        ("deterministic=true", "the fused operations add up in no fixed order"),
    ],
)
def test_a_technique_that_the_experiment_rules_out(setting: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        applied(named("fused-x2"), small(setting), CPU)


def test_reasons_are_few_words() -> None:
    assert reason_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")) == (
        "out of memory"
    )
    missing = ModuleNotFoundError("No module named 'triton'", name="triton")
    assert reason_of(missing) == "triton is not installed"
    assert reason_of(InputError("Set it.")) == "Set it"
    assert reason_of(RuntimeError("no kernel\nmore")) == "RuntimeError: no kernel"
    assert len(reason_of(RuntimeError("x" * 500))) == 160
    assert reason_of(RuntimeError("")) == "RuntimeError"


def measuring(experiment: Pretrain, told: Any = lambda what, done, total: None) -> Measuring:
    batches = random_batches(experiment, CPU)
    return Measuring(Subject(experiment, "the tests", batches, CPU, "a CPU", HERE), told)


BROKEN = Technique("broken", {"kernels": "fused", "attention": "nonsense"})
MATH = Technique("fused-math", {"kernels": "fused", "attention": "math"})


def test_a_row_that_fails_does_not_end_the_rest() -> None:
    told: list[tuple[str, int, int]] = []
    bench = measuring(small(), lambda *where: told.append(where))
    rows = (BROKEN, MATH, *chosen(("eager", "fused-cudnn", "fp8", "fused")))
    bench.ladder(rows, 2)
    document = bench.document
    by_name = {row["name"]: row for row in document["rows"]}
    assert list(by_name) == [row.name for row in rows]
    assert by_name["broken"]["reason"].startswith("Input should be 'auto', 'flash4'")
    assert by_name["fused-math"]["reason"] == "fused takes math anyway"
    assert by_name["fused-cudnn"]["reason"].endswith("it needs an NVIDIA GPU, not cpu")
    assert by_name["fused-cudnn"]["attention"] is None
    assert by_name["fp8"]["reason"] == "a CPU has no float8 products"
    for name in ("eager", "fused"):
        row = by_name[name]
        assert row["reason"] is None
        assert row["steps"] == 2
        assert row["tokens_per_s"] * row["step_s"]["median"] == pytest.approx(256)
        assert row["ceiling_fraction"] > 0
    assert by_name["fused"]["attention"] == "math"
    assert by_name["eager"]["attention"] is None
    assert by_name["fused"]["settings"] == {"kernels": "fused"}
    assert document["best"] in ("eager", "fused")
    assert document["floor"]["plain"]["total_s"] > 0
    assert document["floor"]["float8"] is None
    done = [where[1] for where in told]
    assert done == sorted(done)
    assert told[-1][1:] == (told[-1][2], told[-1][2])


def test_alone_a_row_is_measured_with_the_attention_that_it_names() -> None:
    bench = measuring(small())
    bench.ladder((MATH,), 2)
    (row,) = bench.document["rows"]
    assert (row["reason"], row["attention"]) == (None, "math")
    assert row["settings"] == {"kernels": "fused", "attention": "math"}
    assert bench.document["best"] == "fused-math"


def test_an_interruption_leaves_what_was_measured() -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "fused":
            raise KeyboardInterrupt

    bench = measuring(small(), stop)
    bench.ladder((named("eager"), named("fused"), named("fused-x2")), 2)
    assert bench.document["interrupted"]
    assert [row["name"] for row in bench.document["rows"]] == ["eager"]
    assert bench.document["best"] == "eager"


def rows_of(**speeds: float) -> list[Measured]:
    experiment = small()
    every = (*TECHNIQUES, BROKEN)
    return [
        Measured(t, experiment, 2, timing(256 / speeds[t.name], 256 / speeds[t.name]))
        if speeds[t.name]
        else Measured(t, None, None, None, "broken")
        for t in every
        if t.name in speeds
    ]


def test_the_best_row_is_the_fastest() -> None:
    rows = rows_of(**{"eager": 10.0, "fused-flash4": 40.0, "fused": 30.0, "broken": 0.0})
    best = best_of(rows)
    assert best is not None
    assert best.technique.name == "fused-flash4"
    assert best_of(rows_of(broken=0.0)) is None


def test_the_micro_batch_of_the_best_row_is_told() -> None:
    experiment = small("precision=fp8")
    twice = Measured(named("fused-x2"), experiment, 4, timing(1.0, 1.0))
    row = ladder_row(basis(experiment), twice)
    assert row["settings"] == {"kernels": "fused", "precision": "bf16", "batch.micro_batch": 4}


def test_memory_is_released_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next row begins, nothing of the last one is alive."""
    alive: list[weakref.ref[StepRunner]] = []
    at_start: list[int] = []

    class Seen(StepRunner):
        def __init__(self, *args: Any, **options: Any) -> None:
            at_start.append(sum(runner() is not None for runner in alive))
            super().__init__(*args, **options)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(ladder, "StepRunner", Seen)
    measuring(small()).ladder(chosen(("eager", "fused-cudnn", "fused", "fused-x2")), 2)
    assert at_start == [0, 0, 0, 0]


# -- the document ----------------------------------------------------------------------------------


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_every_key_of_the_document_is_explained() -> None:
    experiment, source = experiment_to_measure(None, (), "cuda")
    known = basis(experiment, ceilings())
    bench = measuring(small())
    bench.ladder((named("fused-x2"),), 2)
    document = bench.document
    whole = opening(known, source, "random", describe_card(CPU, "a CPU"), quick=False)
    assert set(whole) == set(document)
    assert whole["reference"] == {
        "tokens_per_s": 46_700, "hours": pytest.approx(145.7), "usd": pytest.approx(315),
        "note": "published, other hardware: one H100 SXM 80 GB",
    }  # fmt: skip
    whole["floor"]["plain"] = floor_entry(known.floor(False))
    entry = attention_entry("cudnn", None, "it is not here")
    text = DOCS.read_text("utf-8")
    settings = {"kernels", "compile", "precision", "batch.micro_batch"}
    keys = {*keys_of(whole), *keys_of(document), *keys_of(entry)} - settings
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_the_reference_run_is_scaled_to_the_tokens() -> None:
    half = experiment_to_measure(None, ("tokens=12252413952",), "cuda")[0]
    reference = _reference(half)
    assert reference is not None
    assert reference["hours"] == pytest.approx(145.7 / 2)
    assert _reference(small()) is None


def test_statistics_agree() -> None:
    """The median of a row is the median that orders the rows."""
    experiment = small()
    seconds = (0.1, 0.4, 0.2, 0.3)
    measured = Measured(named("eager"), experiment, 2, timing(*seconds))
    row = ladder_row(basis(experiment), measured)
    assert row["step_s"]["median"] == pytest.approx(statistics.median(seconds))
