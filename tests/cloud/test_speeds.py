"""Which speed a plan takes for a card: measured, projected and called so, or none."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from tessera.cloud.cards import CARDS, card_named, card_of_offer
from tessera.cloud.speeds import Measurement, own_measurement, shipped, speed_of
from tessera.experiment import Experiment, load_experiment

REPOSITORY = Path(__file__).parents[2]


def experiment(name: str = "tessera_1b", *overrides: str) -> Experiment:
    return load_experiment(REPOSITORY / "experiments" / f"{name}.yaml", overrides)


@pytest.mark.parametrize("measurement", shipped(), ids=lambda m: f"{m.gpu}-{m.precision}-{m.kind}")
def test_every_shipped_figure_stands_in_the_page_it_names(measurement: Measurement) -> None:
    page = (REPOSITORY / measurement.source).read_text()
    assert f"{measurement.tokens_per_s:,.0f}" in page
    assert measurement.card is not None
    assert 0.2 < measurement.mfu < 1.0
    script = next((w for w in measurement.command.split() if w.startswith("benchmarks/")), None)
    assert script is None or (REPOSITORY / script).exists()


def test_the_measured_card_gets_its_measured_speed() -> None:
    """A whole `tessera train`, not the faster bare step."""
    speed = speed_of(experiment(), card_named("H200"), 1, shipped())
    assert (speed.tokens_per_s, speed.how) == (74739, "measured")
    assert "benchmarks/throughput.md" in speed.basis


def test_float8_and_torch_s_own_kernels_have_speeds_of_their_own() -> None:
    h200 = card_named("H200")
    assert speed_of(experiment("tessera_1b_fp8"), h200, 1, shipped()).tokens_per_s == 97976
    plain = experiment("tessera_1b", "kernels=torch")
    assert speed_of(plain, h200, 1, shipped()).tokens_per_s == 66593
    assert speed_of(experiment(), h200, 2, shipped()).tokens_per_s == 127910


def test_another_card_of_the_generation_is_projected_by_flops() -> None:
    """MFU of the H200 x the other card's data sheet / FLOPs a token, and called a projection."""
    speed = speed_of(experiment(), card_named("H100 PCIe"), 1, shipped())
    assert speed.how == "projected"
    assert speed.tokens_per_s == pytest.approx(74739 * 756 / 989)
    assert "MFU 55%" in speed.basis
    assert "H200" in speed.basis


def test_another_shape_is_projected_from_the_nearest() -> None:
    wider = experiment("tessera_1b", "model.layers=16", "kernels=torch")
    speed = speed_of(wider, card_named("H200"), 1, shipped())
    assert speed.how == "projected"
    assert "66,593" in speed.basis
    assert speed.tokens_per_s is not None
    assert 66593 * 1.5 < speed.tokens_per_s < 66593 * 2.2


def test_an_mlp_of_another_width_is_another_shape() -> None:
    wide = experiment("tessera_1b", "model.mlp_ratio=8")
    speed = speed_of(wide, card_named("H200"), 1, shipped())
    assert speed.how == "projected"
    assert speed.tokens_per_s is not None
    assert speed.tokens_per_s < 74739


@pytest.mark.parametrize(
    ("name", "overrides", "card"),
    [
        ("tessera_1b", (), "A100"),  # an architecture that nobody measured
        ("tessera_1b", (), "RTX 5090"),
        ("tessera_1b", ("precision=float32",), "H200"),
        ("smoke", (), "H200"),  # a thousandth of the size: MFU would say nothing
        ("tessera_1b_sft", (), "H200"),
        ("tessera_1b", (), None),
    ],
)
def test_what_nobody_measured_has_no_figure(
    name: str, overrides: tuple[str, ...], card: str | None
) -> None:
    found = card_named(card) if card else None
    speed = speed_of(experiment(name, *overrides), found, 1, shipped())
    assert (speed.tokens_per_s, speed.how) == (None, "not measured")
    assert speed.basis


def test_what_others_published_counts_only_where_ours_is_not_even_projected() -> None:
    told = [m for m in shipped() if m.kind == "published"]
    h100 = card_named("H100 SXM")
    speed = speed_of(experiment(), h100, 1, told)
    assert (speed.tokens_per_s, speed.how) == (46700, "published")
    assert speed_of(experiment(), h100, 1, shipped()).how == "projected"
    assert speed_of(experiment("tessera_1b_fp8"), h100, 1, told).tokens_per_s is None


def test_a_run_of_one_s_own_counts_before_ours() -> None:
    own = own_measurement(
        experiment(), device="NVIDIA H100 80GB HBM3", gpus=1, tokens_per_s=71_234.0,
        run_id="tessera-1b-00c0ffee", day=datetime.date(2026, 12, 1),
    )  # fmt: skip
    assert own is not None
    speed = speed_of(experiment(), card_named("H100 SXM"), 1, (own, *shipped()))
    assert (speed.tokens_per_s, speed.how) == (71_234.0, "measured")
    assert "run tessera-1b-00c0ffee" in speed.basis


def test_a_run_on_a_processor_is_no_measurement() -> None:
    told = {"gpus": 4, "tokens_per_s": 9e3, "run_id": "x", "day": datetime.date(2026, 12, 1)}
    own = own_measurement(experiment(), device="CPU AMD EPYC", **told)  # type: ignore[arg-type]
    assert own is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("H100 PCIE", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("H100_SXM", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", None),
        ("H100", None),  # which of the three?
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("RTX4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", None),
    ],
)
def test_a_card_by_any_of_its_names(text: str, name: str | None) -> None:
    card = card_named(text)
    assert (card.name if card else None) == name


def test_catalog_rows_tell_the_form_factor_in_their_own_ways() -> None:
    rows = {
        ("Vast", "1x-H100_SXM-32-65536", "H100"): "H100 SXM",
        ("Vast", "1x-H100_NVL-32-65536", "H100"): "H100 NVL",
        ("Lambda", "gpu_1x_h100_sxm5", "H100"): "H100 SXM",
        ("Lambda", "gpu_1x_h100_pcie", "H100"): "H100 PCIe",
        ("RunPod", "1x_H100_SECURE", "H100"): "H100 PCIe",
        ("RunPod", "1x_H100-SXM_SECURE", "H100-SXM"): "H100 SXM",
        ("Unheard", "standard-h100", "H100"): None,
    }
    for row, name in rows.items():
        card = card_of_offer(*row)
        assert (card.name if card else None) == name, row


def test_every_card_knows_its_data_sheet_and_its_own_name() -> None:
    for card in CARDS:
        assert card.peak_flops > 1e14
        assert card_named(card.name) == card
        assert card_named(card.reported) == card
