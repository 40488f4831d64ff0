"""A worker's part of the model: all of it (alone), a whole copy (DDP) or a share (FSDP).

Gradients are summed, never averaged: the loss of a micro-batch is divided by the targets of the
whole step, wherever they are computed, so the sum over workers is the gradient that one GPU would
have had. That holds for any number of workers; an average undone by a factor would round.

Gradients travel once a step, with the last micro-batch. The tied token table is used first and
last, so its gradient is complete only when the backward pass ends, and nothing is left to hide that
transfer (403 MB at 1B) behind.

DDP holds parameters, gradients and AdamW's moments on every GPU, 16 bytes a trainable parameter,
and every worker steps all of them. FSDP (``fully_shard`` on each block and on the rest) shares them
out; each worker steps its own. Its workers talk in every forward pass, so **all of them must run
equal numbers of micro-batches and of evaluation batches**; fill up with batches whose targets are
all ``IGNORE``: they add exactly zero. Under DDP only the last micro-batch of a step is common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tessera.experiment import Optimizer
from tessera.model.protogpt import ProtoGPT
from tessera.training.optim import build_optimizer
from tessera.training.parallel import World

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``summed_cross_entropy``, compiled or not: states, head, targets -> sum, float32 scalar."""

SINGLE, DDP, FSDP = "single", "ddp", "fsdp"
_TRAINED_BYTES, _FROZEN_BYTES = 16, 4
_NEW, _OLD = "forward_sync_buffers", "broadcast_buffers"  # torch 2.13 renamed it, and warns
_BUFFERS = _NEW if _NEW in signature(DistributedDataParallel.__init__).parameters else _OLD


@dataclass(frozen=True)
class Tuning:
    """How gradients and parameters travel; the defaults are what training uses.

    DDP: gradients are sent together in buckets of ``bucket_mb``; with ``bucket_view`` they live in
    the buckets; ``bf16_gradients`` halves the traffic and rounds the gradients, so it changes the
    loss. DDP's ``static_graph`` is not offered: torch 2.13 fails if the first backward pass does
    not synchronise. FSDP: with ``reshard`` the other workers' parameters are given back after a
    forward pass and fetched again for the backward.
    """

    bucket_mb: float = 100.0
    bucket_view: bool = True
    bf16_gradients: bool = False
    reshard: bool = True


def choose_strategy(strategy: str, model: nn.Module, world: World) -> str:
    """``single``, ``ddp`` or ``fsdp``, from what the experiment's ``parallel`` asks for.

    ``auto`` is DDP, unless weights, gradients and AdamW's moments would take more than half of the
    GPU's memory.
    """
    if world.size == 1:
        return SINGLE
    if strategy != "auto":
        return strategy
    if world.device.type != "cuda":
        return DDP
    needed = sum(
        p.numel() * (_TRAINED_BYTES if p.requires_grad else _FROZEN_BYTES)
        for p in model.parameters()
    )
    memory: int = torch.cuda.get_device_properties(world.device).total_memory
    return FSDP if needed > memory // 2 else DDP


