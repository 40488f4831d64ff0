"""How the products of a model's blocks are taken in float8: what may be chosen, in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """What float8 training leaves open; the defaults are those of Micikevicius et al. 2022.

    ``gradients`` is the float8 type of the gradients that enter a product: e5m2 with 2 bits of
    mantissa, or e4m3 with 3 bits and less range. Activations and weights are e4m3.
    ``stochastic_weights`` are rounded up or down at random, anew in every step, so that they are
    right on average; to the nearest their errors stay for as long as a weight hardly moves.
    ``fast_gradients`` sums the products that make gradients of activations as forward ones are
    (``matmul8``), ``fast_weights`` those that make gradients of weights.
    The first ``keep_first`` and the last ``keep_last`` blocks stay in the compute dtype.
    """

    gradients: torch.dtype = torch.float8_e5m2
    stochastic_weights: bool = False
    fast_gradients: bool = True
    fast_weights: bool = True
    keep_first: int = 0
    keep_last: int = 0

    def blocks(self, layers: int) -> list[bool]:
        """Which of ``layers`` blocks are to take their products in float8."""
        return [self.keep_first <= number < layers - self.keep_last for number in range(layers)]
