"""Rows as int8 in Triton: a program walks over tiles of rows, each held in registers.

So x is read once, also where rows are normalised first (layer norm); weight and bias stay in
registers for all tiles.  Longer rows are swept in blocks.  What is written is in README.md.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton

VECTOR = 16  # bytes of x that a thread loads at a time
RESIDENT_COLS = 16384  # longer rows do not fit the registers of one program
NORMALIZED_COLS = 8192  # weight and bias are held, too
LONG_BLOCK_N, LONG_WARPS = 2048, 8  # 8 elements per thread and sweep step

# (largest cols, BLOCK_M, num_warps): 32 elements of x per thread, 16 where a row is near what fits.
TILES = (
    (16, 64, 1),
    (32, 32, 1),
    (64, 16, 1),
    (128, 8, 1),
    (256, 4, 1),
    (512, 4, 2),
    (1024, 4, 4),
    (2048, 2, 4),
    (4096, 1, 4),
    (RESIDENT_COLS, 1, 16),
)

NUMBERS = ["rows", "n_vec", "stride", "stride_values", "eps"]
LARGEST: tl.constexpr = tl.constexpr(127)  # of the quantised values; -128 is not used
NOT_FINITE: tl.constexpr = tl.constexpr(0x7F800000)  # bits of infinity; NaN has more
SMALLEST: tl.constexpr = tl.constexpr(0x03800000)  # bits of 2^-120: smaller rows count as zeros
# 1.5 * 2^23: a float32 of up to 2^22 added to it is rounded to an integer, ties to even, and the
# low bits of the sum are that integer's.
TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _magnitude(x):
    """Bits that order floats by absolute value, NaN last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _factors(largest, static_scale_ptr, STATIC: tl.constexpr):
    """Of rows whose largest magnitude has these bits: multiplier, scale, whether values count."""
    finite = largest < NOT_FINITE
    if STATIC:
        scale = tl.load(static_scale_ptr) + tl.zeros_like(largest).to(tl.float32)
        inverse = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), scale)
        counts = finite
    else:
        counts = finite & (largest >= SMALLEST)
        absmax = tl.where(counts, largest, 0x3F800000).to(tl.float32, bitcast=True)
        limit = tl.full(largest.shape, LARGEST, tl.float32)
        inverse = tl.div_rn(limit, absmax)
        scale = tl.where(counts, tl.div_rn(absmax, limit), 1.0)
    return inverse, tl.where(finite, scale, float("nan")), counts


@triton.jit
def _quantized(x, inverse, counts, STATIC: tl.constexpr):
    """rint(x * inverse) as int8, 0 where values do not count."""
    q = x * inverse
    if STATIC:
        q = tl.minimum(tl.maximum(q, -LARGEST * 1.0), LARGEST * 1.0)
    q = tl.where(counts, q, 0.0) + TO_INTEGER
    return q.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=NUMBERS)
