"""Gradients of LayerNorm in Triton, without atomics: fixed order, the same bits in every run.

Many rows that fit registers: each program walks over tiles of rows, stores dx and keeps its share
of dweight and dbias in registers; a second kernel adds the shares.  Otherwise dx and the sums over
rows are separate, and for the sums a program owns a block of columns and a share of the rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels import _triton

FUSED_COLS = 8192  # dx and the sums of longer rows do not fit the registers of one program
RESIDENT_COLS = 16384  # nor does dx alone
HELD_WEIGHT_COLS = 8192  # a weight of more kept in registers makes them spill
LONG_BLOCK_N, LONG_WARPS = 4096, 16
SUM_BLOCK_N, SUM_ELEMENTS, SUM_WARPS = 64, 2048, 4  # columns and elements of a tile of the sums
# A share costs 16 bytes of traffic per column, a row of bfloat16 6: with fewer rows in a share its
# traffic shows.  Every multiprocessor gets a program all the same, where there are rows enough.
ROWS_PER_FUSED_SHARE, LEAST_ROWS_PER_FUSED_SHARE = 64, 8
ROWS_PER_SHARE = 64

# (largest cols, BLOCK_M, num_warps): 16 elements of x and of dy per thread.
TILES = (
    (8, 256, 4),
    (16, 128, 4),
    (32, 64, 4),
    (64, 32, 4),
    (128, 16, 4),
    (256, 8, 4),
    (512, 4, 4),
    (1024, 2, 4),
    (2048, 2, 8),
    (4096, 2, 16),
    (8192, 1, 32),
    (RESIDENT_COLS, 1, 32),
)
# With the sums programs are few, so each has more of the memory's answers to wait for at a time;
# with 16 warps for the short rows, too, registers spill on sm_100.
FUSED_TILES = tuple(
    (cols, 2 * block_m, 2 * warps) if warps == 4 else (cols, block_m, warps)
    for cols, block_m, warps in TILES
)


@triton.jit(do_not_specialize=["rows", "n_vec"])
def _backward_kernel(
    dy_ptr,  # [rows, cols]
    x_ptr,  # [rows, cols]
    weight_ptr,  # [cols]
    statistics_ptr,  # [2, rows]: means, then rstds
    dx_ptr,  # [rows, cols]
    dweight_ptr,  # [programs, cols]
    dbias_ptr,  # [programs, cols]
    rows,
    n_vec,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HOLD_WEIGHT: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
):
    cols = n_vec * VEC  # the product shows Triton that rows start on a vector boundary
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < cols
    # Row 0 of a one-dimensional grid: aligned as the rows of x are, so all share one layout.
    offs_0 = tl.program_id(1) * cols + offs_n
    if HAS_WEIGHT and HOLD_WEIGHT:
        weight = tl.load(weight_ptr + offs_0, mask=mask_n, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    share = tl.program_id(0).to(tl.int64)
    for tile in range(share, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask = mask_m[:, None] & mask_n
        # The choice keeps LLVM from carrying one 64-bit pointer per element from tile to tile.
        offs = tl.where(mask_m, offs_m, 0)[:, None] * cols + offs_n  # [BLOCK_M, BLOCK_N]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(statistics_ptr + rows + offs_m, mask=mask_m, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if HAS_DWEIGHT:
            dweight += dy * xhat
        if HAS_DBIAS:
            dbias += dy
        if HAS_WEIGHT:
            if not HOLD_WEIGHT:
                weight = tl.load(weight_ptr + offs_0, mask=mask_n, other=0.0).to(tl.float32)
            dy *= weight
        along_xhat = tl.sum(dy * xhat, 1) / cols
        along_ones = tl.sum(dy, 1) / cols
        dx = (dy - xhat * along_xhat[:, None] - along_ones[:, None]) * rstd[:, None]
        tl.store(dx_ptr + offs, dx, mask=mask)
    offs = share * cols + offs_n
    if HAS_DWEIGHT:
        tl.store(dweight_ptr + offs, tl.sum(dweight, 0)[None, :], mask=mask_n)
    if HAS_DBIAS:
        tl.store(dbias_ptr + offs, tl.sum(dbias, 0)[None, :], mask=mask_n)


@triton.jit(do_not_specialize=["rows", "n_vec"])
def _backward_long_kernel(
    dy_ptr,  # [rows, cols]
    x_ptr,  # [rows, cols]
    weight_ptr,  # [cols]
    statistics_ptr,  # [2, rows]: means, then rstds
    dx_ptr,  # [rows, cols]
    rows,
    n_vec,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    cols = n_vec * VEC
    start_0 = tl.program_id(1) * cols  # as in _backward_kernel
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * cols
        mean = tl.load(statistics_ptr + row)
        rstd = tl.load(statistics_ptr + rows + row)
        along_xhat = tl.zeros([BLOCK_N], tl.float32)
        along_ones = tl.zeros([BLOCK_N], tl.float32)
        for block in range(0, cols, BLOCK_N):
            offs_n = block + tl.arange(0, BLOCK_N)
            mask_n = offs_n < cols
            x = tl.load(x_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                dy *= tl.load(weight_ptr + start_0 + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            along_xhat += tl.where(mask_n, dy * ((x - mean) * rstd), 0.0)
            along_ones += dy
        mean_along_xhat = tl.sum(along_xhat, 0) / cols
        mean_along_ones = tl.sum(along_ones, 0) / cols
        for block in range(0, cols, BLOCK_N):
            offs_n = block + tl.arange(0, BLOCK_N)
            mask_n = offs_n < cols
            x = tl.load(x_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                dy *= tl.load(weight_ptr + start_0 + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            xhat = (x - mean) * rstd
            dx = (dy - xhat * mean_along_xhat - mean_along_ones) * rstd
            tl.store(dx_ptr + start + offs_n, dx, mask=mask_n)


@triton.jit(do_not_specialize=["rows", "n_vec"])
def _sum_rows_kernel(
    dy_ptr,  # [rows, cols]
    x_ptr,  # [rows, cols]
    statistics_ptr,  # [2, rows]: means, then rstds
    dweight_ptr,  # [shares, cols]
    dbias_ptr,  # [shares, cols]
    rows,
    n_vec,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
):
    cols = n_vec * VEC
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < cols
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    share = tl.program_id(1).to(tl.int64)
    for tile in range(share, tl.cdiv(rows, BLOCK_M), tl.num_programs(1)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask = mask_m[:, None] & mask_n
        offs = tl.where(mask_m, offs_m, 0)[:, None] * cols + offs_n  # as in _backward_kernel
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_DWEIGHT:
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)
            rstd = tl.load(statistics_ptr + rows + offs_m, mask=mask_m, other=0.0)
            dweight += tl.where(mask, dy * ((x - mean[:, None]) * rstd[:, None]), 0.0)
        if HAS_DBIAS:
            dbias += dy
    offs = share * cols + offs_n
    if HAS_DWEIGHT:
        tl.store(dweight_ptr + offs, tl.sum(dweight, 0)[None, :], mask=mask_n)
    if HAS_DBIAS:
        tl.store(dbias_ptr + offs, tl.sum(dbias, 0)[None, :], mask=mask_n)


@triton.jit(do_not_specialize=["shares", "n_vec"])
def _sum_shares_kernel(
    dweight_shares_ptr,  # [shares, cols]
    dbias_shares_ptr,  # [shares, cols]
    dweight_ptr,  # [cols]
    dbias_ptr,  # [cols]
    shares,
    n_vec,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
):
    cols = n_vec * VEC
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < cols
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, shares, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m < shares)[:, None] & mask_n
        offs = offs_m.to(tl.int64)[:, None] * cols + offs_n  # [BLOCK_M, BLOCK_N]
        if HAS_DWEIGHT:
            dweight += tl.load(dweight_shares_ptr + offs, mask=mask, other=0.0)
        if HAS_DBIAS:
            dbias += tl.load(dbias_shares_ptr + offs, mask=mask, other=0.0)
    if HAS_DWEIGHT:
        tl.store(dweight_ptr + offs_n, tl.sum(dweight, 0)[None, :], mask=mask_n)
    if HAS_DBIAS:
        tl.store(dbias_ptr + offs_n, tl.sum(dbias, 0)[None, :], mask=mask_n)


def _fused(rows: int, cols: int) -> bool:
    """Whether one kernel does dx and the sums: with few rows it would have too few programs."""
    fits = _triton.resident(FUSED_COLS, cols, _triton.vector(cols))
    return fits and rows >= max(LEAST_ROWS_PER_FUSED_SHARE, cols // 16)


def _shares(total: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """[count, cols] float32 to hold partial sums; a single share is the total itself."""
    if total is None or count == 1:
        return total
    return torch.empty((count, total.numel()), dtype=torch.float32, device=total.device)


def _launch_dx(
    rows: int,
    cols: int,
    inputs: tuple[torch.Tensor | None, ...],
    dx: torch.Tensor,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """dx, and the sums that are given; `inputs` is dy, x, weight, statistics."""
    vec = _triton.vector(cols)
    flags = {"VEC": vec, "HAS_WEIGHT": inputs[2] is not None}
    if not _triton.resident(RESIDENT_COLS, cols, vec):
        grid = (_triton.programs(rows, _triton.wave(dx, LONG_WARPS)),)
        _backward_long_kernel[grid](
            *inputs,
            dx,
            rows,
            cols // vec,
            **flags,
            BLOCK_N=LONG_BLOCK_N,
            num_warps=LONG_WARPS,
            **_triton.LAUNCH,
        )
        return
    sums = dweight is not None or dbias is not None
    block_m, num_warps = _triton.tile(FUSED_TILES if sums else TILES, dx, cols, vec)
    most = _triton.wave(dx, num_warps)
    if sums:
        one_each = min(rows // LEAST_ROWS_PER_FUSED_SHARE, _triton.multiprocessors(dx))
        most = min(most, max(1, one_each, rows // ROWS_PER_FUSED_SHARE))
    programs = _triton.programs(triton.cdiv(rows, block_m), most)
    shares = _shares(dweight, programs), _shares(dbias, programs)
    _backward_kernel[(programs,)](
        *inputs,
        dx,
        *shares,
        rows,
        cols // vec,
        **flags,
        BLOCK_M=block_m,
        BLOCK_N=triton.next_power_of_2(cols),
        HOLD_WEIGHT=_triton.resident(HELD_WEIGHT_COLS, cols, vec),
        HAS_DWEIGHT=dweight is not None,
        HAS_DBIAS=dbias is not None,
        num_warps=num_warps,
        **_triton.LAUNCH,
    )
    if sums and programs > 1:
        _launch_sum_shares(programs, cols, shares, dweight, dbias)


def _launch_sums(
    rows: int,
    cols: int,
    inputs: tuple[torch.Tensor | None, ...],
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    """dweight and dbias alone; `inputs` is dy, x, statistics."""
    vec = _triton.vector(cols)
    total = dweight if dweight is not None else dbias
    assert total is not None
    block_n = min(SUM_BLOCK_N, triton.next_power_of_2(cols))
    block_m = SUM_ELEMENTS // block_n
    blocks = triton.cdiv(cols, block_n)
    most = max(1, min(rows // ROWS_PER_SHARE, _triton.wave(total, SUM_WARPS) // blocks))
    programs = _triton.programs(triton.cdiv(rows, block_m), most)
    shares = _shares(dweight, programs), _shares(dbias, programs)
    _sum_rows_kernel[(blocks, programs)](
        *inputs,
        *shares,
        rows,
        cols // vec,
        VEC=vec,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        HAS_DWEIGHT=dweight is not None,
        HAS_DBIAS=dbias is not None,
        num_warps=SUM_WARPS,
        **_triton.LAUNCH,
    )
    if programs > 1:
        _launch_sum_shares(programs, cols, shares, dweight, dbias)


def _launch_sum_shares(
    count: int,
    cols: int,
    shares: tuple[torch.Tensor | None, torch.Tensor | None],
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> None:
    vec = _triton.vector(cols)
    block_n = min(SUM_BLOCK_N, triton.next_power_of_2(cols))
    _sum_shares_kernel[(triton.cdiv(cols, block_n),)](
        *shares,
        dweight,
        dbias,
        count,
        cols // vec,
        VEC=vec,
        BLOCK_M=SUM_ELEMENTS // block_n,
        BLOCK_N=block_n,
        HAS_DWEIGHT=dweight is not None,
        HAS_DBIAS=dbias is not None,
        num_warps=SUM_WARPS,
        **_triton.LAUNCH,
    )


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    output_mask: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx, dweight and dbias in the dtypes of x, weight and bias; None where not asked for."""
    cols = math.prod(normalized_shape)
    rows = x.numel() // cols if cols else 0
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if output_mask[0] else None
    dweight, dbias = (
        torch.empty(normalized_shape, dtype=parameter.dtype, device=x.device)
        if asked and parameter is not None
        else None
        for asked, parameter in zip(output_mask[1:], (weight, bias), strict=True)
    )
    if rows == 0:
        for total in (dweight, dbias):
            if total is not None:
                total.zero_()
        return dx, dweight, dbias
    dy, x = dy.contiguous(), x.contiguous()
    weight = None if weight is None else weight.contiguous()
    sums = dweight is not None or dbias is not None
    with _triton.device_of(x):
        fused = dx is not None and sums and _fused(rows, cols)
        if dx is not None:
            totals = (dweight, dbias) if fused else (None, None)
            _launch_dx(rows, cols, (dy, x, weight, statistics), dx, *totals)
        if sums and not fused:
            _launch_sums(rows, cols, (dy, x, statistics), dweight, dbias)
    return dx, dweight, dbias
