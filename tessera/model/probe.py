"""What a device is, and how fast it copies, multiplies and attends at a model's own shapes.

These are the ceilings that a training step is held against: measured here and now, on random
numbers (zeros draw less power, and a card that is not warm clocks higher), median of some
repetitions. They are short: a card that has run for minutes is a few percent slower.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import psutil
import torch
from torch import Tensor

from tessera.model.shape import ModelShape, linear_sizes

Told = Callable[[str], None]
"""Is called with what was just measured."""

FLOAT8_FROM = (8, 9)
"""CUDA compute capability from which matrix products take float8."""
HEAD_TOKENS = 4096
"""Tokens whose logits are computed at once, at most: all of a micro-batch's take gigabytes."""
BACKWARD_PRODUCTS = 2.5
"""Products of the backward pass of attention for each of the forward pass (5 for 2), as
flash-attention's authors count: the soft-max's input is computed again."""
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
_QUERY = ("power.limit", "driver_version", "clocks.max.sm")
_WARM_UP = 3


@dataclass(frozen=True)
class Card:
    """A device and the software that drives it; None where nobody says.

    ``memory_bytes`` is the device's, on a CPU the machine's; ``power_limit_w`` is in watts and
    ``clock_mhz`` the highest of the multiprocessors.
    """

    name: str
    kind: str
    memory_bytes: int
    power_limit_w: float | None
    clock_mhz: float | None
    driver: str | None
    capability: str | None
    torch: str
    cuda: str | None
    triton: str | None
    python: str


@dataclass(frozen=True)
class Product:
    """One matrix product (m, k) x (k, n) of the model and the seconds it took."""

    name: str
    dtype: str
    m: int
    k: int
    n: int
    seconds: float

    @property
    def flops(self) -> float:
        """A multiplication and an addition for each of m x k x n."""
        return 2.0 * self.m * self.k * self.n


@dataclass(frozen=True)
class AttentionSpeed:
    """One backend at the model's shape: FLOP/s with the causal half of the square counted."""

    backend: str
    forward_flops_per_s: float
    backward_flops_per_s: float


@dataclass(frozen=True)
class Rates:
    """FLOP/s over all products of the blocks, and of the head, each at its measured time."""

    blocks: float
    head: float


def describe_card(device: torch.device, name: str) -> Card:
    """``name`` is the machine's word for the device, which torch does not know of a CPU."""
    if device.type != "cuda":
        return _card(name, device, psutil.virtual_memory().total, [None] * len(_QUERY), None)
    properties = torch.cuda.get_device_properties(device)
    told = _nvidia_smi(str(getattr(properties, "uuid", "")))
    capability = f"{properties.major}.{properties.minor}"
    return _card(properties.name, device, properties.total_memory, told, capability)


def _card(
    name: str,
    device: torch.device,
    memory: int,
    told: list[str | None],
    capability: str | None,
) -> Card:
    power, driver, clock = told
    return Card(
        name=name,
        kind=device.type,
        memory_bytes=memory,
        power_limit_w=_number(power),
        clock_mhz=_number(clock),
        driver=driver,
        capability=capability,
        torch=torch.__version__,
        cuda=torch.version.cuda if device.type == "cuda" else None,
        triton=_version("triton"),
        python=platform.python_version(),
    )


