"""Draw the losses of float8 beside bf16's, from what the benchmarks wrote into measured/.

    python benchmarks/draw_curves.py

Left: 136M parameters, two seeds each, difference in validation loss. Right: 1B parameters, training
loss of both. Writes benchmarks/curves_fp8.svg. Needs matplotlib, which MLflow brings.
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
    for plain, eight in zip(read("136m_bf16.json"), read("136m_fp8.json"), strict=True):
        steps, losses = points(eight["validation"])
        difference = [
            loss - plain["validation"][str(s)] for s, loss in zip(steps, losses, strict=True)
        ]
        left.plot(steps, difference, marker="o", label=f"seed {plain['seed']}")
    left.axhline(LIMIT, color="grey", linestyle="--", label=f"limit, {LIMIT} nats")
    left.set(
        title="136M: validation loss, fp8 - bf16", xlabel="step", ylabel="nats", ylim=(0, 0.025)
    )
    left.legend()
    for name, label in (("1b_bf16.json", "bf16"), ("1b_fp8.json", "fp8")):
        right.plot(*points(read(name)["train"]), label=label)
    right.set(title="1B: training loss", xlabel="step", ylabel="nats")
    right.legend()
    figure.savefig(HERE / "curves_fp8.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