def _rows_kernel(
    x_ptr,  # [rows, cols]
    weight_ptr,  # [cols], or None
    bias_ptr,  # [cols], or None
    static_scale_ptr,  # [1], or None: each row has a scale of its own
    values_ptr,  # [rows, cols]
    scale_ptr,  # [rows]
    rows,
    n_vec,
    stride,  # of x's rows, in units of VEC as n_vec is
    stride_values,
    eps,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    cols = n_vec * VEC  # the product shows Triton that rows start on a vector boundary
    STATIC: tl.constexpr = static_scale_ptr is not None
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < cols
    # Row 0 of a one-dimensional grid: aligned as the rows of x are, so all share one layout.
    offs_0 = tl.program_id(1) * cols + offs_n
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_0, mask=mask_n, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_0, mask=mask_n, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64)  # int64: rows * cols may pass 2**31
    for tile in range(first, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask = mask_m[:, None] & mask_n
        # The choice keeps LLVM from carrying one 64-bit pointer per element from tile to tile.
        row = tl.where(mask_m, offs_m, 0)[:, None]
        offs = row * stride * VEC + offs_n  # [BLOCK_M, BLOCK_N]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZED:
            mean = tl.sum(x, 1) / cols
            xc = tl.where(mask, x - mean[:, None], 0.0)  # lanes past cols must not enter variance
            shift = tl.sum(xc, 1) / cols  # what rounding took from the mean
            xc = tl.where(mask, xc - shift[:, None], 0.0)
            x = xc * tl.rsqrt(tl.sum(xc * xc, 1) / cols + eps)[:, None]
            if weight_ptr is not None:
                x *= weight
            if bias_ptr is not None:
                x += bias
        inverse, scale, counts = _factors(tl.max(_magnitude(x), 1), static_scale_ptr, STATIC)
        q = _quantized(x, inverse[:, None], counts[:, None], STATIC)
        tl.store(values_ptr + row * stride_values * VEC + offs_n, q, mask=mask)
        tl.store(scale_ptr + offs_m, scale, mask=mask_m)


@triton.jit
def _load_block(ptr, offs_n, cols):
    return tl.load(ptr + offs_n, mask=offs_n < cols, other=0.0).to(tl.float32)


@triton.jit
def _prepared_block(
    x_ptr,  # of one row
    weight_ptr,
    bias_ptr,
    offs_n,
    cols,
    mean,
    shift,  # what rounding took from the mean, which the mean cannot hold
    rstd,
    NORMALIZED: tl.constexpr,
):
    x = _load_block(x_ptr, offs_n, cols)
    if NORMALIZED:
        x = tl.where(offs_n < cols, (x - mean) - shift, 0.0) * rstd
        if weight_ptr is not None:
            x *= _load_block(weight_ptr, offs_n, cols)
        if bias_ptr is not None:
            x += _load_block(bias_ptr, offs_n, cols)
    return x


@triton.jit(do_not_specialize=NUMBERS[1:])
def _long_rows_kernel(
    x_ptr,  # [rows, cols]
    weight_ptr,  # [cols], or None
    bias_ptr,  # [cols], or None
    static_scale_ptr,  # [1], or None
    values_ptr,  # [rows, cols]
    scale_ptr,  # [rows]
    n_vec,
    stride,
    stride_values,
    eps,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    cols = n_vec * VEC
    STATIC: tl.constexpr = static_scale_ptr is not None
    mean, shift, rstd = 0.0, 0.0, 1.0
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride * VEC
    if NORMALIZED:
        total = tl.zeros([BLOCK_N], tl.float32)
        for block in range(0, cols, BLOCK_N):
            total += _load_block(row_ptr, block + tl.arange(0, BLOCK_N), cols)
        mean = tl.sum(total, 0) / cols
        total = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for block in range(0, cols, BLOCK_N):
            offs_n = block + tl.arange(0, BLOCK_N)
            xc = tl.where(offs_n < cols, _load_block(row_ptr, offs_n, cols) - mean, 0.0)
            total += xc
            squares += xc * xc
        shift = tl.sum(total, 0) / cols
        rstd = tl.rsqrt(tl.sum(squares, 0) / cols - shift * shift + eps)
    largest = tl.zeros([BLOCK_N], tl.int32)
    for block in range(0, cols, BLOCK_N):
        x = _prepared_block(
            row_ptr, weight_ptr, bias_ptr, block + tl.arange(0, BLOCK_N), cols, mean, shift,
            rstd, NORMALIZED,
        )  # fmt: skip
        largest = tl.maximum(largest, _magnitude(x))
    top = tl.max(largest, 0)[None]
    inverse, scale, counts = _factors(top, static_scale_ptr, STATIC)
    for block in range(0, cols, BLOCK_N):
        offs_n = block + tl.arange(0, BLOCK_N)
        x = _prepared_block(
            row_ptr, weight_ptr, bias_ptr, offs_n, cols, mean, shift, rstd, NORMALIZED
        )
        q = _quantized(x, inverse, counts, STATIC)
        tl.store(values_ptr + row * stride_values * VEC + offs_n, q, mask=offs_n < cols)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)


def quantize_rows(
    x: Tensor,
    static_scale: Tensor | None = None,
    normalized: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """int8 [rows, cols] and float32 [rows] of x, whose last stride is 1.

    With `width` the values are [rows, width], zeros after those of each row.
    """
    rows, cols = x.shape
    width = width or cols
    new = torch.empty if width == cols else torch.zeros
    values = new(rows, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0 or cols == 0:
        return values, scale.fill_(1.0)
    stride = x.stride(0) if rows > 1 else 0
    vec = math.gcd(VECTOR // x.element_size(), cols, stride, width)
    vec = 1 if x.data_ptr() % VECTOR else vec  # Triton looks no further either
    limit = NORMALIZED_COLS if normalized else RESIDENT_COLS
    tensors = x, weight, bias, static_scale, values, scale
    numbers = cols // vec, stride // vec, width // vec, eps
    flags = {"VEC": vec, "NORMALIZED": normalized, **_triton.LAUNCH}
    with _triton.device_of(x):
        if _triton.resident(limit, cols, vec):
            block_m, num_warps = _triton.tile(TILES, x, cols, vec)
            grid = (_triton.programs(triton.cdiv(rows, block_m), _triton.wave(x, num_warps)),)
            blocks = {"BLOCK_M": block_m, "BLOCK_N": triton.next_power_of_2(cols)}
            _rows_kernel[grid](*tensors, rows, *numbers, **flags, **blocks, num_warps=num_warps)
        else:
            blocks = {"BLOCK_N": LONG_BLOCK_N}
            _long_rows_kernel[(rows,)](*tensors, *numbers, **flags, **blocks, num_warps=LONG_WARPS)
    return values, scale


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """None where the kernels take float rows, else one sentence saying why not."""
    return _triton.unsupported(_rows_kernel, x, *others)
