"""ProtoGPT: the reference's decoder-only transformer, in plain torch.

Pre-norm RMSNorm blocks, causal attention with one fused qkv projection, a GELU MLP, learned
absolute positions, a final RMSNorm and a head tied to the token table; no biases anywhere.

Precision is explicit instead of ``torch.autocast``: parameters are float32 (the master weights)
and every linear casts its weight to the dtype of the activations it is given, so one
``compute_dtype`` argument decides the precision of a forward pass, a compiled block sees plain
casts that it can fuse, and the CPU path in float32 is the same code with casts that do nothing.
Norms compute in float32.

Initialisation (the reference published none; GPT-2's is our assumption): normal with
``init_std`` everywhere, the two projections into the residual stream scaled by 1/sqrt(2 x layers).
"""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessera.model.shape import ModelShape


class KVCache(NamedTuple):
    """Keys and values of one layer for the positions seen so far, each (B, H, T, D)."""

    keys: Tensor
    values: Tensor


_draws: ContextVar[bool] = ContextVar("draws", default=True)
"""Whether layers draw weights when they are made; see ``ProtoGPT.unset``."""


class Linear(nn.Linear):
    """A linear without bias whose float32 weight is cast to the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """``nn.Linear``'s draw, unless nobody wants it."""
        if _draws.get():
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        """(..., in) -> (..., out)."""
        return F.linear(input, self.weight.to(input.dtype))


class Table(nn.Embedding):
    """An embedding."""

    def reset_parameters(self) -> None:
        """``nn.Embedding``'s draw, unless nobody wants it."""
        if _draws.get():
            super().reset_parameters()


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32, returned in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused qkv projection."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads, self.head_dim = shape.heads, shape.head_dim
        self.qkv = Linear(shape.d_model, 3 * shape.d_model)
        self.out = Linear(shape.d_model, shape.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C), all positions at once."""
        q, k, v = self._project(x)
        return self._merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def extend(self, x: Tensor, cache: KVCache | None) -> tuple[Tensor, KVCache]:
        """Positions x (B, T, C) after those in ``cache`` -> (B, T, C) and the grown cache."""
        q, k, v = self._project(x)
        if cache is not None:
            k, v = torch.cat([cache.keys, k], dim=2), torch.cat([cache.values, v], dim=2)
        T, S = q.size(2), k.size(2)
        # Query i sits at position S - T + i and may look at every position up to itself.
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self._merge(y), KVCache(k, v)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> queries, keys and values, each (B, H, T, D)."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _merge(self, y: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, C) through the output projection."""
        B, H, T, D = y.shape
        merged: Tensor = self.out(y.transpose(1, 2).reshape(B, T, H * D))
        return merged


class MLP(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.up = Linear(shape.d_model, shape.hidden)
        self.down = Linear(shape.hidden, shape.d_model)
        self.approximate = "tanh" if shape.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.down(F.gelu(self.up(x), approximate=self.approximate))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.d_model, shape.norm_eps)
        self.attn = Attention(shape)
        self.norm2 = RMSNorm(shape.d_model, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def extend(self, x: Tensor, cache: KVCache | None) -> tuple[Tensor, KVCache]:
        """The same for positions that follow those in ``cache``."""
        attended, cache = self.attn.extend(self.norm1(x), cache)
        x = x + attended
        return x + self.mlp(self.norm2(x)), cache


class ProtoGPT(nn.Module):
    """The whole model; ``forward`` returns logits, ``hidden`` stops before the head.

    With ``recompute`` set, only the input of each block is kept for the backward pass, which
    computes the rest of the block again when it comes to it (Chen et al. 2016): the same numbers
    from less memory, for one more forward pass through the blocks. Without gradients it changes
    nothing.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.recompute = False
        self.tokens = Table(shape.vocab_size, shape.d_model)
        self.positions = Table(shape.context, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)

    @torch.no_grad()
    def initialize(self, seed: int, init_std: float = 0.02) -> None:
        """Draw all weights from ``seed`` alone, on the CPU, so that no GPU changes the start.

        Each parameter from its own generator, seeded by ``seed`` and its name, so that all of a
        machine's cores draw: a billion numbers take one core 14 s. Equal to the last bit on x86-64
        CPUs with AVX2; elsewhere torch's normal draws round differently in the last place.
        """
        residual_std = init_std / math.sqrt(2 * self.shape.layers)

        @torch.no_grad()
        def draw(named: tuple[str, nn.Parameter]) -> None:
            name, parameter = named
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                parameter.fill_(1.0)
                return
            inner = name.endswith(("attn.out.weight", "mlp.down.weight"))
            own = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(own[:8], "big", signed=True))
            on_cpu = parameter.device.type == "cpu" and parameter.dtype == torch.float32
            drawn = parameter if on_cpu else torch.empty(parameter.shape, dtype=torch.float32)
            drawn.normal_(0.0, residual_std if inner else init_std, generator=generator)
            if not on_cpu:
                parameter.copy_(drawn)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(draw, self.named_parameters()):
                pass

    @classmethod
    def unset(cls, shape: ModelShape) -> ProtoGPT:
        """A model on the CPU whose weights are whatever is in memory: for who sets all of them.

        ``nn.Linear`` would draw each first, which takes 14 s at a billion.
        """
        before = _draws.set(False)
        try:
            return cls(shape)
        finally:
            _draws.reset(before)

    def hidden(self, ids: Tensor, compute_dtype: torch.dtype = torch.float32) -> Tensor:
        """Token ids (B, T) -> final normed states (B, T, C) in ``compute_dtype``."""
        x = self._embed(ids, 0, compute_dtype)
        again = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            # A block draws no random numbers, so there is no state of a generator to bring back.
            x = (
                checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                if again
                else block(x)
            )
        states: Tensor = self.norm(x)
        return states

    def forward(self, ids: Tensor, compute_dtype: torch.dtype = torch.float32) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) in ``compute_dtype``."""
        return self._head(self.hidden(ids, compute_dtype))

    def extend(
        self,
        ids: Tensor,
        caches: list[KVCache] | None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, list[KVCache]]:
        """Ids (B, T) after the positions in ``caches`` -> logits (B, V) of the last one, caches."""
        past = caches[0].keys.size(2) if caches else 0
        x = self._embed(ids, past, compute_dtype)
        grown: list[KVCache] = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, cache = block.extend(x, caches[i] if caches else None)
            grown.append(cache)
        return self._head(self.norm(x[:, -1])), grown

    def _embed(self, ids: Tensor, past: int, compute_dtype: torch.dtype) -> Tensor:
        if past + ids.size(1) > self.shape.context:
            raise ValueError(
                f"{past + ids.size(1)} positions do not fit a position table of "
                f"{self.shape.context}; shorten the prompt or the answer."
            )
        places = torch.arange(past, past + ids.size(1), device=ids.device)
        embedded: Tensor = self.tokens(ids) + self.positions(places)
        return embedded.to(compute_dtype)

    def _head(self, states: Tensor) -> Tensor:
        return F.linear(states, self.tokens.weight.to(states.dtype))
