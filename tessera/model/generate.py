"""Generation with a key-value cache: greedy, or sampled with one seed a sample.

Every sample draws from a generator of its own on the CPU, so that what a seed says does not depend
on which other samples share the batch or on the device's random state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.model.protogpt import ProtoGPT


@torch.inference_mode()
def generate(
    model: ProtoGPT,
    prompt: Sequence[int],
    *,
    seeds: Sequence[int | None],
    max_new_tokens: int,
    stop: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    forbidden: Sequence[int] = (),
    compute_dtype: torch.dtype = torch.float32,
) -> list[list[int]]:
    """Continue ``prompt`` once for every entry of ``seeds``; None means greedy.

    Returns the new ids without the ``stop`` token. An answer ends at ``stop``, after
    ``max_new_tokens``, or when the position table is full. ``forbidden`` ids are never produced. A
    prompt that leaves no room for one new token is a ValueError.
    """
    room = model.shape.context - len(prompt)
    if not prompt or room < 1:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens leaves no room for an answer in a context of "
            f"{model.shape.context}; shorten the prompt."
        )
    device = model.tokens.weight.device
    generators = [None if s is None else torch.Generator().manual_seed(s) for s in seeds]
    answers: list[list[int]] = [[] for _ in seeds]
    running = [True] * len(seeds)
    ids = torch.tensor([list(prompt)] * len(seeds), device=device)
    caches = None
    for _ in range(min(max_new_tokens, room)):
        logits, caches = model.extend(ids, caches, compute_dtype)
        scores = logits.float().cpu()
        scores[:, list(forbidden)] = -torch.inf
        picked = [
            _pick(scores[i], generators[i], temperature, top_p) if running[i] else stop
            for i in range(len(seeds))
        ]
        for i, token in enumerate(picked):
            running[i] = running[i] and token != stop
            if running[i]:
                answers[i].append(token)
        if not any(running):
            break
        ids = torch.tensor(picked, device=device).unsqueeze(1)
    return answers


def _pick(
    scores: Tensor, generator: torch.Generator | None, temperature: float, top_p: float
) -> int:
    """One token from scores (V,): the largest, or a draw from the least set of mass ``top_p``."""
    if generator is None or temperature == 0.0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores / temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    outside = ordered.cumsum(0) - ordered >= top_p
    outside[0] = False
    ordered[outside] = 0.0
    return int(order[torch.multinomial(ordered, 1, generator=generator)])
