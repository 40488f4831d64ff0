"""Head with loss, optimiser step and embedding of the 1B model: ours beside the alternatives.

    python benchmarks/head_speed.py
    python benchmarks/head_speed.py --only head,rows --tokens 16384

Needs a CUDA device; without one it says so and ends with 2. Random bf16 states and weights, token
ids with Zipf's frequencies. Milliseconds are the median of ``--repeats`` calls between two CUDA
events, "host" is what one call keeps Python busy, "GiB" the peak above what was there before.

* head: loss, gradient of the states and float32 gradient of the weight, added to what is there.
  "error" compares with float64: the largest difference as a share of the largest number, for the
  loss, the states' gradient and the weight's, with 512 targets that count and all others ignored.
* rows: the cross-entropy kernel alone on 8,192 rows, by its tunables, with its speed in memory
  (each logit read and written once; the second reading should come from the L2 cache).
* optimizer: norm, clip and AdamW over all parameters; "everything" adds the bf16 copies of the
  matrices for the next step and gradients that are zero again.
* embedding: of one micro-batch, 4,096 positions a sample.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.model.fused.adamw import FusedAdamW, clip_factor
from tessera.model.fused.embedding import embed, embedding_backward
from tessera.model.fused.head import head_loss
from tessera.model.fused.matmul import _adds_in_place
from tessera.model.loss import IGNORE, summed_cross_entropy
from tessera.model.shape import ModelShape, linear_sizes

SHAPE = ModelShape(layers=32, d_model=1536, heads=16, context=4096, vocab_size=65_536)
GIB = 2**30
COUNTED = 512
"""Targets that count where a head is compared with float64."""


@dataclass(frozen=True)
class Row:
    """One line of the table; ``note`` is whatever else there is to say."""

    part: str
    what: str
    ms: float
    host_ms: float
    gib: float
    note: str = ""


@dataclass(frozen=True)
class Case:
    """What a head is given: bf16 states and weight, the float32 master with its gradient."""

    states: Tensor
    weight: Tensor
    master: nn.Parameter
    targets: Tensor

    def ignoring_most(self) -> Case:
        """The same with only the first ``COUNTED`` targets."""
        targets = self.targets.clone()
        targets[COUNTED:] = IGNORE
        return Case(self.states, self.weight, self.master, targets)


Head = Callable[[Case], tuple[Tensor, Tensor]]
"""Case -> loss / tokens and the gradient of the states; adds to ``master.grad``."""


def measure(part: str, what: str, call: Callable[[], object], repeats: int, note: str = "") -> Row:
    """Time ``call`` after two calls of warm-up."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        call()
    peak = torch.cuda.max_memory_allocated() - before
    spans, host = [], []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        began = time.perf_counter()
        call()
        host.append((time.perf_counter() - began) * 1e3)
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end))
    return Row(part, what, statistics.median(spans), statistics.median(host), peak / GIB, note)


# -- head ------------------------------------------------------------------------------------------


def ours(chunk: int) -> Head:
    """Our head in chunks of so many tokens."""

    def call(case: Case) -> tuple[Tensor, Tensor]:
        assert case.master.grad is not None
        count = case.targets.numel()
        return head_loss(case.states, case.weight, case.targets, count, case.master.grad, chunk)

    return call


def by_autograd(loss_of: Callable[[Tensor, nn.Parameter, Tensor], Tensor]) -> Head:
    """A head whose gradient autograd takes; ``loss_of`` gets states, master and targets."""

    def call(case: Case) -> tuple[Tensor, Tensor]:
        states = case.states.detach().requires_grad_()
        loss = loss_of(states, case.master, case.targets) / case.targets.numel()
        loss.backward()  # type: ignore[no-untyped-call]
        assert states.grad is not None
        return loss.detach(), states.grad

    return call


