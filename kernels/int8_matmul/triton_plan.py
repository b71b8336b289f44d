"""How the Triton products with an int8 weight are launched: layouts, tiles, parts of K."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
from torch import Tensor

from kernels import _triton

VECTOR = 16  # bytes that one instruction moves, and elements that copied rows are multiples of
NARROW = 4  # bytes; what is read by less cannot be copied asynchronously
# From so many rows on both matrices are first copied to rows of whole vectors: a copy moves each
# byte of the weight three times, the product of narrow loads takes several instructions for each.
NARROW_ROWS = 17
# A weight that is contiguous along N has its bytes transposed by every program that reads them:
# eight times where 1024 rows make eight tiles.
TRANSPOSED_ROWS = 1024

# Per architecture and bytes of an element of a: (1 where the tile is for plain calls only, without
# gelu and with vectors of 16 bytes; BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), the largest
# tile first.  Chosen by what the compilers say, not timed: of the tiles tried, the largest whose
# sums and epilogue fit the registers, and whose stages the shared memory, with Triton 3.5 to 3.9.
# What they take is in bench/gates.json.
SMALL = (
    (0, 64, 128, 64, 4, 4), (0, 64, 64, 128, 4, 4), (0, 32, 64, 128, 4, 4), (0, 32, 32, 128, 4, 4),
    (0, 16, 64, 256, 4, 4), (0, 16, 32, 256, 4, 4),
)  # fmt: skip
SMALL_HALF = (
    (0, 64, 128, 64, 4, 3), (0, 64, 64, 64, 4, 4), (0, 32, 64, 128, 4, 3), (0, 32, 32, 128, 4, 3),
    (0, 16, 64, 128, 4, 4), (0, 16, 32, 128, 4, 4),
)  # fmt: skip
SMALL_SINGLE = ((0, 64, 128, 32, 4, 3), (0, 16, 64, 64, 4, 4), (0, 16, 32, 128, 4, 3))
TILES: dict[str, dict[int, tuple[tuple[int, ...], ...]]] = {
    "sm_80": {
        1: ((0, 128, 128, 64, 8, 4), *SMALL),  # 128 of K spill 216 bytes from Triton 3.8 on
        2: ((0, 128, 128, 64, 8, 3), *SMALL_HALF),
        4: ((0, 128, 128, 32, 8, 3), *SMALL_SINGLE),
    },
    "sm_86": {
        1: ((0, 128, 128, 64, 8, 3), *SMALL),
        2: ((0, 128, 128, 64, 8, 2), *SMALL_HALF),
        4: ((0, 128, 128, 32, 8, 3), *SMALL_SINGLE),
    },
    "sm_90": {
        1: ((1, 128, 256, 128, 8, 4), (0, 128, 128, 128, 8, 4), *SMALL),
        2: ((0, 128, 128, 64, 8, 4), *SMALL_HALF),
        4: ((0, 128, 128, 64, 8, 3), *SMALL_SINGLE),
    },
    "sm_100": {
        1: ((0, 128, 128, 128, 8, 4), *SMALL),
        2: ((0, 128, 128, 64, 8, 4), *SMALL_HALF),
        4: ((0, 128, 128, 32, 8, 3), *SMALL_SINGLE),
    },
    "gfx942": {
        1: ((0, 128, 128, 128, 8, 2), (0, 64, 64, 128, 4, 2), (0, 32, 64, 128, 4, 2),
            (0, 16, 64, 256, 4, 2), (0, 16, 32, 256, 4, 2)),
        2: ((0, 128, 128, 64, 8, 2), (0, 64, 64, 64, 4, 2), (0, 32, 64, 128, 4, 2),
            (0, 16, 64, 128, 4, 2), (0, 16, 32, 128, 4, 2)),
        4: ((0, 128, 64, 32, 8, 2), (0, 64, 64, 32, 4, 2), (0, 16, 64, 64, 4, 2)),
    },
    "interpreter": dict.fromkeys((1, 2, 4), ((0, 32, 32, 32, 4, 1), (0, 16, 32, 32, 4, 1))),
}  # fmt: skip
NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
# Loads of single elements take an address each: more of them would not fit the registers.
NARROW_TILE = (16, 32, 64, 4, 2)
SMALLEST_M = 16  # rows of a tile, which tensor cores take at least
LEAST_M = 64  # more rows than this do not take smaller tiles
PART_BLOCKS = 4  # the least that a program takes of K where several share it
MAX_PARTS = 16
COMBINE_BLOCK, COMBINE_WARPS = 1024, 4


@dataclass(frozen=True)
class Layout:
    """How a and the weight lie in memory, in the terms of the kernel's arguments."""

    along_k: bool
    vec_k: int
    vec_n: int
    stride_a: int  # in units of vec_k
    stride_b: int  # in units of the vector of the dimension that is contiguous
    narrow: bool  # see NARROW


