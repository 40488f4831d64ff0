"""Loss and gradient of ProtoGPT without autograd: every pass over memory is one that is needed.

The numbers are those of ``ProtoGPT.hidden`` and ``summed_cross_entropy`` under autograd, up to the
rounding of sums: the same values are rounded to the compute dtype in the same places. Gradients are
added to ``.grad`` in the parameters' own dtype, so those of several micro-batches add up in
float32, where autograd rounds each micro-batch's to the compute dtype first.

With ``float8`` the matrix products inside the blocks take float8 operands (``block8``), as its
``Recipe`` says. The first step runs without it, to learn how large the values are (``scaling``).
Evaluation never uses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.model.fused import block as plain
from tessera.model.fused import block8 as eight
from tessera.model.fused.attention import AttentionBackend
from tessera.model.fused.block import BlockTensors, Dimensions
from tessera.model.fused.embedding import embed, embedding_backward
from tessera.model.fused.fp8 import amax_of, verify
from tessera.model.fused.gelu import Approximate
from tessera.model.fused.head import head_loss
from tessera.model.fused.norm import add_rms_norm, rms_norm_backward
from tessera.model.fused.recipe import Recipe
from tessera.model.fused.scaling import Scales, sites_of
from tessera.model.fused.working import WorkingCopies, block_parameters
from tessera.model.protogpt import ProtoGPT

MULTIPLE = 16
"""Of which float8 products want every side to be a multiple."""


@dataclass
class _Kept:
    """One block between its forward and its backward pass; ``inner`` None: to be computed again."""

    x: Tensor
    delta: Tensor | None
    inner: plain.Activations | eight.Activations8 | None


class Engine:
    """Computes micro-batches for one model on one device."""

    def __init__(
        self,
        model: ProtoGPT,
        compute_dtype: torch.dtype,
        attention: AttentionBackend,
        *,
        float8: Recipe | None = None,
    ) -> None:
        """The model's own parameters receive the gradients. ``float8``: see the module.

        Raises ``ValueError``, a sentence, where float8 does not go with the model's shape, or the
        casts come out wrong on this GPU.
        """
        if float8 and model.shape.d_model % MULTIPLE:
            raise ValueError(
                f"precision fp8 needs a model.d_model that is a multiple of {MULTIPLE}, and this "
                f"one is {model.shape.d_model}; change it or set precision: bf16."
            )
        self._model, self._dtype, self._attention = model, compute_dtype, attention
        self._gelu: Approximate = "tanh" if model.shape.gelu == "tanh" else "none"
        self._blocks = [block_parameters(block) for block in model.blocks]
        self._recipe = float8 or Recipe()
        stochastic = self._recipe.stochastic_weights
        self._working = WorkingCopies(model, compute_dtype, stochastic=stochastic)
        device = model.tokens.weight.device
        layers = len(self._blocks)
        self._float8 = float8.blocks(layers) if float8 else [False] * layers
        self._flags = torch.tensor(self._float8, dtype=torch.float32, device=device)
        self._scales: Scales | None = None
        if float8:
            if device.type == "cuda":
                verify(device, float8.gradients, self._gelu, float8.stochastic_weights)
            names = (*eight.FORWARD, *eight.BACKWARD)
            dtypes = sites_of(layers, eight.FORWARD, eight.BACKWARD, float8.gradients)
            self._scales = Scales(dtypes, device)
            sites = self._scales.sites
            self._sites = [{n: sites[f"{i}.{n}"] for n in names} for i in range(layers)]
        self._steps, self._steps_kept = 0, torch.zeros(1, dtype=torch.int64, device=device)
        self._calibrated = self._in_step = self._fresh = False
        self._use8 = [False] * layers

    # -- the step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def micro_step(self, ids: Tensor, targets: Tensor, divisor: int | Tensor, last: bool) -> Tensor:
        """Loss / ``divisor`` of one micro-batch; its gradient is added to ``.grad``.

        ids, targets (B, T) int64 on the device; the loss is a float32 scalar there. Before the
        first of a step, gradients are None or zero. After the call with ``last`` those of the step
        are complete; until then, or until ``discard``, the weights must stay as they are.
        """
        self._prepare_gradients()
        if not self._in_step:
            self._use8 = [on and self._calibrated for on in self._float8]
            self._working.refresh(self._use8, self._steps)
            self._in_step = True
            self._fresh = True
        use8 = self._use8
        dims = Dimensions(
            ids.size(0),
            ids.size(1),
            self._model.shape.heads,
            self._model.shape.norm_eps,
            self._gelu,
        )
        kept, states = self._forward(ids, dims, use8)
        loss, dx = self._head(states, targets.reshape(-1), divisor)
        for number in reversed(range(len(self._blocks))):
            dx = self._block_backward(number, dx, kept.pop(), dims, use8[number])
        embedding_backward(
            dx, ids, _grad(self._model.tokens.weight), _grad(self._model.positions.weight)
        )
        self._fresh = False
        if last:
            self._in_step = False
            self._steps += 1
            self._steps_kept += 1
            if self._scales is not None:
                self._scales.update()
                self._calibrated = True
        return loss

    def _forward(
        self, ids: Tensor, dims: Dimensions, use8: list[bool]
    ) -> tuple[list[_Kept], tuple[Tensor, Tensor | None]]:
        model = self._model
        x = embed(ids, model.tokens.weight, model.positions.weight, self._dtype)
        delta: Tensor | None = None
        kept: list[_Kept] = []
        for number, on in enumerate(use8):
            entered = (x, delta)
            x, delta, inner = self._block_forward(number, x, delta, dims, on)
            kept.append(_Kept(*entered, None) if model.recompute else _Kept(x, None, inner))
        return kept, (x, delta)

    def _head(
        self, states: tuple[Tensor, Tensor | None], targets: Tensor, divisor: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        norm, eps = self._model.norm.weight, self._model.shape.norm_eps
        total, rstd, h = add_rms_norm(*states, norm, eps)
        loss, dh = head_loss(
            h, self._working.head, targets, divisor, _grad(self._model.tokens.weight)
        )
        return loss, rms_norm_backward(dh, total, rstd, norm, None, _grad(norm))

    def _block_forward(
        self, number: int, x: Tensor, delta: Tensor | None, dims: Dimensions, on: bool
    ) -> tuple[Tensor, Tensor, plain.Activations | eight.Activations8]:
        weights = self._working.blocks[number]
        if not on:
            see = self._watch(number)
            return plain.forward(x, delta, weights, self._attention, dims, see)
        weights8 = self._working.blocks8[number]
        assert weights8 is not None
        sites = self._sites[number]
        return eight.forward(x, delta, weights, weights8, sites, self._attention, dims)

    def _block_backward(
        self, number: int, dx: Tensor, kept: _Kept, dims: Dimensions, on: bool
    ) -> Tensor:
        inner = kept.inner
        if inner is None:
            _, _, inner = self._block_forward(number, kept.x, kept.delta, dims, on)
        weights, attention = self._working.blocks[number], self._attention
        grads = BlockTensors(*(_grad(p) for p in self._blocks[number]))
        if isinstance(inner, plain.Activations):
            see = self._watch(number)
            return plain.backward(dx, inner, weights, grads, attention, dims, see)
        weights8 = self._working.blocks8[number]
        assert weights8 is not None
        sites = self._sites[number]
        return eight.backward(
            dx, inner, weights, weights8, sites, grads, attention, dims, self._fresh,
            self._recipe.fast_gradients, self._recipe.fast_weights,
        )  # fmt: skip

    def _watch(self, number: int) -> plain.Watch:
        """While nothing is known yet, what is larger than all before at a site is noted."""
        if self._scales is None or self._calibrated:
            return plain.see_nothing
        sites = self._sites[number]

        def see(name: str, tensor: Tensor) -> None:
            amax = sites[name].amax
            amax.copy_(torch.maximum(amax, amax_of(tensor)))

        return see

    def _prepare_gradients(self) -> None:
        for parameter in self._model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    # -- float8: state and fallback ----------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside parameters and moments; restore them in place."""
        if self._scales is None:
            return {}
        kept = self._scales.tensors() | {"fp8.layers": self._flags}
        return kept | {"fp8.steps": self._steps_kept} if self._recipe.stochastic_weights else kept

    def restored(self) -> None:
        """To be called when ``tensors`` have been filled from a checkpoint."""
        self._in_step = False
        self._steps = int(self._steps_kept)
        self._calibrated = self._scales is not None and self._scales.restored()
        self._float8 = [flag > 0 for flag in self._flags.tolist()]

    def discard(self) -> None:
        """Forget what the micro-batches since the last step noted; the weights may change."""
        self._in_step = False
        if self._scales is not None:
            self._scales.discard()

    def layers_in_float8(self) -> list[int]:
        """Numbers of the blocks whose products are taken in float8."""
        return [number for number, on in enumerate(self._float8) if on]

    def without_float8(self, layers: Iterable[int]) -> None:
        """These blocks compute in the compute dtype from now on."""
        for layer in layers:
            self._float8[layer] = False
            self._flags[layer] = 0.0

    def take_cut(self) -> dict[int, int]:
        """Blocks whose values did not fit float8's range, with the number of steps and sites since
        the last call. Waits for the device; for log points.
        """
        counts: dict[int, int] = {}
        for name, count in (self._scales.take_cut() if self._scales else {}).items():
            layer = int(name.split(".", 1)[0])
            counts[layer] = counts.get(layer, 0) + count
        return counts


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
