"""Every kernel of a training step compiles for the GPU that it is written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "_adamw", "_add_rms_kernel", "_add_rows_kernel", "_amax_kernel", "_backward_kernel",
    "_cast_kernel", "_cross_entropy", "_embed", "_gelu_backward_kernel", "_gelu_kernel", "_scatter",
}  # fmt: skip
PLAIN, GELU_BACKWARD = 0, 3
E4M3, E5M2 = "*fp8e4nv", "*fp8e5"


def test_every_kernel_compiles_for_hopper_and_keeps_to_its_registers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.fused.hopper"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in made} == KERNELS
    casts = [each for each in made if each["kernel"] == "_cast_kernel"]
    made_of = {(each["constants"]["KIND"], each["tensors"]["rows"]) for each in casts}
    assert made_of >= {(PLAIN, E4M3), (PLAIN, E5M2), (GELU_BACKWARD, E4M3), (GELU_BACKWARD, E5M2)}
    assert [each for each in made if each["stack"]] == [], "something was spilled"
    assert max(each["registers"] for each in made) <= 168
