"""LayerNorm in Triton: a program keeps weight and bias in registers and walks over tiles of rows.

A row of up to RESIDENT_COLS elements is held in registers, so x is read once; tiles of several
rows keep short rows from wasting lanes.  Longer rows are swept in blocks: mean, centred variance,
output.  Gradients are in triton_backward.py, the maths in README.md.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels import _triton
from kernels.layer_norm.triton_backward import backward

__all__ = ["backward", "forward", "unsupported"]

RESIDENT_COLS = 16384  # longer rows do not fit the registers of one program
HELD_BIAS_COLS = 8192  # a bias of more kept in registers too makes them spill
LONG_BLOCK_N, LONG_WARPS = 4096, 16  # 8 elements per thread and sweep step

# (largest cols, BLOCK_M, num_warps): 32 elements of x per thread and every warp along the row where
# the row is long enough, so a tile reads weight and bias once per 4 rows or more.
TILES = (
    (8, 128, 1),
    (16, 64, 1),
    (32, 32, 1),
    (64, 16, 1),
    (128, 8, 1),
    (256, 4, 1),
    (512, 4, 2),
    (1024, 4, 4),
    (2048, 4, 8),
    (4096, 4, 16),
    (8192, 2, 32),
    (RESIDENT_COLS, 1, 32),
)


@triton.jit(do_not_specialize=["rows", "n_vec", "eps"])
def _forward_kernel(
    x_ptr,  # [rows, cols]
    weight_ptr,  # [cols]
    bias_ptr,  # [cols]
    y_ptr,  # [rows, cols]
    statistics_ptr,  # [2, rows]: means, then rstds
    rows,
    n_vec,
    eps,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HOLD_BIAS: tl.constexpr,
):
    cols = n_vec * VEC  # the product shows Triton that rows start on a vector boundary
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < cols
    # Row 0 of a one-dimensional grid: aligned as the rows of x are, so all share one layout.
    offs_0 = tl.program_id(1) * cols + offs_n
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_0, mask=mask_n, other=0.0).to(tl.float32)
    if HAS_BIAS and HOLD_BIAS:
        bias = tl.load(bias_ptr + offs_0, mask=mask_n, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64)  # int64: rows * cols may pass 2**31
    for tile in range(first, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask = mask_m[:, None] & mask_n
        # The choice keeps LLVM from carrying one 64-bit pointer per element from tile to tile.
        offs = tl.where(mask_m, offs_m, 0)[:, None] * cols + offs_n  # [BLOCK_M, BLOCK_N]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / cols
        xc = tl.where(mask, x - mean[:, None], 0.0)  # lanes past cols must not enter the variance
        shift = tl.sum(xc, 1) / cols  # what rounding took from the mean: README, forward
        mean += shift
        xc = tl.where(mask, xc - shift[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(xc * xc, 1) / cols + eps)
        y = xc * rstd[:, None]
        if HAS_WEIGHT:
            y *= weight
        if HAS_BIAS:
            if not HOLD_BIAS:
                bias = tl.load(bias_ptr + offs_0, mask=mask_n, other=0.0).to(tl.float32)
            y += bias
        tl.store(y_ptr + offs, y, mask=mask)
        tl.store(statistics_ptr + offs_m, mean, mask=mask_m)
        tl.store(statistics_ptr + rows + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["rows", "n_vec", "eps"])
def _forward_long_kernel(
    x_ptr,  # [rows, cols]
    weight_ptr,  # [cols]
    bias_ptr,  # [cols]
    y_ptr,  # [rows, cols]
    statistics_ptr,  # [2, rows]: means, then rstds
    rows,
    n_vec,
    eps,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    cols = n_vec * VEC
    start_0 = tl.program_id(1) * cols  # as in _forward_kernel
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * cols
        total = tl.zeros([BLOCK_N], tl.float32)
        for block in range(0, cols, BLOCK_N):
            offs_n = block + tl.arange(0, BLOCK_N)
            total += tl.load(x_ptr + start + offs_n, mask=offs_n < cols, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0) / cols
        total = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for block in range(0, cols, BLOCK_N):
            offs_n = block + tl.arange(0, BLOCK_N)
            mask_n = offs_n < cols
            x = tl.load(x_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            xc = tl.where(mask_n, x - mean, 0.0)
            total += xc
            squares += xc * xc
        shift = tl.sum(total, 0) / cols
        mean += shift
        rstd = tl.rsqrt(tl.sum(squares, 0) / cols - shift * shift + eps)
        for block in range(0, cols, BLOCK_N):
            offs_n = block + tl.arange(0, BLOCK_N)
            mask_n = offs_n < cols
            x = tl.load(x_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            y = (x - mean) * rstd
            if HAS_WEIGHT:
                y *= tl.load(weight_ptr + start_0 + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            if HAS_BIAS:
                y += tl.load(bias_ptr + start_0 + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            tl.store(y_ptr + start + offs_n, y, mask=mask_n)
        tl.store(statistics_ptr + row, mean)
        tl.store(statistics_ptr + rows + row, rstd)


def unsupported(
    x: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *_: object,
) -> str | None:
    """None where these kernels accept the call, else one sentence saying why not."""
    return _triton.unsupported(_forward_kernel, x, weight, bias)


def forward(
    x: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    statistics: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y of x's shape and dtype; float32 [2 * rows]: the rows' means, then their rstds."""
    leading = x.shape[: x.dim() - len(normalized_shape)]
    rows, cols = math.prod(leading), math.prod(normalized_shape)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kept = torch.empty(2 * rows, dtype=torch.float32, device=x.device)
    if rows == 0 or cols == 0:
        return y, kept
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    vec = _triton.vector(cols)
    tensors = (x.contiguous(), weight, bias, y, kept)
    numbers = (rows, cols // vec, eps)
    flags = {"VEC": vec, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    with _triton.device_of(x):
        if not _triton.resident(RESIDENT_COLS, cols, vec):
            grid = (_triton.programs(rows, _triton.wave(x, LONG_WARPS)),)
            _forward_long_kernel[grid](
                *tensors,
                *numbers,
                **flags,
                BLOCK_N=LONG_BLOCK_N,
                num_warps=LONG_WARPS,
                **_triton.LAUNCH,
            )
        else:
            block_m, num_warps = _triton.tile(TILES, x, cols, vec)
            tiles = triton.cdiv(rows, block_m)
            grid = (_triton.programs(tiles, _triton.wave(x, num_warps)),)
            _forward_kernel[grid](
                *tensors,
                *numbers,
                **flags,
                BLOCK_M=block_m,
                BLOCK_N=triton.next_power_of_2(cols),
                HOLD_BIAS=_triton.resident(HELD_BIAS_COLS, cols, vec),
                num_warps=num_warps,
                **_triton.LAUNCH,
            )
    return y, kept
