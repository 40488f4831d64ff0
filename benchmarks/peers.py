"""Tokens per second of other projects' model code at the 1B experiment's shape, beside ours.

    git clone https://github.com/karpathy/nanochat && git clone https://github.com/Lightning-AI/litgpt
    python benchmarks/peers.py experiments/tessera_1b.yaml --set batch.micro_batch=8 \
        --nanochat nanochat --litgpt litgpt

Layers, width, heads, context, vocabulary and tokens a step are the experiment's; every side has
float32 weights, bf16 products, clipping, fused AdamW, and takes the same random tokens. The peers
are compiled whole, as they compile themselves. What they do not share with our model is theirs:

* litgpt: rotary positions, an output head of its own (GELU MLP, RMSNorm, no biases as ours).
* nanochat: rotary positions, query and key norms, squared ReLU, value embeddings (2.7 billion
  parameters), embeddings in bf16, its head's soft cap; full attention. Its optimiser is not used.
  ``nanochat-fp8`` converts its linears as its own trainer does.

A peer that runs out of memory gets half of the micro-batch. Medians over ``--steps`` after three.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.cli.common import run_script
from tessera.experiment import Pretrain, load_experiment
from tessera.model.shape import ModelShape
from tessera.training.bench.ladder import reason_of, release
from tessera.training.bench.runner import StepRunner
from tessera.training.bench.tokens import Batches, random_batches
from tessera.training.pretrain import model_shape

WARM_UP = 3
Loss = Callable[[Tensor, Tensor], Tensor]
"""Ids and targets (B, T) -> mean loss."""


@dataclass(frozen=True)
class Peer:
    """A model on the device, and its loss."""

    model: nn.Module
    loss: Loss


def nanochat(folder: Path, shape: ModelShape, fp8: bool) -> Peer:
    """Its GPT with full attention in every layer."""
    sys.path.insert(0, str(folder))
    gpt: Any = importlib.import_module("nanochat.gpt")
    config = gpt.GPTConfig(
        sequence_len=shape.context, vocab_size=shape.vocab_size, n_layer=shape.layers,
        n_head=shape.heads, n_kv_head=shape.heads, n_embd=shape.d_model, window_pattern="L",
    )  # fmt: skip
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device=_device())
    model.init_weights()
    if fp8:
        converter: Any = importlib.import_module("nanochat.fp8")

        def large(module: Any, _: str) -> bool:
            sides = (module.in_features, module.out_features)
            return all(side % 16 == 0 for side in sides) and min(sides) >= 128

        converter.convert_to_float8_training(model, module_filter_fn=large)
    compiled: Loss = torch.compile(model, dynamic=False)
    return Peer(model, compiled)


def litgpt(folder: Path, shape: ModelShape) -> Peer:
    """Its GPT, with the parts that are nearest to ours."""
    package = ModuleType("litgpt")  # its own __init__ imports what training never needs
    package.__path__ = [str(folder / "litgpt")]
    scripts = ModuleType("litgpt.scripts")
    scripts.__path__ = []
    unused: Any = ModuleType("litgpt.scripts.convert_hf_checkpoint")
    unused.qkv_reassemble = None
    sys.modules |= {module.__name__: module for module in (package, scripts, unused)}
    config = importlib.import_module("litgpt.config").Config(
        name="peer", block_size=shape.context, n_layer=shape.layers, n_embd=shape.d_model,
        n_head=shape.heads, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size,
        norm_class_name="RMSNorm", mlp_class_name="GptNeoxMLP", gelu_approximate="tanh",
        bias=False, parallel_residual=False, rotary_percentage=1.0,
    )  # fmt: skip
    with _device():
        model = importlib.import_module("litgpt.model").GPT(config)
    model.apply(model._init_weights)  # as its trainer does

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten())

    compiled = torch.compile(loss, dynamic=False)

    def in_bf16(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(_device().type, torch.bfloat16, enabled=_device().type == "cuda"):
            return compiled(ids, targets)

    return Peer(model, in_bf16)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def speed_of(peer: Peer, batches: Batches, size: int, steps: int) -> float:
    """Seconds of the median step."""
    device = _device()
    trained = list(peer.model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    times = []
    for number in range(WARM_UP + steps):
        micro = batches.micro_batches(number, size)
        began = time.perf_counter()
        for ids, targets in micro:
            loss = peer.loss(ids.to(device), targets.to(device)) / len(micro)
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
        print(f"step {number}: {times[-1]:.2f} s", file=sys.stderr, flush=True)
    return statistics.median(times[WARM_UP:])


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, float, float]]:
    """Name, tokens a second, GiB at most."""
    device = _device()
    plain = load_experiment(arguments.experiment, arguments.overrides)
    assert isinstance(plain, Pretrain)
    size, batches = plain.batch.micro_batch, random_batches(plain, device)
    shape = model_shape(plain.model)
    if size == "auto":
        sys.exit("All sides need the same size: give it with --set batch.micro_batch=N.")
    theirs = arguments.peer_micro_batch or size
    makers: dict[str, Callable[[], Peer]] = {}
    if arguments.litgpt:
        makers["litgpt"] = lambda: litgpt(arguments.litgpt, shape)
    if arguments.nanochat:
        makers["nanochat"] = lambda: nanochat(arguments.nanochat, shape, False)
        makers["nanochat-fp8"] = lambda: nanochat(arguments.nanochat, shape, True)
    for name, settings in (("tessera", "precision=bf16"), ("tessera-fp8", "precision=fp8")):
        if arguments.only and name not in arguments.only:
            continue
        changed = load_experiment(
            arguments.experiment, [*arguments.overrides, "kernels=fused", settings]
        )
        assert isinstance(changed, Pretrain)
        runner = StepRunner(changed, device)
        timing = runner.time(batches, arguments.steps, WARM_UP, lambda: None)
        step = statistics.median(timing.seconds)
        yield f"{name}, micro-batch {size}", changed.batch.tokens_per_step / step, _peak()
        del runner
        release(device)
    for name, make in makers.items():
        if arguments.only and name not in arguments.only:
            continue
        for several in (theirs, theirs // 2):
            peer: Peer | None = None
            try:
                peer = make()
                step = speed_of(peer, batches, several, arguments.steps)
                yield f"{name}, micro-batch {several}", plain.batch.tokens_per_step / step, _peak()
                break
            except Exception as error:
                print(f"{name}, micro-batch {several}: {reason_of(error)}", file=sys.stderr)
                if not isinstance(error, torch.OutOfMemoryError):
                    break
            finally:
                peer = None
                release(device)


def _peak() -> float:
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def main() -> None:
    """Measure, print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("experiment")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--nanochat", type=Path, help="a clone")
    parser.add_argument("--litgpt", type=Path, help="a clone")
    parser.add_argument("--peer-micro-batch", type=int, help="of the peers; ours by default")
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, torch {torch.__version__}")
    print("| | tokens/s | peak GiB | ratio |\n|---|---|---|---|")
    first: float | None = None
    for name, speed, peak in rows(arguments):
        first = first or speed
        print(f"| {name} | {speed:,.0f} | {peak:.1f} | {speed / first:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
