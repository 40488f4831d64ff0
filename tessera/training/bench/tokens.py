"""What the measured steps learn from: the same batches for every technique, ready beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.corpus.manifest import require_fit, resolve
from tessera.experiment import Pretrain
from tessera.storage import Root
from tessera.training.loader import SampleLoader, ShardStore

_POOL = 4
"""Steps of random tokens that are drawn; further steps take them again."""
_SHIFT = 2.7
"""Mandelbrot's constant for words: p ~ 1 / (rank + 2.7)."""


@dataclass(frozen=True)
class Batches:
    """Steps of data: inputs and targets (samples, T) int64 each, and what they are, in words."""

    steps: list[tuple[Tensor, Tensor]]
    source: str

    def micro_batches(self, step: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """Step ``step`` in micro-batches of ``size`` samples; begins anew after the last."""
        inputs, targets = self.steps[step % len(self.steps)]
        return list(zip(torch.split(inputs, size), torch.split(targets, size), strict=True))


def random_batches(experiment: Pretrain, device: torch.device) -> Batches:
    """Tokens as frequent as words of a language are, in no order."""
    vocabulary = experiment.model.vocab_size
    weights = 1.0 / (torch.arange(vocabulary, dtype=torch.float64) + 1.0 + _SHIFT)
    edges = (weights / weights.sum()).cumsum(0)
    generator = torch.Generator().manual_seed(experiment.seed)
    shape = (samples_per_step(experiment), experiment.sequence + 1)
    steps = []
    for _ in range(_POOL):
        draws = torch.rand(shape, dtype=torch.float64, generator=generator)
        ids = torch.searchsorted(edges, draws).clamp(max=vocabulary - 1)
        steps.append(_both(ids[:, :-1], ids[:, 1:], device))
    return Batches(steps, "random tokens, p ~ 1 / (rank + 2.7)")


def corpus_batches(
    experiment: Pretrain, root: Root, device: torch.device, *, count: int
) -> Batches:
    """The first ``count`` steps of the experiment, through the loader that training uses.

    Raises ``InputError`` where the corpus is not in ``root`` or does not fit the experiment.
    """
    manifest = resolve(root, experiment.data.corpus, experiment.data.fingerprint)
    require_fit(
        manifest,
        vocab_size=experiment.model.vocab_size,
        sequence=experiment.sequence,
        origin=experiment.origin,
    )
    samples = samples_per_step(experiment)
    limit = int(experiment.data.cache_gib * 2**30)
    store = ShardStore(root, manifest, limit_bytes=limit)
    try:
        loader = SampleLoader(
            store, experiment.sequence, experiment.seed, manifest.fingerprint,
            samples=count * samples,
        )  # fmt: skip
        steps = [_both(*loader.batch(n * samples, samples), device) for n in range(count)]
    finally:
        store.close()
    return Batches(steps, f"corpus {manifest.name}, fingerprint {manifest.fingerprint[:12]}")


def samples_per_step(experiment: Pretrain) -> int:
    """Sequences of one optimiser step."""
    return experiment.batch.tokens_per_step // experiment.sequence


def _both(inputs: Tensor, targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    pair = inputs.contiguous(), targets.contiguous()
    return (pair[0].pin_memory(), pair[1].pin_memory()) if device.type == "cuda" else pair
