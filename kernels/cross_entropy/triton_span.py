"""Tiles of short rows to and from memory, in Triton.

Rows that fill whole sectors are moved as they lie.  Rows of odd lengths are moved as one span of
memory, in 128-bit vectors, and change places through shared memory: read row by row, each of them
would share its first and last sector with its neighbours, and every element be a load of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

VECTOR = tl.constexpr(8)  # elements: 128 bits of the 16-bit types, twice that of float32


@triton.jit
def _end(tile, rows, classes, BLOCK_M: tl.constexpr):
    """Elements in a tile's span."""
    return tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(tl.int32) * classes


@triton.jit
def load_tile(
    ptr,
    tile,
    rows,
    classes,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Rows tile * BLOCK_M and following, [BLOCK_M, BLOCK_N]; what is outside of them is undefined.

    With SPAN rows lie `classes` apart, and BLOCK_M is a multiple of 8.
    """
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    if not SPAN:
        place = (tile.to(tl.int64) * BLOCK_M + row) * stride + column
        mask = (row < rows - tile * BLOCK_M) & (column < classes)
        values = tl.load(ptr + place, mask=mask, other=0.0)
    else:
        start, end = tile.to(tl.int64) * BLOCK_M * classes, _end(tile, rows, classes, BLOCK_M)
        place = tl.arange(0, BLOCK_M * BLOCK_N)
        span = tl.load(ptr + start + place, mask=place < end // VECTOR * VECTOR, other=0.0)
        if end % VECTOR != 0:  # of the last tile; that these are no vectors is all Triton sees
            rest = (place >= end // VECTOR * VECTOR) & (place < end)
            span = tl.where(rest, tl.load(ptr + start + place, mask=rest, other=0.0), span)
        index = tl.reshape(row * classes + column, [BLOCK_M * BLOCK_N])
        values = tl.reshape(tl.gather(span, index, 0), [BLOCK_M, BLOCK_N])
    return values


@triton.jit
def store_tile(
    ptr,
    values,  # [BLOCK_M, BLOCK_N]
    tile,
    rows,
    classes,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The way back of load_tile."""
    values = values.to(ptr.dtype.element_ty)
    if not SPAN:
        row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        place = (tile.to(tl.int64) * BLOCK_M + row) * stride + column
        mask = (row < rows - tile * BLOCK_M) & (column < classes)
        tl.store(ptr + place, values, mask=mask)
    else:
        start, end = tile.to(tl.int64) * BLOCK_M * classes, _end(tile, rows, classes, BLOCK_M)
        place = tl.arange(0, BLOCK_M * BLOCK_N)
        # place // classes: half an element from the next integer is far more than the rounding.
        row = ((place + 0.5) * (1.0 / classes)).to(tl.int32)
        index = tl.where(place < BLOCK_M * classes, row * (BLOCK_N - classes) + place, 0)
        span = tl.gather(tl.reshape(values, [BLOCK_M * BLOCK_N]), index, 0)
        tl.store(ptr + start + place, span, mask=place < end // VECTOR * VECTOR)
        if end % VECTOR != 0:
            rest = (place >= end // VECTOR * VECTOR) & (place < end)
            tl.store(ptr + start + place, span, mask=rest)
