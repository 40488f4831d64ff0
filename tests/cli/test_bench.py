"""The command: what it prints, what it refuses, and how Ctrl-C ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tessera.cli._bench_view import print_document
from tessera.cli.common import run_command
from tessera.cli.main import tessera
from tessera.cloud.preflight import tokens_per_s_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PATIENCE_S = 120.0
MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "kind": "pretrain",
    "seed": 1,
    "model": {"layers": 7, "d_model": 16, "heads": 2, "context": 16, "vocab_size": 64},
    "data": {"corpus": "nowhere"},
    "optimizer": {"lr": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 2, "final_lr": 0.0},
    "batch": {"tokens_per_step": 64, "micro_batch": 2},
    "tokens": 64_000,
    "evaluation": {"every_steps": 10},
    "checkpoint": {"every_steps": 10},
    "price": {"usd_per_hour": 3.0},
}


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), "utf-8")
    return str(path)


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(tessera, ["bench", *arguments])
    out, err = capfd.readouterr()
    return code, out, err


def measured(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = said(capfd, *arguments, "--json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def test_the_ladder_as_a_document(
    minimal: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_USD_PER_HOUR", "5")
    found = measured(capfd, minimal, "--only", "eager", "--only", "fp8", "--steps", "2")
    assert [row["name"] for row in found["rows"]] == ["eager", "fp8"]
    eager, eight = found["rows"]
    assert eager["tokens_per_s"] * eager["step_s"]["median"] == pytest.approx(64)
    assert eager["hours"] * 3600 == pytest.approx(1000 * eager["step_s"]["median"])
    assert eager["usd"] == pytest.approx(5 * eager["hours"])
    assert eight["reason"] == "a CPU has no float8 products"
    assert eight["tokens_per_s"] is None
    assert found["best"] == "eager"
    assert tokens_per_s_of(found) == eager["tokens_per_s"]  # what a preflight reads
    assert found["price"] == {"usd_per_hour": 5.0, "source": "TESSERA_USD_PER_HOUR"}
    assert found["experiment"]["source"] == minimal
    assert found["data"] == "random tokens, p ~ 1 / (rank + 2.7)"
    assert not found["quick"]
    assert {entry["backend"] for entry in found["ceilings"]["attention"]} == {
        "flash4", "cudnn", "flash", "math",
    }  # fmt: skip
    assert len(found["ceilings"]["products"]) == 15


def test_quickly_without_any_file(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in the first minute on a rented box; it leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capfd, "--quick", "--price", "2")
    if "keeps this machine busy" in " ".join(out.split()):  # then a projection would be wrong
        assert code == 2
        assert err.count("Error: ") == 1
    else:
        assert code == 0, err
        assert re.search(r"^ *projected +[\d,]+ ", out, re.MULTILINE), out
        assert "Projected from 2 and 6 layers to 8, along a line" in out
        assert "256,000 tokens at $2/h (--price)" in out
        assert "MFU = FLOPs a token x tokens/s / peak FLOP/s" in out
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_only_the_environment_names_need_not_hold_the_corpus(
    minimal: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    few = ("--set", "model.layers=1", "--quick", "--steps", "2")
    monkeypatch.setenv("TESSERA_ROOT", str(tmp_path / "root"))
    found = measured(capfd, minimal, *few)
    assert found["data"].startswith("random tokens, p ~ 1 / (rank + 2.7) (")
    assert "nowhere" in found["data"]
    assert found["price"] == {"usd_per_hour": 3.0, "source": "experiment"}
    assert found["rows"][0]["projected_from_layers"] is None
    code, out, err = said(capfd, minimal, *few, "--root", str(tmp_path / "root"))
    assert (code, out) == (2, "")
    assert "nowhere" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--price", "nan"], "--price is nan; expected US dollars an hour, such as 2.16."),
        (["--price", "-1"], "--price is -1.0; expected US dollars an hour, such as 2.16."),
        (["--only", "fast"], "--only fast is no row of the ladder; choose of eager, compiled,"),
        (["--root", ""], "The root is empty; give --root a folder or a URL"),
        (["--quick", "--only", "eager"], "--only chooses rows of the ladder, which --quick does"),
        (["nothing.yaml"], "nothing.yaml does not exist; give the path of an experiment file"),
        (["--set", "model.layer=2"], "model.layer is not a known key; correct its spelling"),
        (
            [str(EXPERIMENTS / "tessera_1b_sft.yaml")],
            "tessera_1b_sft.yaml is a fine-tuning, and bench measures pretraining; give",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capfd, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_where_no_row_can_run_it_says_so(minimal: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capfd, minimal, "--only", "fp8", "--steps", "2")
    assert code == 2
    assert "fp8 was not measured: a CPU has no float8 products." in " ".join(out.split())
    last = err.splitlines()[-1]  # before it a line every 5 s
    assert last == (
        "Error: Nothing could be measured here, for the reasons above; try another --only, or "
        "--set batch.micro_batch=1 if memory ran out."
    )


def test_ctrl_c_prints_what_was_measured(minimal: str, tmp_path: Path) -> None:
    arguments = [minimal, "--only", "eager", "--only", "fused", "--steps", "1000000"]
    with subprocess.Popen(
        [sys.executable, "-m", "tessera", "bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("bench: eager"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert "Interrupted; this is what was measured until then." in out
    assert "copy in memory" in out
    assert "Traceback" not in err


def document(capfd: pytest.CaptureFixture[str], minimal: str) -> dict[str, Any]:
    return measured(capfd, minimal, "--set", "model.layers=1", "--quick", "--steps", "2")


def test_the_verdict_for_a_reference_sized_run(
    minimal: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a GPU's document looks like; the figures are made up."""
    found = document(capfd, minimal)
    capfd.readouterr()
    (row,) = found["rows"]
    row |= {
        "name": "fused-x2", "tokens_per_s": 75_120.4, "hours": 90.6, "usd": 195.7, "mfu": 0.551,
        "step_s": {"median": 0.8724, "p10": 0.871, "p90": 0.875}, "peak_memory_bytes": 60 * 2**30,
        "ceiling_fraction": 0.94, "settings": {"kernels": "fused", "batch.micro_batch": 8},
        "attention": "cudnn",
    }  # fmt: skip
    slower = {**row, "name": "fused", "tokens_per_s": 70_000.0}
    found |= {
        "rows": [slower, row], "best": "fused-x2",
        "reference": {"tokens_per_s": 46_700, "hours": 145.7, "usd": 315.0, "note": "published"},
    }  # fmt: skip
    print_document(found)
    out = " ".join(capfd.readouterr().out.split())
    assert "fused-x2 75,120 872 (871-875) 55.1% 60.0 94.0% 90.6 $196" in out
    assert (
        "Best: fused-x2: 75,120 tokens/s, 90.6 h, $196; in the experiment: kernels: fused, "
        "batch.micro_batch: 8." in out
    )
    assert (
        "The reference run made 46,700 tokens/s (published): 145.7 h and $315 for these tokens; "
        "here 1.61x." in out
    )