class Replica:
    """The model of a world of one, and what its two relatives for several workers share.

    ``trainable`` holds the parameters to give to the optimiser, under the model's own names (FSDP
    replaces them, so take them from here, after ``build``). Fused AdamW steps them and heeds
    ``found_inf`` (a float32 scalar tensor on the device) with either kind. ``strategy`` says which.
    """

    strategy = SINGLE

    def __init__(
        self, model: ProtoGPT, world: World, compute_dtype: torch.dtype, loss_fn: Loss
    ) -> None:
        """``build`` chooses the class; the model is on the device already."""
        self.model, self.world = model, world
        self._compute_dtype, self._loss_fn = compute_dtype, loss_fn
        self._parameters = dict(model.named_parameters())
        self.trainable = {n: p for n, p in self._parameters.items() if p.requires_grad}

    @staticmethod
    def build(
        model: ProtoGPT,
        strategy: str,
        world: World,
        compute_dtype: torch.dtype,
        loss_fn: Loss,
        tuning: Tuning | None = None,
    ) -> Replica:
        """Wrap ``model``; ``strategy`` is ``auto``, ``ddp`` or ``fsdp``.

        Blocks may have been compiled in place before. Rank 0's weights reach the others (DDP), or
        every rank keeps its share of the equal weights it was given (FSDP).
        """
        chosen = choose_strategy(strategy, model, world)
        if chosen == SINGLE:
            return Replica(model, world, compute_dtype, loss_fn)
        kind = {DDP: _DdpReplica, FSDP: _FsdpReplica}[chosen]
        return kind(model, world, compute_dtype, loss_fn, tuning or Tuning())

    def micro_step(
        self, inputs: Tensor, targets: Tensor, divisor: int | Tensor, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch; returns this worker's loss / ``divisor``.

        inputs, targets (B, T) int64 on the device; ``divisor`` counts the targets of the whole step
        on all workers. After the call with ``last``, ``.grad`` is the gradient of the sum over all
        workers and micro-batches. The returned scalar is detached; ``world.sum`` adds the others.
        """
        loss = self._local_loss(inputs, targets) / divisor
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def discard(self) -> None:
        """Forget the micro-batches since the last step."""
        for parameter in self.trainable.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside parameters, buffers and moments; restored in place."""
        return {}

    def restored(self) -> None:
        """To be called when a checkpoint has been loaded into ``tensors``."""

    def calm_down(self) -> str | None:
        """After the run went back to a checkpoint: what is computed more carefully now, if so."""
        return None

    def look_after(self) -> str | None:
        """At a log point: what had to change in how it computes, for people; None if nothing."""
        return None

    def optimizer(self, settings: Optimizer) -> torch.optim.Optimizer:
        """What ``apply`` steps: AdamW over ``trainable``."""
        return build_optimizer(settings, self.trainable)

    def apply(self, optimizer: torch.optim.Optimizer, forbidden: Tensor) -> None:
        """Step with the clipped gradients; the next step begins without any, or with zeros.

        ``forbidden``, a float32 scalar on the device, above 0 leaves weights and moments as they
        are; the host does not look at it.
        """
        optimizer.found_inf = forbidden  # type: ignore[attr-defined]  # what fused AdamW heeds
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def how(self) -> str:
        """What computes the steps, in words for people."""
        dtype = "bf16" if self._compute_dtype == torch.bfloat16 else "float32"
        several = "" if self.strategy == SINGLE else f", {self.strategy}"
        return f"torch in {dtype}{several}"

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global norm of at most ``max_norm``, at the latest in ``apply``.

        Returns the norm before that, a plain scalar on the device, equal on all workers. The host
        does not wait.
        """
        return nn.utils.clip_grad_norm_(list(self.trainable.values()), max_norm)

    def finite(self) -> bool:
        """Whether every trainable weight, of all workers, is a number (waits for the device)."""
        weights = [local_tensor(parameter.detach()) for parameter in self.trainable.values()]
        mine = bool(torch.stack([weight.isfinite().all() for weight in weights]).all())
        return not self.world.any(not mine)

    def full_state(self) -> dict[str, Tensor]:
        """Whole float32 copies of all parameters on the CPU of rank 0; elsewhere empty.

        All workers must call it.
        """
        state = {}
        for name, parameter in self._parameters.items():
            tensor = self._whole(parameter.detach())
            if self.world.is_main:
                state[name] = tensor.to("cpu", torch.float32, copy=True).contiguous()
        return state

    @contextmanager
    def evaluating(self) -> Iterator[ProtoGPT]:
        """The model, for forward passes alone: ``hidden``, then the loss with ``tokens.weight``.

        Under FSDP all workers must run equal numbers of batches inside. Share the batches out and
        add the sums with ``world.sum``, or let every worker run all of them.
        """
        with torch.no_grad():
            yield self.model

    def _local_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        states = self.model.hidden(inputs, self._compute_dtype)
        return self._loss_fn(states, self.model.tokens.weight, targets)

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor


class _Step(nn.Module):
    """Loss as a module's forward pass, which is what DDP wraps."""

    def __init__(self, model: ProtoGPT, local_loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._local_loss = local_loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._local_loss(inputs, targets)


class _DdpReplica(Replica):
    """A whole copy on every worker; gradients are added up while the backward pass goes on."""

    strategy = DDP

    def __init__(
        self,
        model: ProtoGPT,
        world: World,
        compute_dtype: torch.dtype,
        loss_fn: Loss,
        tuning: Tuning,
    ) -> None:
        import torch._dynamo.config as dynamo

        # It would cut each compiled block into one graph a bucket, for the overlap that compiling
        # block by block already gives.
        dynamo.optimize_ddp = False
        super().__init__(model, world, compute_dtype, loss_fn)
        self._ddp = DistributedDataParallel(
            _Step(model, self._local_loss),
            device_ids=[world.device] if world.device.type == "cuda" else None,
            **{_BUFFERS: False},  # type: ignore[arg-type]  # each worker keeps its own
            bucket_cap_mb=cast("int", tuning.bucket_mb),
            gradient_as_bucket_view=tuning.bucket_view,
        )
        add_up = lambda state, bucket: _add_up(bucket)  # noqa: E731 - DDP refuses our annotations
        hook = bf16_compress_wrapper(add_up) if tuning.bf16_gradients else add_up
        self._ddp.register_comm_hook(None, hook)

    def micro_step(
        self, inputs: Tensor, targets: Tensor, divisor: int | Tensor, last: bool
    ) -> Tensor:
        with nullcontext() if last else self._ddp.no_sync():
            loss: Tensor = self._ddp(inputs, targets) / divisor
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _add_up(bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own reduction divides by the number of workers; this one does not."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[Any] = work.get_future()
    return future.then(lambda done: cast("Tensor", done.value()[0]))


class _FsdpReplica(Replica):
    """A share of every parameter, gradient and moment; blocks are put together when needed."""

    strategy = FSDP

    def __init__(
        self,
        model: ProtoGPT,
        world: World,
        compute_dtype: torch.dtype,
        loss_fn: Loss,
        tuning: Tuning,
    ) -> None:
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("workers",))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=tuning.reshard)
        # The head is used after the forward pass, so the root's own parameters stay together.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(model, "hidden")
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        super().__init__(model, world, compute_dtype, loss_fn)

    def micro_step(
        self, inputs: Tensor, targets: Tensor, divisor: int | Tensor, last: bool
    ) -> Tensor:
        root = self._modules[0]
        root.set_requires_gradient_sync(last)
        root.set_is_last_backward(last)
        return super().micro_step(inputs, targets, divisor, last)

    def clip(self, max_norm: float) -> Tensor:
        # On the local shares: a DTensor per parameter costs the host a millisecond a layer.
        shares = [local_tensor(p.grad) for p in self.trainable.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(shares)
        norm = self.world.sum(norm.square()).sqrt()
        torch._foreach_mul_(shares, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextmanager
    def evaluating(self) -> Iterator[ProtoGPT]:
        try:
            with torch.no_grad():
                yield self.model
        finally:
            # Without a backward pass the root stays whole; weights loaded or stepped now would be
            # overlooked by the next forward pass.
            for module in self._modules:
                module.reshard()

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This worker's share of a DTensor (shared memory, no copy); any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