def heads() -> Iterator[tuple[str, Head]]:
    """Every variant that this machine can run."""
    for chunk in (4096, 8192, 16384, 32768):
        yield f"ours, chunks of {chunk}", ours(chunk)
    whole = torch.compile(summed_cross_entropy, dynamic=False)
    yield "compiled, all logits at once", by_autograd(lambda s, m, t: whole(s[None], m, t[None]))
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions
        chosen = {
            "as it chooses": options(),
            "chunks of 8192": options(chunking_method=None, batch_chunk_size=8192),
        }
        for name, option in chosen.items():

            def torchs(s: Tensor, m: nn.Parameter, t: Tensor, option: Any = option) -> Tensor:
                weight = m.to(s.dtype)
                loss: Tensor = F.linear_cross_entropy(s, weight, t, reduction="sum", options=option)
                return loss

            yield f"torch linear_cross_entropy, {name}", by_autograd(torchs)
    if importlib.util.find_spec("liger_kernel"):
        transformers = importlib.import_module("liger_kernel.transformers")
        liger = transformers.LigerFusedLinearCrossEntropyLoss(
            reduction="sum", accum_dtype=torch.float32
        )
        yield (
            "liger fused linear cross-entropy",
            by_autograd(lambda s, m, t: liger(m.to(s.dtype), s, t)),
        )
    if importlib.util.find_spec("quack"):
        try:
            quack = importlib.import_module("quack.linear_cross_entropy")
        except TypeError as error:  # 0.6.5 beside nvidia-cutlass-dsl 4.8.1
            print(f"head, quack: {str(error).splitlines()[0]}", file=sys.stderr)
            return
        for name, scaled in (("in chunks", False), ("without stored probabilities", True)):

            def quacks(s: Tensor, m: nn.Parameter, t: Tensor, scaled: bool = scaled) -> Tensor:
                loss: Tensor = quack.chunked_linear_cross_entropy(
                    s, m.to(s.dtype), t, ignore_index=IGNORE, reduction="sum", use_scaled_exp=scaled
                )
                return loss

            yield f"quack linear cross-entropy, {name}", by_autograd(quacks)


