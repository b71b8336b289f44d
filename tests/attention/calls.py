"""Random calls of an attention backend, described by keywords; shared by the backends' tests."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.attention.pattern import Pattern, Scaling

NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dsinks")


@dataclass
class Arguments:
    forward: tuple[Any, ...]  # a backend's forward's
    dout: Tensor
    dlse: Tensor | None

    def to(self, dtype: torch.dtype) -> Arguments:
        """The same call with every floating tensor in `dtype`."""

        def convert(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return Arguments(tuple(map(convert, self.forward)), convert(self.dout), convert(self.dlse))


def run(
    backend: ModuleType,
    call: Arguments,
    output_mask: tuple[bool, ...] = (True,) * 3 + (False, True),
) -> list[Tensor | None]:
    """out, lse, dquery, dkey, dvalue, dsinks."""
    out, lse = backend.forward(*call.forward)
    dlse = None if call.dlse is None else call.dlse.to(lse.dtype)
    gradients = backend.backward(call.dout, dlse, *call.forward, out, lse, output_mask)
    return [out, lse, *gradients[:3], gradients[4]]


def _laid_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    batch, heads, length, dim = shape
    if layout == "BHTD":
        return torch.randn(shape).to(dtype)
    if layout == "BTHD":
        return torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2)
    if layout == "sliced":  # part of a larger tensor in every dimension
        whole = torch.randn(batch, heads + 1, length + 3, dim + 5).to(dtype)
        return whole[:, 1:, 2 : length + 2, 3 : dim + 3]
    if layout == "expanded":
        return torch.randn(1, 1, length, dim).to(dtype).expand(shape)
    if layout == "one row":
        return torch.randn(1, 1, 1, dim).to(dtype).expand(shape)
    if layout == "far apart":  # rows a page apart
        return torch.randn(batch, heads, length, 1024).to(dtype)[..., :dim]
    if layout == "odd offset":
        return torch.randn(batch * heads * length * dim + 1).to(dtype)[1:].view(shape)
    raise ValueError(f"unknown layout {layout!r}")


def _mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    batch, heads, queries, keys = shape
    if kind == "bool":
        mask = torch.rand(shape) < 0.7
    elif kind == "bool heads":
        mask = torch.rand(batch, 1, queries, keys) < 0.7
    elif kind == "padding":
        mask = torch.rand(batch, 1, 1, keys) < 0.7
    elif kind == "float":
        mask = torch.randn(shape)
    elif kind == "query":
        mask = torch.randn(1, heads, queries, 1)
    elif kind == "one":
        mask = torch.randn(1, 1, 1, 1)
    elif kind == "same dtype":
        mask = torch.randn(shape).to(dtype)
    else:
        raise ValueError(f"unknown mask {kind!r}")
    return mask.expand(shape)


def arguments(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int, int, int],
    *,
    layout: str = "BHTD",
    causal: bool = False,
    lower_right: bool = False,
    left: int = -1,
    right: int = -1,
    global_tokens: int = 0,
    global_share: float = 0.0,
    mask: str | None = None,
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
    dropout: float = 0.0,
    dlse: bool = False,
    scale: float | None = None,
    lengths: tuple[list[int], list[int]] | None = None,
    seed: int = 0,
) -> Arguments:
    """`shape`: batch, heads, key heads, queries, keys, head dim, value dim.  `lengths`: those of
    packed sequences' queries and keys; `global_share`: of all positions."""
    torch.manual_seed(seed)
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    query = _laid_out((batch, heads, queries, dim), dtype, layout)
    key = _laid_out((batch, kv_heads, keys, dim), dtype, layout)
    value = _laid_out((batch, kv_heads, keys, value_dim), dtype, layout)
    dout_layout = "one row" if layout == "expanded" else layout  # as the gradient of a sum
    dout = _laid_out((batch, heads, queries, value_dim), dtype, dout_layout)
    ends: list[Tensor | None] = [None, None]
    longest, sequences = (queries, keys), batch
    if lengths is not None:
        ends = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in lengths]
        longest, sequences = (max(lengths[0]), max(lengths[1])), len(lengths[0])
    tensors = (
        query,
        key,
        value,
        None if mask is None else _mask(mask, (batch, heads, queries, keys), dtype),
        torch.rand(sequences, heads) if alibi else None,
        torch.randn(heads).to(dtype) if sinks else None,
        torch.rand(batch, keys) < global_share if global_share else None,
        torch.tensor([0x123456789ABCDEF]) if dropout else None,
        *ends,
    )
    pattern = Pattern(
        int(causal), int(lower_right), left, right, global_tokens, longest[0], longest[1]
    )
    scaling = Scaling(dim**-0.5 if scale is None else scale, softcap, dropout)
    gradient = torch.randn(batch, heads, queries) if dlse else None
    return Arguments((*tensors, pattern, scaling), dout, gradient)
