"""Which form of an operation runs: the Triton kernel on a GPU, plain torch elsewhere."""

from __future__ import annotations

import os

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a GPU, or Triton's interpreter stands in for one.

    ``TRITON_INTERPRET=1`` must be set before Triton is first imported; the tests set it.
    """
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
