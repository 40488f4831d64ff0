"""Delayed scales of float8 tensors: this step's from the largest values of the steps before.

Knowing the largest value of a tensor before it is cast takes a pass over it. The passes that cast
note the largest value they see, and the next step uses what the last ``HISTORY`` steps saw
(Micikevicius et al. 2022, section 3.3). A value above the range that this leaves is cut to the
largest that float8 has, and counted.

Nothing here is read by the host within a step; ``check`` is for log points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 16
"""Steps whose largest values count."""
ALIGNMENT = 4
"""Floats between inverse scales: cuBLAS refuses one whose address is no multiple of 16 bytes."""
HEADROOM = 2.0
"""How much larger than anything in the history a value may be without being cut; a float8's
relative precision does not depend on where in its range a value lies."""


@dataclass(frozen=True)
class Site:
    """One tensor of the step that is cast: views into the tensors of ``Scales``, one element each.

    ``scale`` multiplies, ``inverse`` undoes it, ``amax`` is raised to the largest absolute value.
    """

    name: str
    dtype: torch.dtype
    scale: Tensor
    inverse: Tensor
    amax: Tensor


class Scales:
    """All sites of a model. ``ready`` once a step has been seen; until then nothing is cast."""

    def __init__(self, sites: Mapping[str, torch.dtype], device: torch.device) -> None:
        """``sites``: name -> float8 dtype."""
        self._names = list(sites)
        count = len(self._names)
        largest = [torch.finfo(dtype).max for dtype in sites.values()]
        self._largest = torch.tensor(largest, dtype=torch.float32, device=device)
        self._scale = torch.ones(count, device=device)
        self._inverse = torch.ones(count, ALIGNMENT, device=device)
        self._amax = torch.zeros(count, device=device)
        self._history = torch.zeros(HISTORY, count, device=device)
        self._cut = torch.zeros(count, device=device)
        self.sites = {
            name: Site(
                name, dtype, self._scale[i : i + 1], self._inverse[i, :1], self._amax[i : i + 1]
            )
            for i, (name, dtype) in enumerate(sites.items())
        }

    def update(self) -> None:
        """After a step: what it saw enters the history, and the next step's scales follow.

        A step in which a site saw something that is not finite does not enter its history.
        """
        seen = torch.where(self._amax.isfinite(), self._amax, self._history[-1])
        self._cut += (self._amax * self._scale > self._largest).float()
        self._cut += (~self._amax.isfinite()).float()
        self._history.copy_(torch.cat([self._history[1:], seen[None]]))
        usual = self._history.amax(0)
        fresh = self._largest / (HEADROOM * usual)
        known = (usual > 0) & fresh.isfinite()
        self._scale.copy_(torch.where(known, fresh, self._scale))
        self._inverse.copy_(aligned_inverses(self._scale))
        self._amax.zero_()

    def discard(self) -> None:
        """Forget what was seen since the last step."""
        self._amax.zero_()

    def take_cut(self) -> dict[str, int]:
        """Sites that had to cut a value, or met one that is not finite, with the number of steps
        since the last call. Waits for the device.
        """
        counts = self._cut.tolist()
        self._cut.zero_()
        return {name: int(n) for name, n in zip(self._names, counts, strict=True) if n}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs so that a continued run casts as the undisturbed one."""
        return {
            "fp8.scale": self._scale, "fp8.history": self._history, "fp8.cut": self._cut,
        }  # fmt: skip

    def restored(self) -> bool:
        """To be called when ``tensors`` have been filled; whether any step has been seen.

        Waits for the device.
        """
        self._inverse.copy_(aligned_inverses(self._scale))
        return self.ready()

    def ready(self) -> bool:
        """Whether any step has been seen. Waits for the device."""
        return bool((self._history > 0).any())


def aligned_inverses(scales: Tensor) -> Tensor:
    """(n,) -> (n, ``ALIGNMENT``): 1 / scale in every column, so that ``[i, :1]`` is aligned."""
    return (1.0 / scales)[:, None].repeat(1, ALIGNMENT)


def sites_of(
    layers: int, forward: Iterable[str], backward: Iterable[str], gradients: torch.dtype
) -> dict[str, torch.dtype]:
    """Names ``<layer>.<tensor>`` with e4m3 for activations and ``gradients`` for gradients."""
    every = dict.fromkeys(forward, torch.float8_e4m3fn)
    every |= dict.fromkeys(backward, gradients)
    return {f"{layer}.{name}": dtype for layer in range(layers) for name, dtype in every.items()}
