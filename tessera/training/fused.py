"""A replica that computes its micro-batches with the fused operations, on one device.

Who asks for it: precision ``fp8``, ``kernels: fused``, and on Hopper ``kernels: auto``. Evaluations
and what is published come from the float32 weights through the model's own code, as with any other
replica.

With float8 there are two ways back to bf16. A block whose values did not fit float8's range in
more than a quarter of the steps of a log interval gives it up (one value too large for the moment
does no harm); once half of the blocks that had it have, all do. And a run that had to go back to a
checkpoint continues without float8 altogether. Both are decided from what checkpoints and the root
hold, so a continued run decides as an undisturbed one.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from tessera.errors import InputError
from tessera.experiment import Experiment, Float8, Optimizer, Pretrain
from tessera.model.fused.adamw import FusedAdamW, clip_factor
from tessera.model.fused.attention import AttentionBackend, choose_backend
from tessera.model.fused.block8 import BACKWARD, FORWARD
from tessera.model.fused.engine import Engine
from tessera.model.fused.recipe import Recipe
from tessera.model.protogpt import ProtoGPT
from tessera.training.optim import grouped
from tessera.training.parallel import World
from tessera.training.replica import Loss, Replica

HOPPER = 9
"""The major compute capability of an H100, H200 and GH200."""
TOLERATED = 0.25
"""Share of a log interval's casts of a block that may have to cut a value."""
_GRADIENTS = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}


class FusedReplica(Replica):
    """``Replica`` of a world of one around an ``Engine``."""

    strategy = "fused"

    def __init__(
        self,
        model: ProtoGPT,
        world: World,
        compute_dtype: torch.dtype,
        loss_fn: Loss,
        experiment: Pretrain,
    ) -> None:
        super().__init__(model, world, compute_dtype, loss_fn)
        backend = attention_backend(experiment, world.device, compute_dtype)
        self.attention = backend.name
        self._adamw: FusedAdamW | None = None
        recipe = recipe_of(experiment)
        self._engine = Engine(model, compute_dtype, backend, float8=recipe)
        self._began = sum(recipe.blocks(len(model.blocks))) if recipe else 0
        self._interval = experiment.log_every_steps * len(FORWARD + BACKWARD)

    def how(self) -> str:
        """With the attention backend, which decides a quarter of the speed."""
        dtype = "bf16" if self._compute_dtype == torch.bfloat16 else "float32"
        on = len(self._engine.layers_in_float8())
        eight = f", float8 products in {on} of {len(self.model.blocks)} blocks" if on else ""
        return f"the fused operations in {dtype}{eight}, attention by {self.attention}"

    def micro_step(
        self, inputs: Tensor, targets: Tensor, divisor: int | Tensor, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch, by the engine."""
        return self._engine.micro_step(inputs, targets, divisor, last)

    def optimizer(self, settings: Optimizer) -> torch.optim.Optimizer:
        """AdamW that clips and zeroes in its own pass; its state is that of torch's."""
        self._adamw = FusedAdamW(
            grouped(settings, self.trainable), settings.lr, settings.betas, settings.eps
        )
        self._adamw.zero_gradients = True
        return self._adamw

    def clip(self, max_norm: float) -> Tensor:
        """The norm; the gradients are scaled when they are applied."""
        if self._adamw is None:
            return super().clip(max_norm)
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._adamw.clip_factor = clip_factor(norm, max_norm)
        return norm

    def apply(self, optimizer: torch.optim.Optimizer, forbidden: Tensor) -> None:
        """Gradients stay allocated, and zero."""
        assert optimizer is self._adamw, "of another replica"
        self._adamw.found_inf = forbidden
        self._adamw.step()

    def discard(self) -> None:
        """Forget the micro-batches since the last step, also what the scales saw."""
        super().discard()
        self._engine.discard()

    def tensors(self) -> dict[str, Tensor]:
        """The scales of float8; none without."""
        return self._engine.tensors()

    def restored(self) -> None:
        """The engine goes on from the scales that were loaded."""
        self._engine.restored()

    def calm_down(self) -> str | None:
        """Float8 ends for the whole run."""
        if not self._engine.layers_in_float8():
            return None
        self._engine.without_float8(range(len(self.model.blocks)))
        return "the run goes on without float8, in bf16"

    def look_after(self) -> str | None:
        """Blocks whose values did not fit give float8 up; see the module."""
        on = self._engine.layers_in_float8()
        if not on:
            return None
        cut = self._engine.take_cut()
        unfit = [layer for layer in on if cut.get(layer, 0) > TOLERATED * self._interval]
        if not unfit:
            return None
        left = len(on) - len(unfit)
        if left <= self._began // 2:
            self._engine.without_float8(on)
            return (
                f"{self._began - left} of {self._began} blocks have values that do not fit "
                "float8's range; the run goes on without float8, in bf16"
            )
        self._engine.without_float8(unfit)
        which = ", ".join(str(layer) for layer in unfit)
        return f"values of block {which} do not fit float8's range; in bf16 from now on"


def recipe_of(experiment: Pretrain) -> Recipe | None:
    """How the experiment wants its float8 products; None if its precision is another."""
    if experiment.precision != "fp8":
        return None
    chosen = experiment.float8 or Float8()
    return Recipe(
        gradients=_GRADIENTS[chosen.gradients],
        stochastic_weights=chosen.weights == "stochastic",
        fast_gradients=chosen.sums != "exact",
        fast_weights=chosen.sums == "fast",
        keep_first=chosen.keep_first,
        keep_last=chosen.keep_last,
    )


def attention_backend(
    experiment: Pretrain, device: torch.device, compute_dtype: torch.dtype
) -> AttentionBackend:
    """What computes the attention of the fused operations; ``InputError`` if it cannot here."""
    head_dim = experiment.model.d_model // experiment.model.heads
    try:
        return choose_backend(experiment.attention, device, compute_dtype, head_dim)
    except ValueError as error:
        raise InputError(f"{experiment.origin('attention')}: {error}.") from error


def wants_fused(experiment: Experiment, world: World) -> bool:
    """Whether the fused operations compute the steps; ``InputError`` where they cannot.

    With ``kernels: auto`` they do on the one kind of GPU on which they were measured, Hopper, for
    bf16 on one GPU, unless the experiment asks for something that only torch does.
    """
    if not isinstance(experiment, Pretrain):
        return False
    eight = experiment.precision == "fp8"
    if not eight and experiment.kernels != "fused":
        return experiment.kernels == "auto" and _by_default(experiment, world)
    if world.size > 1:
        key = "precision" if eight else "kernels"
        raise InputError(
            f"{experiment.origin(key)}: {key} {'fp8' if eight else 'fused'} trains on one GPU, and "
            f"there are {world.size}; set {'precision: bf16' if eight else 'kernels: torch'}, or "
            "use one GPU."
        )
    return True


def _by_default(experiment: Pretrain, world: World) -> bool:
    return (
        world.size == 1
        and world.device.type == "cuda"
        and torch.cuda.get_device_capability(world.device)[0] == HOPPER
        and experiment.precision != "float32"
        and not experiment.deterministic
        and experiment.compile == "auto"  # who says on or off means torch
        and importlib.util.find_spec("triton") is not None
    )
