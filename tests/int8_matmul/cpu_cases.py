"""Calls of int8 matmul for the tests of the CPU backend, and what they must give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import _native
from kernels.int8_matmul import cpu, reference
from tests.tolerance import assert_as_exact_as_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTRUCTION_SETS = [] if isinstance(_native.cpu, str) else _native.cpu.instruction_sets()
needs_module = pytest.mark.skipif(isinstance(_native.cpu, str), reason=str(_native.cpu))


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.cpu.instruction_set()
    _native.cpu.use_instruction_set(request.param)
    yield request.param
    _native.cpu.use_instruction_set(before)


def bytes_of(rows: int, cols: int) -> Tensor:
    """Every int8, -128 included."""
    return torch.randint(-128, 128, (rows, cols), dtype=torch.int8)


def weights(cols: int, depth: int, layout: str = "rows") -> Tensor:
    """[N, K]: rows or columns contiguous, in a larger tensor where the layout says so."""
    gap = 5 if "gap" in layout else 0
    if layout.startswith("rows"):
        return bytes_of(cols, depth + gap)[:, gap:]
    return bytes_of(depth, cols + gap)[:, gap:].t()


LAYOUTS = ("rows", "columns", "rows with gaps", "columns with gaps")


def exact_sums(x: Tensor, weight: Tensor) -> Tensor:
    """The sums modulo 2^32, as torch's int32 has them."""
    return (x.long() @ weight.long().t()).int()


def sums(x: Tensor, weight: Tensor) -> Tensor:
    return cpu.forward(x, weight, None, None, None, "none", "raw", torch.int32)[0]


def arguments(
    mode: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    *,
    layout: str = "rows",
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    bias: torch.dtype | None = torch.float32,
    scales: str = "each",
) -> tuple[Any, ...]:
    """A call whose outputs are about normal, with rows of x that lie apart."""
    rows, cols, depth = shape
    weight = weights(cols, depth, layout)
    x: Tensor = torch.randn(rows, depth + 3).to(dtype)[:, 1:-2]
    x_scale, size = None, 1.0
    each = scales == "each"
    if mode == "int8":
        x, size = bytes_of(rows, depth + 3)[:, 1:-2], 1 / 74
        x_scale = torch.rand(rows if each else 1) * size + size / 2
    elif mode == "static":
        x_scale = torch.tensor([0.02])
    weight_scale = (torch.rand(cols if each else 1) + 0.5) / (74 * depth**0.5)
    offsets = None if bias is None else torch.randn(cols).to(bias)
    return (
        *(x, weight, x_scale, weight_scale, offsets, activation, mode),
        out_dtype or (torch.float32 if mode == "int8" else dtype),
    )


def exact(call: tuple[Any, ...]) -> Tensor:
    """The formula in float64, on the integers that the rule of quantisation gives."""
    *rest, out_dtype = call
    x, *others = rest
    x = x.double() if call[6] == "weight_only" else x
    return reference.forward(x, *others, torch.float64)[0]


def check(*positional: Any, **options: Any) -> None:
    call = arguments(*positional, **options)
    ours, plain = cpu.forward(*call), reference.forward(*call)
    assert ours[0].dtype == call[7]
    assert ours[0].is_contiguous()
    assert_as_exact_as_torch(ours, plain, (exact(call),), ("y",))
