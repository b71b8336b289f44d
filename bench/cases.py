"""The calls of each op that the gates compile and count.

Per op a function `calls` that runs forward and backward through a backend module, and the shapes:
TRITON is every specialisation the switch points lead to, COUNTED what the executor counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kernels import dispatch

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Call:
    """Of [rows, cols]. Layer norm: weight and bias in the dtype of x, fp32 where `mixed`.
    Cross-entropy: plain, with every "option", or with "soft" targets, which are fp32."""

    op: str
    rows: int
    cols: int
    dtype: torch.dtype
    mixed: bool = False
    variant: str = ""

    @property
    def _types(self) -> str:
        return _SHORT[self.dtype] + ("/fp32" if self.mixed else "")

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self._types, str(self.cols), self.variant)))

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.cols} {self._types}"

    def least_bytes(self, direction: str) -> int:
        """Of the inputs and outputs of an operation, each read or written once."""
        forward, size = direction == "forward", self.dtype.itemsize
        rows, parameter = self.rows * self.cols * size, self.cols * (4 if self.mixed else size)
        if self.op == "cross_entropy":  # plain: logits; target, losses and lse of every row
            per_row = self.rows * (8 + 8)
            return rows + per_row + self.rows * 4 if forward else 2 * rows + per_row
        statistics = self.rows * 2 * 4
        if forward:  # x, y; weight, bias
            return 2 * rows + 2 * parameter + statistics
        return 3 * rows + 3 * parameter + statistics  # x, dy, dx; weight, dweight, dbias


@dataclass(frozen=True)
class Attention:
    """Causal attention of [1, heads, length, dim], all heads with keys of their own."""

    heads: int
    length: int
    dim: int
    dtype: torch.dtype
    op: str = "attention"

    @property
    def label(self) -> str:
        return f"{_SHORT[self.dtype]}, {self.dim}"

    @property
    def shape(self) -> str:
        return f"{self.heads}x{self.length}x{self.dim} {_SHORT[self.dtype]}"

    def least_bytes(self, direction: str) -> int:
        """Of the inputs and outputs of an operation, each read or written once."""
        tensors = 4 if direction == "forward" else 8  # q, k, v, out; and the gradient of each
        return self.heads * self.length * (tensors * self.dim * self.dtype.itemsize + 4)


@dataclass(frozen=True)
class Int8:
    """x [m, k] in dtype times an int8 weight [n, k], with bias and gelu, to y in dtype."""

    mode: str  # of kernels/int8_matmul; "raw": int8 to int32
    m: int
    n: int
    k: int
    dtype: torch.dtype
    op: str = "int8_matmul"

    @property
    def label(self) -> str:
        return f"{self.mode}, {_SHORT[self.dtype]}, {self.m}"

    @property
    def shape(self) -> str:
        return f"{self.mode} {self.m}x{self.n}x{self.k} {_SHORT[self.dtype]}"

    def least_bytes(self, direction: str) -> int:
        """Of the inputs and outputs of an operation, each read or written once."""
        if self.mode == "raw":
            return self.m * self.k + self.n * self.k + self.m * self.n * 4
        size = self.dtype.itemsize
        return size * (self.m * (self.k + self.n) + self.n) + self.n * self.k + 4 * self.n


@dataclass(frozen=True)
class Int8Rows:
    """x [rows, cols], or its layer norm with fp32 parameters, to int8."""

    rows: int
    cols: int
    dtype: torch.dtype
    normalized: bool = False
    op: str = "int8_matmul.rows"

    @property
    def label(self) -> str:
        return f"{_SHORT[self.dtype]}, {self.cols}{', normalized' if self.normalized else ''}"

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.cols} {_SHORT[self.dtype]}" + " normalized" * self.normalized

    def least_bytes(self, direction: str) -> int:
        """Of the inputs and outputs of an operation, each read or written once."""
        parameters = 2 * 4 * self.cols if self.normalized else 0
        return self.rows * (self.cols * (self.dtype.itemsize + 1) + 4) + parameters


AnyCall = Call | Attention | Int8 | Int8Rows


def attention(backend: ModuleType, call: Attention) -> Iterator[str]:
    """Runs the forward, then the backward; yields the name of each when it is done."""
    generator = torch.Generator().manual_seed(call.length)
    shape = 1, call.heads, call.length, call.dim
    query, key, value, dout = (
        torch.randn(shape, generator=generator).to(call.dtype) for _ in range(4)
    )
    pattern, scaling = (1, 0, -1, -1, 0, call.length, call.length), (call.dim**-0.5, 0.0, 0.0)
    arguments = query, key, value, *(None,) * 7, pattern, scaling
    saved = backend.forward(*arguments)
    yield "forward"
    backend.backward(dout, None, *arguments, *saved, (True, True, True, False, False))
    yield "backward"


def layer_norm(backend: ModuleType, call: Call) -> Iterator[str]:
    """Runs the forward, then the backward; yields the name of each when it is done."""
    generator = torch.Generator().manual_seed(call.rows * 31 + call.cols)
    parameters = torch.float32 if call.mixed else call.dtype
    x, dy = (torch.randn(call.rows, call.cols, generator=generator).to(call.dtype) for _ in "xy")
    weight, bias = (torch.randn(call.cols, generator=generator).to(parameters) for _ in "wb")
    _, *saved = backend.forward(x, (call.cols,), weight, bias, 1e-5)
    yield "forward"
    backend.backward(dy, x, (call.cols,), weight, bias, *saved, (True, True, True))
    yield "backward"


def cross_entropy(backend: ModuleType, call: Call) -> Iterator[str]:
    """As layer_norm."""
    generator = torch.Generator().manual_seed(call.rows * 31 + call.cols)
    logits = torch.randn(call.rows, call.cols, generator=generator).to(call.dtype)
    target = torch.randint(0, call.cols, (call.rows,), generator=generator)
    weight, dlse, options = None, None, (-100, 0.0, 0.0, 0.0, 1.0, False)
    if call.variant:
        weight = torch.rand(call.cols, generator=generator) + 0.5
        dlse = torch.randn(call.rows, generator=generator)
        options = (-100, 0.1, 1e-3, 30.0, 1.0, True)
    if call.variant == "soft":
        target = torch.softmax(torch.randn(call.rows, call.cols, generator=generator), 1)
    losses, lse, *_ = backend.forward(logits, target, weight, *options)
    yield "forward"
    dlosses = torch.full((1,), 1 / call.rows).expand(losses.shape)
    mask = (True, False)
    backend.backward(dlosses, dlse, logits, target, weight, *options, lse, mask, False)
    yield "backward"


def int8_matmul(backend: ModuleType, call: Int8) -> Iterator[str]:
    """Runs the forward; yields its name when it is done."""
    generator = torch.Generator().manual_seed(call.m * 31 + call.n)
    weight = torch.randint(-127, 128, (call.n, call.k), generator=generator).to(torch.int8)
    x = torch.randn(call.m, call.k, generator=generator).to(call.dtype)
    if call.mode == "raw":
        x = (x * 32).clamp(-127, 127).to(torch.int8)
        backend.forward(x, weight, None, None, None, "none", "raw", torch.int32)
    else:
        scale, bias = (torch.rand(call.n, generator=generator) for _ in "sb")
        bias = bias.to(call.dtype)
        backend.forward(x, weight, None, scale, bias, "gelu", call.mode, call.dtype)
    yield "forward"


def int8_rows(backend: ModuleType, call: Int8Rows) -> Iterator[str]:
    """As int8_matmul."""
    generator = torch.Generator().manual_seed(call.rows * 31 + call.cols)
    x = torch.randn(call.rows, call.cols, generator=generator).to(call.dtype)
    weight, bias = (torch.randn(call.cols, generator=generator) for _ in "wb")
    if call.normalized:
        backend.forward(x, True, weight, bias, 1e-5)
    else:
        backend.forward(x, False, None, None, 0.0)
    yield "forward"


CALLS: dict[str, Callable[[ModuleType, Any], Iterator[str]]] = {
    "attention": attention,
    "cross_entropy": cross_entropy,
    "int8_matmul": int8_matmul,
    "int8_matmul.rows": int8_rows,
    "layer_norm": layer_norm,
}


def run(call: AnyCall, backend: str) -> Iterator[str]:
    """Runs a call through the named backend; yields each direction when it is done."""
    module = dispatch.load(call.op, backend)
    if isinstance(module, str):
        raise ImportError(f"{call.op} has no backend {backend}: {module}")
    return CALLS[call.op](module, call)


def _layer_norm_triton() -> list[Call]:
    from kernels.layer_norm import triton as backend

    cols = [row[0] for row in backend.TILES] + [backend.RESIDENT_COLS + 8]
    cols += [1000, 1001]  # vectors that the row length just allows, and none
    calls = [("bf16", n) for n in cols] + [("fp32", n) for n in (1000, 1024, 8192, 16384, 16392)]
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    # Enough rows for the fused backward; then few, for dx and the sums by kernels of their own.
    found = [Call("layer_norm", max(64, n // 8), n, dtypes[name]) for name, n in calls]
    found += [Call("layer_norm", 4, n, torch.bfloat16) for n in (1024, 1001, 4096)]
    return found


def _cross_entropy_triton() -> list[Call]:
    from kernels.cross_entropy import triton_plan

    tiles = [row[0] for row in triton_plan.TILES]
    sweeps = [2000, 3000, 5000, 50257]  # by 1, 2, 4 and 8 warps
    plain = [(n, torch.bfloat16, "") for n in (*tiles, 65, 255, *sweeps)]
    plain += [(n, torch.float32, "") for n in (65, 96, 50257)]
    rest = [(n, torch.bfloat16, "options") for n in (96, 255, 1001, 50257)]
    rest += [(n, torch.float32, variant) for n in (256, 50257) for variant in ("options", "soft")]
    return [Call("cross_entropy", 64, n, dtype, variant=name) for n, dtype, name in plain + rest]


def _attention_triton() -> list[Attention]:
    """The widths of the tables that models use most, and all of float32, which needs registers."""
    kinds = [(dim, torch.bfloat16) for dim in (64, 128)]
    kinds += [(dim, torch.float32) for dim in (64, 128, 256)]
    return [Attention(2, 256, dim, dtype) for dim, dtype in kinds]


def _int8_triton() -> list[AnyCall]:
    """The largest tile for few rows, for some and for many; rows of several lengths."""
    from kernels.int8_matmul import triton_rows

    kinds = [(mode, torch.bfloat16) for mode in ("raw", "dynamic", "weight_only")]
    kinds.append(("weight_only", torch.float32))
    products = [Int8(mode, m, 512, 512, dtype) for mode, dtype in kinds for m in (16, 32, 64, 512)]
    # Vectors of 4 bytes, and rows that are read element by element.
    products += [
        Int8("raw", m, 500, k, torch.bfloat16) for m, k in ((16, 500), (512, 500), (16, 501))
    ]
    longest = triton_rows.RESIDENT_COLS
    cols = (64, 1001, 1024, 4096, longest, longest + 8)
    rows = [Int8Rows(64, n, torch.bfloat16, norm) for n in cols for norm in (False, True)]
    rows += [Int8Rows(64, n, torch.float32, True) for n in (1024, 8192, 16392)]
    return [*products, *rows]


def triton_calls() -> list[AnyCall]:
    """What is compiled for each target, as Triton's backends name it."""
    rows = [*_cross_entropy_triton(), *_layer_norm_triton()]
    return [*rows, *_attention_triton(), *_int8_triton()]


