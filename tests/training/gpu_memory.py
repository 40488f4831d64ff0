"""``micro_batch: auto`` on a real GPU; run by hand on one: ``pytest tests/training/gpu_memory.py``.

Not collected by ``make test``, whose machines have none.
"""

from __future__ import annotations

import pytest
import torch

from tessera.model.loss import summed_cross_entropy
from tessera.model.protogpt import ProtoGPT
from tessera.model.shape import ModelShape
from tessera.training.memory import GPU_SHARE, CudaCard, resolve_micro_batch

SHAPE = ModelShape(layers=4, d_model=1024, heads=8, context=2048, vocab_size=32_768)
SAMPLES = 512

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_answer_fits_the_next_size_does_not_and_nothing_stays(
    recompute: bool, compiled: bool
) -> None:
    device = torch.device("cuda")
    card = CudaCard(device)
    model = ProtoGPT(SHAPE)
    model.initialize(1)
    model.to(device)
    model.recompute = recompute
    loss_function = torch.compile(summed_cross_entropy) if compiled else summed_cross_entropy
    if compiled:
        for block in model.blocks:
            block.compile()

    def step(size: int) -> None:
        ids = torch.zeros((size, SHAPE.context), dtype=torch.int64, device=device)
        states = model.hidden(ids, torch.bfloat16)
        loss_function(states, model.tokens.weight, ids).backward()  # type: ignore[no-untyped-call]

    def release() -> None:
        for parameter in model.parameters():
            parameter.grad = None

    # A reserve shrinks the card, so that the search ends between 1 and all.
    card.tidy()
    reserve = int(GPU_SHARE * card.usable()) - 24 * 2**30
    before = torch.cuda.memory_allocated(device)
    choice = resolve_micro_batch(
        "auto", samples=SAMPLES, step=step, device=device, estimate=lambda size: 0,
        remembered=None, release=release, reserve=reserve,
    )  # fmt: skip
    print(choice)
    # cuBLAS keeps a workspace of its own once it was used.
    assert torch.cuda.memory_allocated(device) - before < 128 * 2**20
    assert 1 < choice.size < SAMPLES

    def peak(size: int) -> int:
        card.watch()
        step(size)
        step(size)
        found = card.peak()
        release()
        card.tidy()
        return found

    allowed = 24 * 2**30
    assert peak(choice.size) <= allowed * 1.02
    assert peak(2 * choice.size) > allowed


def test_memory_that_really_runs_out_is_stepped_back_from() -> None:
    device = torch.device("cuda")

    def step(size: int) -> None:
        # Small at first, then more than any line foresees: eight are more than the card has.
        total = torch.cuda.get_device_properties(device).total_memory
        wanted = total if size >= 8 else size * 2**20
        torch.empty(wanted, dtype=torch.uint8, device=device)

    choice = resolve_micro_batch(
        "auto", samples=16, step=step, device=device, estimate=lambda size: 0, remembered=None
    )
    assert choice.size == 4
