"""What ``tessera describe`` says about the settings that decide the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tessera.cli.main import tessera

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def described(name: str, *overrides: str) -> dict[str, Any]:
    arguments = ["describe", str(EXPERIMENTS / f"{name}.yaml"), "--json"]
    for override in overrides:
        arguments += ["--set", override]
    done = CliRunner().invoke(tessera, arguments, catch_exceptions=False)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_a_size_left_to_the_machine_is_described_by_the_smallest() -> None:
    auto = described("tessera_1b", "batch.micro_batch=auto")
    one = described("tessera_1b", "batch.micro_batch=1")
    assert (auto["micro_batch"], auto["accumulation"]) == ("auto", None)
    assert (one["micro_batch"], one["accumulation"]) == (1, 16)
    differing = {key for key in auto if auto[key] != one[key]}
    assert differing == {"micro_batch", "accumulation"}
    assert auto["memory_micro_batch"] == 1
    assert described("tessera_1b")["memory_micro_batch"] == 4


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_recomputing_leaves_the_inputs_of_all_blocks_and_one_block(micro_batch: int) -> None:
    size = f"batch.micro_batch={micro_batch}"
    kept = described("tessera_1b", size)
    again = described("tessera_1b", size, "recompute=true")
    before, after = (facts["memory_parts_bytes"] for facts in (kept, again))
    assert {key for key in before if before[key] != after[key]} == {"activations"}
    tokens = micro_batch * 4096
    # bf16; a block keeps 16 x d_model elements a token.
    assert before["activations"] == tokens * 32 * 16 * 1536 * 2
    assert after["activations"] == tokens * (32 + 16) * 1536 * 2
    assert again["memory_bytes"] == sum(after.values()) < kept["memory_bytes"]
    assert (kept["recompute"], again["recompute"]) == (False, True)


def test_the_table_shows_what_is_left_to_the_machine() -> None:
    arguments = ["describe", str(EXPERIMENTS / "smoke.yaml"), "--set", "batch.micro_batch=auto"]
    done = CliRunner().invoke(tessera, arguments, catch_exceptions=False)
    rows = [line.strip("\u2502 ").split("\u2502") for line in done.stdout.splitlines()]
    table = {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}
    assert table["micro batch"] == "auto"
    assert table["accumulation"] == "left to the machine"
    assert table["memory micro batch"] == "1"
    assert table["recompute"] == "off"


def test_a_fine_tuning_left_to_the_machine_is_described() -> None:
    assert described("smoke_sft_warm", "batch.micro_batch=auto")["conversations_per_step"] == 8
