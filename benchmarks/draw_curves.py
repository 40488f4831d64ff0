"""Draw the losses of float8 beside bf16's, from what the benchmarks wrote into measured/.

    python benchmarks/draw_curves.py

Left: 136M parameters, difference in validation loss to plain bf16 of the same seed. Right: 1B
parameters, training loss of both. Writes benchmarks/curves_fp8.svg. Needs matplotlib, which MLflow
brings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LIMIT = 0.01
RUNS = (
    ("136m_fp8.json", "fp8 as it comes", "C3-"),
    ("136m_fp8_recipe.json", "recipe", "C0-"),
    ("136m_fp8_forward.json", "recipe, more in bf16", "C1:"),
    ("136m_bf16_fused.json", "bf16, fused", "C2-"),
)
"""File, label and line."""


def read(name: str) -> Any:
    """One of the measured files."""
    return json.loads((HERE / "measured" / name).read_text("utf-8"))


def points(losses: dict[str, float]) -> tuple[list[int], list[float]]:
    """Steps and losses in order."""
    ordered = sorted((int(step), loss) for step, loss in losses.items())
    return [step for step, _ in ordered], [loss for _, loss in ordered]


def main() -> None:
    """Draw both."""
    plt.rcParams["svg.hashsalt"] = "tessera"  # equal input, equal file
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    bf16 = {run["seed"]: run["validation"] for run in read("136m_bf16.json")}
    for name, label, style in RUNS:
        for run in read(name):
            plain = bf16[run["seed"]]
            both = [
                (s, loss - plain[str(s)])
                for s, loss in zip(*points(run["validation"]), strict=True)
            ]
            marker = "o" if run["seed"] == 1 else "s"
            left.plot(
                *zip(*both, strict=True), style, marker=marker, label=f"{label}, seed {run['seed']}"
            )
    left.axhline(LIMIT, color="grey", linestyle="--", label=f"limit, {LIMIT} nats")
    left.set(
        title="136M: validation loss - that of plain bf16",
        xlabel="step",
        ylabel="nats",
        ylim=(-0.014, 0.025),
    )
    left.legend(fontsize="x-small", ncols=2)
    for name, label in (("1b_bf16.json", "bf16"), ("1b_fp8.json", "fp8")):
        right.plot(*points(read(name)["train"]), label=label)
    right.set(title="1B: training loss", xlabel="step", ylabel="nats")
    right.legend()
    figure.savefig(HERE / "curves_fp8.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