def _nvidia_smi(uuid: str) -> list[str | None]:
    """The answers to ``_QUERY``; None for each where the tool is missing or does not say."""
    nothing: list[str | None] = [None] * len(_QUERY)
    tool = shutil.which("nvidia-smi")
    if tool is None or not uuid:
        return nothing
    command = [tool, f"--id=GPU-{uuid.removeprefix('GPU-')}", f"--query-gpu={','.join(_QUERY)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            check=True, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return nothing
    answers = [part.strip() for part in done.stdout.strip().split(",")]
    if len(answers) != len(_QUERY):
        return nothing
    return [None if answer.startswith("[") else answer for answer in answers]


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# -- timing ----------------------------------------------------------------------------------------


class Stopwatch:
    """Times marks on a device: ``mark`` after each piece of work, ``intervals`` at the end.

    On a GPU the marks are events in its queue, so that the host need not wait between them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """The work queued so far ends here."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between the marks; waits for the last."""
        if self._device.type == "cuda":
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [b - a for a, b in zip(self._times, self._times[1:], strict=False)]


def median_seconds(work: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Median time of ``work`` on ``device``, after a few that are not counted."""
    for _ in range(_WARM_UP):
        work()
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(repetitions):
        work()
        watch.mark()
    return statistics.median(watch.intervals())


# -- ceilings --------------------------------------------------------------------------------------


def copy_speed(device: torch.device, repetitions: int) -> float:
    """Bytes a second, read and written together, of a copy within the device's memory."""
    size = _COPY_BYTES[device.type]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / median_seconds(lambda: target.copy_(source), device, repetitions)


def float8_missing(device: torch.device) -> str | None:
    """Why ``device`` does not multiply float8 matrices, in a few words; None if it does."""
    if device.type != "cuda":
        return "a CPU has no float8 products"
    if torch.cuda.get_device_capability(device) < FLOAT8_FROM:
        return "no float8 products before Ada and Hopper"
    return None


def matrix_products(
    shape: ModelShape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repetitions: int,
    told: Told = lambda _: None,
) -> list[Product]:
    """Every product of a step of ``tokens`` at once: forward, input's and weight's gradient.

    With ``torch.float8_e4m3fn`` those of the blocks alone, both operands float8 and the result
    bf16, since the head stays in bf16. ``tokens`` must be a multiple of 16 for that.
    """
    found = []
    for name, (inside, outside) in _matrices(shape, dtype).items():
        m = min(tokens, HEAD_TOKENS) if name == "head" else tokens
        sizes = {
            "forward": (m, inside, outside),
            "d_input": (m, outside, inside),
            "d_weight": (outside, m, inside),
        }
        for which, (rows, summed, columns) in sizes.items():
            work = _product(rows, summed, columns, dtype, device)
            seconds = median_seconds(work, device, repetitions)
            label = f"{name} {which}"
            found.append(Product(label, _spelled(dtype), rows, summed, columns, seconds))
            told(f"{_spelled(dtype)} {label}")
    return found


def _matrices(shape: ModelShape, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    sizes = linear_sizes(shape)
    if dtype != torch.float8_e4m3fn:
        sizes["head"] = (shape.d_model, shape.vocab_size)
    return sizes


def _product(
    rows: int, summed: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """A product of random matrices, ready to be taken again and again."""
    if dtype == torch.float8_e4m3fn:
        left = torch.randn(rows, summed, device=device).to(dtype)
        right = torch.randn(columns, summed, device=device).to(dtype)
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
    plain = torch.randn(rows, summed, device=device, dtype=dtype)
    other = torch.randn(summed, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return lambda: torch.mm(plain, other, out=out)


def rates(products: list[Product]) -> Rates:
    """FLOPs of all products over the seconds of all; float8's head is missing, so 0."""

    def rate(chosen: list[Product]) -> float:
        seconds = sum(product.seconds for product in chosen)
        return sum(product.flops for product in chosen) / seconds if seconds else 0.0

    heads = [product for product in products if product.name.startswith("head ")]
    return Rates(rate([p for p in products if p not in heads]), rate(heads))


def attention_flops(shape: ModelShape, sequence: int, tokens: int) -> tuple[float, float]:
    """(forward, backward) FLOPs of one layer's attention over ``tokens``, the causal half."""
    forward = 2.0 * tokens * sequence * shape.d_model
    return forward, BACKWARD_PRODUCTS * forward


def attention_speed(
    name: str,
    shape: ModelShape,
    batch: int,
    sequence: int,
    dtype: torch.dtype,
    device: torch.device,
    repetitions: int,
) -> AttentionSpeed:
    """One backend of ``fused.attention``, (batch, sequence, heads, head width) a tensor.

    Raises ``ValueError`` where it does not run here.
    """
    from tessera.model.fused.attention import choose_backend

    backend = choose_backend(name, device, dtype, shape.head_dim)
    whole = (batch, sequence, 3, shape.heads, shape.head_dim)
    qkv = torch.randn(whole, device=device, dtype=dtype)
    out, saved = backend.forward(qkv)
    gradient = torch.randn_like(out)
    forward, backward = attention_flops(shape, sequence, batch * sequence)
    took = median_seconds(lambda: backend.forward(qkv), device, repetitions)
    took_back = median_seconds(
        lambda: backend.backward(gradient, qkv, out, saved), device, repetitions
    )
    return AttentionSpeed(name, forward / took, backward / took_back)


def _spelled(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "float8"}
    return names.get(dtype, str(dtype).removeprefix("torch."))
