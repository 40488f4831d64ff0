"""Both forms of every fused operation, in one process.

A test that asks for ``form`` runs twice: as plain torch, and as the Triton kernel, in Triton's
interpreter unless there is a CUDA device. Its tensors belong on ``device``. Triton decides once,
when it is first imported, whether it interprets, hence the import here; the environment is put back
at once so that no other test of this process sees it.

The interpreter cuts float32 off to bf16 and rounds it wrongly to 8 bits (1.99 becomes 1). Here it
rounds as GPUs do, to nearest even, and saturates where they do, so tests can be exact.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch

_INTERPRET = "TRITON_INTERPRET"
_ON_GPU = torch.cuda.is_available()
_HAS_TRITON = importlib.util.find_spec("triton") is not None

if _HAS_TRITON and not _ON_GPU:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_INTERPRET, "1")
        from triton import language as tl
        from triton.runtime import interpreter

    _SMALL = {
        tl.bfloat16: (torch.bfloat16, torch.int16, math.inf),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.int8, 448.0),
        tl.float8e5: (torch.float8_e5m2, torch.int8, 57344.0),
    }
    _convert = interpreter._convert_float

    def _convert_as_gpus_do(
        values: np.ndarray[Any, Any], source: Any, target: Any, rounding: Any
    ) -> np.ndarray[Any, Any]:
        """The bits of ``values`` in the dtype ``target``, as unsigned integers."""
        if source != tl.float32 or target not in _SMALL:
            return cast("np.ndarray[Any, Any]", _convert(values, source, target, rounding))
        dtype, bits, limit = _SMALL[target]
        wide = torch.from_numpy(np.array(values).view(np.float32)).clamp(-limit, limit)
        small: np.ndarray[Any, Any] = wide.to(dtype).view(bits).numpy()
        return small.view(f"uint{8 * dtype.itemsize}").reshape(values.shape)

    interpreter._convert_float = _convert_as_gpus_do


@pytest.fixture(params=["torch", "triton"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form under test; while the test runs, ``backend.use_triton`` chooses it on ``device``.

    For one form only: ``@pytest.mark.parametrize("form", ["triton"], indirect=True)``.
    """
    chosen = str(request.param)
    if chosen == "triton" and not _HAS_TRITON:
        pytest.skip("there is no Triton here")
    if chosen == "triton" and not _ON_GPU:
        monkeypatch.setenv(_INTERPRET, "1")
    else:
        monkeypatch.delenv(_INTERPRET, raising=False)
    return chosen


@pytest.fixture
def device(form: str) -> torch.device:
    """Where the tensors of the test belong for ``form`` to be chosen."""
    return torch.device("cuda" if form == "triton" and _ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def _new_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN (the largest integer), so what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
