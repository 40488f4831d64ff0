"""Tokens per second of `tessera train` against GPT-2 of the same size from transformers.

    python benchmarks/pretrain_speed.py experiments/tessera_1b.yaml --root ROOT \
        --set data.corpus=novels-ja-en --set tokens=9175040 --set evaluation.tokens=262144

Ours is the whole command: loader, journal, progress, evaluation and checkpoints as the experiment
says; its speed is the median of the journal's log points after the first two. The peer is
`transformers.GPT2LMHeadModel` with the same layers, width, heads, context, vocabulary and tied head
(it has biases and LayerNorm, so 0.1 % more parameters), bf16 autocast, SDPA attention, fused AdamW,
clipping, the same tokens a step and the same micro-batch, eager and with each block compiled; its
speed is the median of the steps after the first three. Both run on the same device, one after the
other, in this one call. On a CPU both run in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tessera.cli.common import run_script
from tessera.experiment import Pretrain, load_experiment
from tessera.model.shape import flops_per_token
from tessera.runs import find_run
from tessera.storage import open_root
from tessera.tracking.records import read_journal
from tessera.training.pretrain import model_shape

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One measured variant; memory is the peak that torch allocated, None where unknown."""

    name: str
    tokens_per_s: float
    peak_gib: float | None
    points: int


def ours(path: str, overrides: Sequence[str], root: str) -> Row:
    """Run `tessera train` to its end and read its journal."""
    command = [sys.executable, "-m", "tessera", "train", path, "--root", root, "--new"]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    run = find_run(open_root(root), done.stdout.split(":", 1)[0])
    speeds: list[float] = []
    peak: float | None = None
    for attempt in run.attempts():
        mine = [r for r in read_journal(run, attempt.id) if r.kind == "metric"]
        speeds += [r.number for r in mine if r.key == "train/tokens_per_s"][2:]
        peaks = [r.number for r in mine if r.key == "system/gpu_peak_gib"]
        peak = max(peaks) if peaks else None
    return Row("tessera train", statistics.median(speeds), peak, len(speeds))


def peer(experiment: Pretrain, compiled: bool, steps: int) -> Row:
    """The same training step around transformers' GPT-2, on random tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    shape, batch = model_shape(experiment.model), experiment.batch
    size = batch.micro_batch
    assert size != "auto", "main has refused it"
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context,
        n_embd=shape.d_model,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = GPT2LMHeadModel(config)  # type: ignore[no-untyped-call]
    if compiled:
        for block in model.transformer.h:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    micro = batch.tokens_per_step // (size * experiment.sequence)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        for _ in range(micro):
            ids = torch.randint(shape.vocab_size, (size, experiment.sequence), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = model(ids, labels=ids).loss / micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - start)
    name = f"transformers GPT-2, {'each block compiled' if compiled else 'eager'}"
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    kept = times[3:]
    return Row(name, batch.tokens_per_step / statistics.median(kept), peak, len(kept))


def main() -> None:
    """Measure, print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--root", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--peer-steps", type=int, default=12)
    parser.add_argument("--peers", default="eager,compiled")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.experiment, arguments.overrides)
    if not isinstance(experiment, Pretrain):
        sys.exit(f"{arguments.experiment} is no pretraining.")
    if experiment.batch.micro_batch == "auto":
        sys.exit("Both sides need the same size: give it with --set batch.micro_batch=N.")
    rows = [ours(arguments.experiment, arguments.overrides, arguments.root)]
    for kind in filter(None, arguments.peers.split(",")):
        rows.append(peer(experiment, kind == "compiled", arguments.peer_steps))
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"device {device}, torch {torch.__version__}, python {platform.python_version()}")
    print("| variant | tokens/s (median) | peak GiB | ratio to ours | points |")
    print("|---|---|---|---|---|")
    for row in rows:
        peak = "" if row.peak_gib is None else f"{row.peak_gib:.1f}"
        ratio = row.tokens_per_s / rows[0].tokens_per_s
        print(f"| {row.name} | {row.tokens_per_s:,.0f} | {peak} | {ratio:.2f} | {row.points} |")
    flops = flops_per_token(model_shape(experiment.model)) * rows[0].tokens_per_s
    print(json.dumps({"model_flops_per_s": flops}))


if __name__ == "__main__":
    sys.exit(run_script(main))