_SHAPES = ((64, 1024), (512, 1024), (512, 1000), (2048, 768))
COUNTED: list[AnyCall] = [
    Call("layer_norm", rows, cols, dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for rows, cols in _SHAPES
]
COUNTED.append(Call("layer_norm", 512, 1024, torch.bfloat16, mixed=True))
# Characters, odd lengths, and the vocabularies of Llama and GPT-2.
_LOGITS = ((512, 65), (512, 96), (128, 1001), (16, 32000), (16, 50257))
COUNTED += [
    Call("cross_entropy", rows, cols, dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for rows, cols in _LOGITS
]
COUNTED.append(Attention(2, 256, 64, torch.bfloat16))
# A few rows, a tile of them, and tiles that blocks share.
_PRODUCTS = ((1, 512, 1024), (8, 512, 1024), (32, 256, 1024), (256, 256, 512))
COUNTED += [
    Int8(mode, *sizes, torch.bfloat16)
    for mode in ("raw", "dynamic", "weight_only")
    for sizes in _PRODUCTS
]
COUNTED.append(Int8("weight_only", 64, 256, 512, torch.float32))
COUNTED += [
    Int8Rows(512, cols, torch.bfloat16, normalized)
    for cols in (1000, 1024)
    for normalized in (False, True)
]
