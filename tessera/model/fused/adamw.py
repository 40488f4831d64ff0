"""AdamW with everything that an optimiser step does to a weight in one pass over memory.

Per parameter torch's way moves 4 bytes for the norm, 8 to scale the gradient by the clip factor (or
4, if the optimiser does it through ``grad_scale`` and writes the gradient back), 28 for the update,
4 to zero the gradient and 6 for a bf16 copy of the weight. Here it is 4 for the norm and 34 for all
of the rest; ``torch.nn.utils.get_total_norm`` reads each gradient once and is deterministic, so
nothing of our own replaces it. In the trainer's 1.01e9 parameters the difference is 8 to 12 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tessera.model.fused import backend


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of the global ``norm`` are multiplied by, as in ``clip_grad_norm_``: () -> ().

    At most 1; the host does not look at it.
    """
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


class FusedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` (Loshchilov & Hutter 2019) with ``fused=True``, in one pass.

    Its arithmetic and its state (``step``, ``exp_avg``, ``exp_avg_sq``, all float32 on the device)
    are those of the parent, so a checkpoint of either continues with the other. Parameters are
    dense float32 tensors, not shards. The attributes below may be set before each step. Gradients
    are left unclipped on a GPU and clipped on a CPU, unless they are zeroed.
    """

    clip_factor: Tensor | None = None
    """Float32 scalar on the device that all gradients are multiplied by; see ``clip_factor``."""

    copies: Mapping[nn.Parameter, Tensor]
    """For a parameter, the tensor of its shape and a narrower dtype that receives its new value."""

    found_inf: Tensor | None = None
    """Above 0, a float32 scalar on the device: weights and state stay as they are."""

    zero_gradients = False
    """Whether gradients are zero after a step, also after one that ``found_inf`` forbade."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.copies = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. There is no ``closure``."""
        assert closure is None, "a closure would run with gradients off"
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if updated and backend.use_triton(updated[0]):
            for group in self.param_groups:
                self._update(group)
            return
        gradients = [p.grad for p in updated]
        if self.clip_factor is not None and gradients:
            torch._foreach_mul_(gradients, self.clip_factor)
        super().step()
        for parameter in updated:
            if parameter in self.copies:
                self.copies[parameter].copy_(parameter)
        if self.zero_gradients and gradients:
            torch._foreach_zero_(gradients)

    def _update(self, group: dict[str, Any]) -> None:
        """The Triton form for one group: one launch a parameter."""
        from tessera.model.fused.kernels.adamw import launch_adamw

        parameters: list[nn.Parameter] = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        states = [self._state_of(p) for p in parameters]
        steps = [state["step"] for state in states]
        one = torch.ones((), device=parameters[0].device)
        forbidden = torch.zeros_like(one) if self.found_inf is None else self.found_inf
        # A list: given one tensor, torch reads its value, and the host waits for the device.
        torch._foreach_add_(steps, [torch.where(forbidden > 0, 0.0, one)] * len(steps))
        # Powers in float64, or 1 - beta^step loses its digits; on the device, where the steps are.
        counts = torch.stack(steps).double()
        (beta1, beta2), lr = group["betas"], group["lr"]
        rates = (lr / (1 - beta1**counts)).float()
        roots = (1 - beta2**counts).rsqrt().float()
        for number, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
            assert parameter.grad is not None
            launch_adamw(
                parameter,
                parameter.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                self.copies.get(parameter),
                rates,
                roots,
                number,
                one if self.clip_factor is None else self.clip_factor,
                forbidden,
                shrink=lr * group["weight_decay"],
                betas=(beta1, beta2),
                eps=group["eps"],
                zero=self.zero_gradients,
            )

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's state, made as the parent makes it if it has none yet."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