def is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % VECTOR == 0


def layout(a: Tensor, weight: Tensor) -> Layout:
    """Vectors of up to 16 bytes that divide every row.  The stride of a single row is 0."""
    (rows, depth), cols = a.shape, weight.shape[0]
    along_k = weight.stride(1) == 1
    stride_a = a.stride(0) if rows > 1 else 0
    vec_a = math.gcd(VECTOR // a.element_size(), depth, stride_a)
    if along_k:
        stride_b = weight.stride(0) if cols > 1 else 0
        vec_k = vec_b = math.gcd(VECTOR, depth, stride_b, stride_a)
        vec_n = math.gcd(VECTOR, cols)
    else:
        stride_b = weight.stride(1) if depth > 1 else 0
        vec_k = math.gcd(VECTOR, depth, stride_a)
        vec_n = vec_b = math.gcd(VECTOR, cols, stride_b)
    narrow = min(vec_a * a.element_size(), vec_b) < NARROW
    # Triton looks no further where a tensor does not start on a boundary of 16 bytes.
    narrow = narrow or not is_aligned(a) or not is_aligned(weight)
    return Layout(along_k, vec_k, vec_n, stride_a // vec_k, stride_b // vec_b, narrow)


def padded_width(rows: int, depth: int) -> int:
    """The width of int8 rows that are made here: of whole vectors, where `prepared` wants them."""
    if rows < NARROW_ROWS or depth % NARROW == 0:
        return depth
    return triton.cdiv(depth, VECTOR) * VECTOR


def _padded(matrix: Tensor, width: int) -> Tensor:
    """[n, width], rows of whole vectors, with zeros after what `matrix` has."""
    is_whole = matrix.shape[1] == width and matrix.stride(0) % VECTOR == 0
    if is_whole and matrix.stride(1) == 1 and is_aligned(matrix):
        return matrix
    copy = matrix.new_zeros(matrix.shape[0], width)
    copy[:, : matrix.shape[1]] = matrix
    return copy


def prepared(a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the product kernel is called with: both as they are, or copies with zeros behind K."""
    (rows, width), depth = a.shape, weight.shape[1]
    if width == depth:
        found = layout(a, weight)
        if rows < (NARROW_ROWS if found.narrow else TRANSPOSED_ROWS):
            return a, weight
        if found.along_k and not found.narrow:
            return a, weight
        width = triton.cdiv(depth, VECTOR) * VECTOR
    return _padded(a, width), _padded(weight, width)


@dataclass(frozen=True)
class Plan:
    """Tiles of y, and how many programs share the K of one."""

    tile: dict[str, int]
    tiles: int
    parts: int
    part_blocks: int  # of BLOCK_K


def _fitting(a: Tensor, found: Layout, activation: str) -> list[tuple[int, ...]]:
    """Tiles that the call may have, the largest first."""
    if found.narrow:
        return [NARROW_TILE]
    plain = not activation.startswith("gelu") and found.vec_k == VECTOR
    table = TILES[_triton.architecture(a)][a.element_size()]
    most = max(SMALLEST_M, triton.next_power_of_2(a.shape[0]))
    fitting = [row[1:] for row in table if row[1] <= most and (plain or not row[0])]
    return [row for row in fitting if row[0] >= min(LEAST_M, fitting[0][0])]


def plan(a: Tensor, weight: Tensor, found: Layout, activation: str) -> Plan:
    """The largest tile that gives half of the multiprocessors work, and parts for the others."""
    (rows, depth), cols = a.shape, weight.shape[0]
    multiprocessors = _triton.multiprocessors(a)

    def tiles(row: tuple[int, ...]) -> int:
        return triton.cdiv(rows, row[0]) * triton.cdiv(cols, row[1])

    fitting = _fitting(a, found, activation)
    tile = next((row for row in fitting if 2 * tiles(row) >= multiprocessors), fitting[-1])
    blocks = triton.cdiv(depth, tile[2])
    parts = max(1, min(multiprocessors // tiles(tile), blocks // PART_BLOCKS, MAX_PARTS))
    part_blocks = triton.cdiv(blocks, parts)
    named = dict(zip(NAMES, tile, strict=True))
    return Plan(named, tiles(tile), triton.cdiv(blocks, part_blocks), part_blocks)
