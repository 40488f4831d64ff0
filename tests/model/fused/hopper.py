"""Compiles every kernel that a training step launches for Hopper, on a machine without a GPU.

    python -m tests.model.fused.hopper [module]

Runs two fused steps of a model with the reference's widths, in bf16 and in float8 with gradients of
either type, and an optimiser step, with launches that compile instead of running. Prints a JSON
line for each kernel: registers, bytes of stack (spills, or arrays that left the registers) and of
shared memory, types. What the steps compute meanwhile means nothing.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tessera.model.fused import backend

_TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")
_HOPPER = GPUTarget("cuda", 90, 32)
_DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiler:
    """Stands in for the launch of a kernel."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, ...], dict[str, Any]] = {}

    def launch(
        self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **named: Any
    ) -> None:
        signature = inspect.signature(kernel.fn)
        ours = {name: value for name, value in named.items() if name in signature.parameters}
        bound = signature.bind(*args, **ours)
        bound.apply_defaults()
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned: dict[tuple[int], list[list[Any]]] = {}
        for place, parameter in enumerate(kernel.params):
            name, value = parameter.name, bound.arguments[parameter.name]
            if name == "PTX":
                value = True
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                types[name], constants[name] = "constexpr", value
                continue
            types[name] = _type_of(value)
            divisible = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if isinstance(divisible, int) and divisible % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
        options = {name: named[name] for name in _OPTIONS if name in named}
        key = (kernel.__name__, *types.items(), *constants.items(), *options.items())
        if key in self.seen:
            return
        source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=_HOPPER, options=options)
        shown = {name: value for name, value in constants.items() if value is not None}
        self.seen[key] = {
            "kernel": kernel.__name__, **_resources(made.asm["cubin"]),
            "shared": made.metadata.shared, "options": options, "constants": shown,
            "tensors": {name: kind for name, kind in types.items() if kind.startswith("*")},
        }  # fmt: skip
        print(json.dumps(self.seen[key]), flush=True)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if abs(value) < 2**31 else "i64"


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_DUMP), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert match, said
    return {"registers": int(match[1]), "stack": int(match[2])}


def launch_every_kernel() -> None:
    """Two steps and an update at the reference's widths; two blocks of 64 tokens."""
    from tessera.model.fused.adamw import FusedAdamW
    from tessera.model.fused.attention import choose_backend
    from tessera.model.fused.engine import Engine
    from tessera.model.fused.recipe import Recipe
    from tessera.model.protogpt import ProtoGPT
    from tessera.model.shape import ModelShape

    shape = ModelShape(layers=1, d_model=1536, heads=16, context=64, vocab_size=4096)
    ids = torch.zeros(1, 64, dtype=torch.int64)
    recipes = (
        Recipe(),
        Recipe(gradients=torch.float8_e4m3fn),
        Recipe(stochastic_weights=True),
    )
    for float8 in (None, *recipes):
        model = ProtoGPT(shape)
        attention = choose_backend("math", ids.device, torch.bfloat16, shape.head_dim)
        engine = Engine(model, torch.bfloat16, attention, float8=float8)
        for _ in range(2):
            engine.micro_step(ids, ids, 64, last=True)
    optimizer = FusedAdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    optimizer.step()


def main() -> None:
    """Compile and print."""
    assert "TRITON_INTERPRET" not in os.environ
    compiler = Compiler()

    def launch(kernel: JITFunction[Any], *args: Any, **named: Any) -> None:
        compiler.launch(kernel, *args, **named)

    JITFunction.run = launch
    backend.use_triton = lambda tensor: True
    launch_every_kernel()


if __name__ == "__main__":
    main()
