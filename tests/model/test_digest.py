from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

from tessera.model.digest import weights_digest


def make() -> dict[str, Tensor]:
    return {
        "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "c.count": torch.tensor(7, dtype=torch.int64),
    }


def test_it_is_the_documented_hash() -> None:
    material = (
        b"a.weight\0bfloat16\0" + b"2\0" + struct.pack("<2H", 0x3FC0, 0xC000)
        + b"b.weight\0float32\0" + b"2x3\0" + struct.pack("<6f", 0, 1, 2, 3, 4, 5)
        + b"c.count\0int64\0" + b"\0" + struct.pack("<q", 7)
    )  # fmt: skip
    assert weights_digest(make()) == hashlib.sha256(material).hexdigest()


def test_order_and_layout_do_not_matter() -> None:
    state = make()
    expected = weights_digest(state)
    assert weights_digest(dict(reversed(state.items()))) == expected
    strided = state["b.weight"].T.contiguous().T
    assert not strided.is_contiguous()
    assert weights_digest({**state, "b.weight": strided}) == expected
    parameter = torch.nn.Parameter(state["b.weight"].clone())
    assert weights_digest({**state, "b.weight": parameter}) == expected


def test_a_bit_a_name_a_dtype_and_a_shape_matter() -> None:
    state = make()
    bit = state["b.weight"].clone()
    bit.view(torch.int32)[1, 2] ^= 1
    assert torch.allclose(bit, state["b.weight"])
    renamed = {("b.weights" if n == "b.weight" else n): t for n, t in state.items()}
    others = [
        {**state, "b.weight": bit},
        renamed,
        {**state, "b.weight": state["b.weight"].view(torch.int32)},
        {**state, "b.weight": state["b.weight"].reshape(3, 2)},
        {**state, "b.weight": state["b.weight"].reshape(6)},
        {**state, "c.count": state["c.count"].reshape(1)},
        {n: t for n, t in state.items() if n != "c.count"},
        {**state, "b.weight": state["a.weight"], "a.weight": state["b.weight"]},
    ]
    digests = {weights_digest(other) for other in [state, *others]}
    assert len(digests) == 1 + len(others)


def test_minus_zero_is_not_zero() -> None:
    zero, minus = torch.zeros(2), -torch.zeros(2)
    assert torch.equal(zero, minus)
    assert weights_digest({"a": zero}) != weights_digest({"a": minus})