def test_a_root_without_an_experiment_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(capfd, "--quick", "--root", str(tmp_path))
    assert code == 2
    assert err.startswith("Error: --root says where the experiment's corpus is, and no experiment")


def test_a_verdict_for_fp8_says_what_it_costs_and_what_is_fastest_without(
    minimal: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found = document(capfd, minimal)
    (row,) = found["rows"]
    row |= {"name": "fp8", "tokens_per_s": 102_600.0, "hours": 66.3, "usd": 143.0}
    row |= {"settings": {"precision": "fp8"}}
    plain = {**row, "name": "fused", "tokens_per_s": 76_600.0, "settings": {"kernels": "fused"}}
    failed = {**plain, "name": "fused-x2", "tokens_per_s": None, "step_s": None, "reason": "no"}
    found |= {"rows": [plain, failed, row], "best": "fp8"}
    capfd.readouterr()
    print_document(found)
    out = " ".join(capfd.readouterr().out.split())
    assert "nats against bf16" in out
    assert "without it fused is the fastest." in out
    found |= {"rows": [plain, failed], "best": "fused"}
    print_document(found)
    assert "nats" not in capfd.readouterr().out


def test_the_table_fits_eighty_columns(
    minimal: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = document(capfd, minimal)
    (row,) = found["rows"]
    row |= {
        "name": "fused-flash4", "tokens_per_s": 101_234.0, "hours": 1234.5, "usd": 12_345.6,
        "mfu": 0.551, "step_s": {"median": 0.8724, "p10": 0.871, "p90": 0.875},
        "peak_memory_bytes": 100 * 2**30, "ceiling_fraction": 0.94,
    }  # fmt: skip
    found["best"] = "fused-flash4"
    monkeypatch.setattr("tessera.cli._bench_view.Console", lambda **_: Console(width=80))
    capfd.readouterr()
    print_document(found)
    out = capfd.readouterr().out
    for shown in ("fused-flash4", "101,234", "872 (871-875)", "55.1%", "100.0", "94.0%"):
        assert shown in out
    assert "1,234.5" in out
    assert "$12,346" in out
    assert "\u2026" not in out