def in_float64(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the states that count and of the weight."""
    states = case.states[:COUNTED].double()
    weight, targets = case.weight.double(), case.targets[:COUNTED]
    slope = states @ weight.t()
    norms = slope.logsumexp(1, keepdim=True)
    loss = (norms - slope.gather(1, targets[:, None])).sum() / case.targets.numel()
    slope.sub_(norms).exp_()
    slope[torch.arange(COUNTED, device=slope.device), targets] -= 1.0
    slope /= case.targets.numel()
    return loss, slope @ weight, slope.t() @ states


def errors(head: Head, case: Case, wanted: tuple[Tensor, Tensor, Tensor]) -> str:
    """How far loss and both gradients are from float64."""
    assert case.master.grad is not None
    case.master.grad.zero_()
    loss, dstates = head(case.ignoring_most())
    found = (loss, dstates[:COUNTED], case.master.grad)
    off = [
        float((one.double() - two).abs().max() / two.abs().max())
        for one, two in zip(found, wanted, strict=True)
    ]
    return "error " + ", ".join(f"{value:.1e}" for value in off)


def head_rows(tokens: int, repeats: int) -> Iterator[Row]:
    """The variants of the head; one that fails is named and left out."""
    states = torch.randn(tokens, SHAPE.d_model, device="cuda").to(torch.bfloat16)
    master = nn.Parameter(torch.randn(SHAPE.vocab_size, SHAPE.d_model, device="cuda") * 0.05)
    master.grad = torch.zeros_like(master)
    case = Case(states, master.detach().to(torch.bfloat16), master, zipf(tokens))
    wanted = in_float64(case)
    flops = 6 * tokens * SHAPE.vocab_size * SHAPE.d_model
    for name, head in heads():
        try:
            note = errors(head, case, wanted)
            row = measure("head", name, lambda head=head: head(case), repeats, note)  # type: ignore[misc]
        except (RuntimeError, TypeError, ValueError) as error:
            print(f"head, {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        speed = flops / row.ms / 1e9
        yield Row(row.part, name, row.ms, row.host_ms, row.gib, f"{speed:.0f} TFLOP/s, {note}")


def kernel_rows(repeats: int) -> Iterator[Row]:
    """The cross-entropy kernel by its tunables."""
    from tessera.model.fused.kernels.cross_entropy import launch_cross_entropy

    tokens = 8192
    logits = torch.randn(tokens, SHAPE.vocab_size, device="cuda").to(torch.bfloat16)
    losses, scale = torch.empty(tokens, device="cuda"), torch.ones((), device="cuda")
    targets = zipf(tokens)
    moved = 2 * logits.numel() * logits.element_size()
    for depth, lanes, warps in ((4, 4096, 16), (2, 4096, 16), (2, 8192, 32), (4, 8192, 32)):

        def call(depth: int = depth, lanes: int = lanes, warps: int = warps) -> None:
            launch_cross_entropy(
                logits, targets, losses, scale, depth=depth, lanes=lanes, num_warps=warps
            )

        row = measure("rows", f"depth {depth}, lanes {lanes}, warps {warps}", call, repeats)
        note = f"{moved / row.ms / 1e9:.2f} TB/s"
        yield Row(row.part, row.what, row.ms, row.host_ms, row.gib, note)


# -- optimiser -------------------------------------------------------------------------------------


def parameters() -> list[nn.Parameter]:
    """All parameters of the model with random gradients."""
    d = SHAPE.d_model
    shapes: list[tuple[int, ...]] = [(SHAPE.vocab_size, d), (SHAPE.context, d), (d,)]
    for _ in range(SHAPE.layers):
        shapes += [(d,), (d,), *((o, i) for i, o in linear_sizes(SHAPE).values())]
    made = [nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def optimizer_rows(repeats: int) -> Iterator[Row]:
    """torch's fused AdamW with two ways to clip, and ours."""
    made = parameters()
    grads = [p.grad for p in made if p.grad is not None]
    copies = {p: p.detach().to(torch.bfloat16) for p in made if p.ndim == 2}
    yield measure("optimizer", "norm", lambda: nn.utils.get_total_norm(grads), repeats)

    def rest() -> None:
        torch._foreach_copy_(list(copies.values()), [p.detach() for p in copies])
        torch._foreach_zero_(grads)

    yield measure("optimizer", "bf16 copies and zero", rest, repeats)
    theirs = torch.optim.AdamW(made, lr=1e-4, fused=True)

    def today() -> None:
        nn.utils.clip_grad_norm_(made, 1.0)
        theirs.step()

    yield measure("optimizer", "clip_grad_norm_, torch's fused AdamW", today, repeats)

    def scaled() -> None:
        theirs.grad_scale = 1 / clip_factor(nn.utils.get_total_norm(grads), 1.0)  # type: ignore[attr-defined]
        theirs.step()

    yield measure("optimizer", "norm, torch's with grad_scale", scaled, repeats)

    def everything() -> None:
        scaled()
        rest()

    yield measure("optimizer", "norm, torch's with grad_scale, everything", everything, repeats)
    fused = FusedAdamW(made, lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    fused.state = theirs.state

    def mine() -> None:
        fused.clip_factor = clip_factor(nn.utils.get_total_norm(grads), 1.0)
        fused.step()

    yield measure("optimizer", "norm, ours", mine, repeats)
    fused.zero_gradients = True
    yield measure("optimizer", "norm, ours, zero", mine, repeats)
    fused.copies = copies
    yield measure("optimizer", "norm, ours, everything", mine, repeats)


# -- embedding -------------------------------------------------------------------------------------


def zipf(count: int) -> Tensor:
    """Token ids of which number n has the frequency 1 / (n + 1): the first is 6 % of all."""
    chance = torch.rand(count, device="cuda", dtype=torch.float64)
    return (SHAPE.vocab_size**chance).long().sub_(1).clamp_(0, SHAPE.vocab_size - 1)


def embedding_rows(tokens: int, repeats: int) -> Iterator[Row]:
    """Both directions, plain torch and ours."""
    length = min(SHAPE.context, tokens)
    ids = zipf(tokens // length * length).view(-1, length)
    table = torch.randn(SHAPE.vocab_size, SHAPE.d_model, device="cuda")
    places = torch.randn(SHAPE.context, SHAPE.d_model, device="cuda")
    dx = torch.randn(ids.numel(), SHAPE.d_model, device="cuda").to(torch.bfloat16)
    sums, place_sums = torch.zeros_like(table), torch.zeros_like(places)

    def forward() -> Tensor:
        return (table[ids] + places[:length]).to(torch.bfloat16)

    def backward() -> None:
        sums.index_add_(0, ids.view(-1), dx.float())
        place_sums[:length] += dx.view(-1, length, SHAPE.d_model).sum(0, dtype=torch.float32)

    yield measure("embedding", "forward, plain", forward, repeats)
    yield measure(
        "embedding", "forward, ours", lambda: embed(ids, table, places, torch.bfloat16), repeats
    )
    yield measure("embedding", "backward, index_add_", backward, repeats)
    yield measure(
        "embedding",
        "backward, ours",
        lambda: embedding_backward(dx, ids, sums, place_sums),
        repeats,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=32_768, help="of a micro-batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", default="head,rows,optimizer,embedding")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("This measures kernels on a GPU, and there is no CUDA device here.", file=sys.stderr)
        return 2
    torch.manual_seed(20261122)
    parts = {
        "head": lambda: head_rows(chosen.tokens, chosen.repeats),
        "rows": lambda: kernel_rows(chosen.repeats),
        "optimizer": lambda: optimizer_rows(chosen.repeats),
        "embedding": lambda: embedding_rows(chosen.tokens, chosen.repeats),
    }
    mixed = _adds_in_place(torch.bfloat16, torch.float32, torch.device("cuda"))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {chosen.tokens} tokens; "
        f"bf16 products are added to float32 {'in place' if mixed else 'through a temporary'}"
    )
    print("| part | variant | ms | host ms | GiB | |\n|---|---|---|---|---|---|")
    for part in chosen.only.split(","):
        for row in parts[part]():
            print(
                f"| {row.part} | {row.what} | {row.ms:.3f} | {row.host_ms:.2f} | {row.gib:.2f} "
                f"| {row.note} |",
                flush=True,
            )
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
