"""Token plus position embedding and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.model.fused import backend


@torch.no_grad()
def embed(ids: Tensor, tokens: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of both tables, added in float32 and rounded once to ``dtype``: (B*T, C).

    ids (B, T) int64, tokens (V, C) and positions (P, C) float32 with P >= T; ``ValueError``
    otherwise.
    """
    B, T = ids.shape
    if positions.size(0) < T:
        raise ValueError(
            f"{T} positions do not fit a position table of {positions.size(0)}; shorten the samples"
        )
    if backend.use_triton(tokens):
        from tessera.model.fused.kernels.embedding import launch_embed

        return launch_embed(ids, tokens, positions, dtype)
    return (tokens[ids] + positions[:T]).to(dtype).view(B * T, -1)


@torch.no_grad()
def embedding_backward(dx: Tensor, ids: Tensor, dtokens: Tensor, dpositions: Tensor) -> None:
    """Add the gradient of ``embed``'s tables to dtokens (V, C) and dpositions (P, C), float32.

    dx (B*T, C) in the compute dtype, ids (B, T) int64. On a GPU the tokens are sorted and one
    program sums all that share a row: no slower than atomics by arithmetic (both are bound by
    reading dx and rewriting the rows that occur), in a fixed order, and a row that a twentieth of
    all tokens share is no point of contention.
    """
    B, T = ids.shape
    dpositions[:T].add_(dx.view(B, T, -1).sum(0, dtype=dpositions.dtype))
    if backend.use_triton(dx):
        from tessera.model.fused.kernels.embedding import launch_scatter

        launch_scatter(dx, ids, dtokens)
    else:
        dtokens.index_add_(0, ids.reshape(-1), dx.to(dtokens.dtype))
