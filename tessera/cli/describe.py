"""``tessera describe``: what an experiment comes to, by arithmetic alone."""

from __future__ import annotations

from typing import Any

from tessera.experiment import Experiment, Pretrain
from tessera.model.shape import (
    FLOPS_FORMULA,
    ModelShape,
    flops_per_token,
    lora_parameters,
    parameters,
    training_memory,
)

LORA_RANK = 16


def facts_of(experiment: Experiment) -> dict[str, Any]:
    """The figures of ``--json``. Bytes and FLOPs are integers; an SFT's base is not opened.

    Steps, tokens and total FLOPs are None where only a budget ends the run. Where
    ``batch.micro_batch`` is ``auto``, ``accumulation`` is None and the memory is that of the
    smallest size; ``memory_micro_batch`` says for how many samples at once it is.
    """
    if not isinstance(experiment, Pretrain):
        batch = experiment.batch.conversations_per_step
        return {
            "name": experiment.name,
            "kind": experiment.kind,
            "base": experiment.base,
            "epochs": experiment.epochs,
            "conversations_per_step": batch,
            "lora_rank": experiment.lora.rank,
            "lora_targets": list(experiment.lora.targets),
        }
    shape = ModelShape(**experiment.model.model_dump(exclude={"init_std"}))
    setting = experiment.batch.micro_batch
    size = 1 if setting == "auto" else setting
    memory = _memory(experiment, shape, size)
    flops = flops_per_token(shape, experiment.sequence)
    return {
        "name": experiment.name,
        "kind": experiment.kind,
        "parameters": parameters(shape),
        "lora_parameters": lora_parameters(shape, LORA_RANK),
        "lora_rank": LORA_RANK,
        "steps": experiment.steps,
        "tokens": experiment.tokens,
        "budget_usd": experiment.budget_usd,
        "tokens_per_step": experiment.batch.tokens_per_step,
        "precision": experiment.precision,
        "kernels": experiment.kernels,
        "micro_batch": setting,
        "accumulation": None
        if setting == "auto"
        else experiment.batch.tokens_per_step // (setting * experiment.sequence),
        "flops_per_token": flops,
        "flops_formula": FLOPS_FORMULA,
        "flops_total": None if experiment.tokens is None else flops * experiment.tokens,
        "memory_micro_batch": size,
        "recompute": experiment.recompute,
        "memory_bytes": sum(memory.values()),
        "memory_parts_bytes": memory,
        "checkpoint_bytes": 12 * parameters(shape),
    }


def _memory(experiment: Pretrain, shape: ModelShape, size: int) -> dict[str, int]:
    """Bytes by part for ``size`` samples at once.

    With ``recompute`` the input of every block is kept (d_model elements a token), and the rest of
    one block at a time.
    """
    low_precision = experiment.precision != "float32"
    fused = experiment.precision == "fp8" or experiment.kernels == "fused"
    parts = training_memory(shape, size, low_precision, experiment.sequence, fused=fused)
    if experiment.recompute:
        element = 2 if low_precision else 4
        inputs = size * experiment.sequence * shape.layers * shape.d_model * element
        parts["activations"] = inputs + parts["activations"] // shape.layers
    return parts


def print_facts(facts: dict[str, Any]) -> None:
    """The same as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{facts['name']} ({facts['kind']})", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("figure", justify="right")
    for key, value in facts.items():
        if key in ("name", "kind", "flops_formula"):
            continue
        label = key.replace("_bytes", "").replace("_", " ")
        if isinstance(value, dict):
            for part, size in value.items():
                table.add_row(f"  {part}", f"{size / 2**30:.2f} GiB")
            continue
        if key == "budget_usd":
            table.add_row("budget", "none" if value is None else f"${value:,.2f}")
        elif value is None and key in ("steps", "tokens", "flops_total"):
            table.add_row(label, "as many as the budget pays for")
        else:
            table.add_row(label, _figure(key, value))
    console = Console()
    console.print(table)
    if "flops_formula" in facts:
        console.print(f"FLOPs per token = {facts['flops_formula']}.", highlight=False)
        console.print("Memory is an estimate; measured peaks are in benchmarks/.", highlight=False)
        if facts["kernels"] == "auto" and facts["precision"] != "fp8":
            console.print("With the fused operations, logits take far less.", highlight=False)


def _figure(key: str, value: Any) -> str:
    if value is None:
        return "left to the machine"
    if key.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB"
    if key.startswith("flops"):
        return f"{value:.3e}"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
