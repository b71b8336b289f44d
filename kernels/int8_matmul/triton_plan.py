"""How the Triton products with an int8 weight are launched: tiles, and parts of K."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels import _triton

VECTOR = 16  # bytes, and elements of the weight, that one instruction moves
PART_BLOCKS = 4  # the least that a program takes of K where several share it
MAX_PARTS = 16

# Per architecture and bytes of the elements that are multiplied: (BLOCK_M, BLOCK_N, BLOCK_K,
# num_warps, num_stages), the largest tile first; the registers and shared memory of each are in
# bench/gates.json.  Chosen by what the compilers say, not timed.
TILES = {
    "sm_80": {
        1: ((128, 256, 64, 8, 3), (128, 128, 128, 8, 3), (64, 128, 128, 4, 3), (64, 64, 128, 4, 4),
            (32, 64, 128, 4, 4), (16, 64, 128, 4, 5)),
        2: ((128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4), (32, 64, 128, 4, 4),
            (16, 64, 128, 4, 4)),
        4: ((64, 64, 32, 8, 2), (16, 64, 64, 4, 3)),
    },
    "sm_86": {
        1: ((128, 128, 64, 8, 3), (64, 128, 128, 4, 3), (64, 64, 128, 4, 4), (32, 64, 128, 4, 4),
            (16, 64, 128, 4, 5)),
        2: ((128, 128, 64, 8, 2), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4), (32, 64, 128, 4, 3),
            (16, 64, 128, 4, 4)),
        4: ((64, 64, 32, 8, 2), (16, 64, 64, 4, 3)),
    },
    "sm_90": {
        1: ((128, 256, 128, 8, 4), (128, 128, 128, 8, 4), (64, 128, 128, 4, 4),
            (64, 64, 128, 4, 5), (32, 64, 128, 4, 5), (16, 64, 256, 4, 4)),
        2: ((128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 128, 4, 4), (32, 64, 128, 4, 4),
            (16, 64, 128, 4, 5)),
        4: ((64, 64, 32, 8, 2), (16, 64, 64, 4, 3)),
    },
    "sm_100": {
        1: ((128, 256, 64, 8, 3), (128, 128, 128, 8, 4), (64, 128, 128, 4, 4), (64, 64, 128, 4, 5),
            (32, 64, 128, 4, 5), (16, 64, 256, 4, 4)),
        2: ((128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 128, 4, 4), (32, 64, 128, 4, 4),
            (16, 64, 128, 4, 5)),
        4: ((64, 64, 32, 8, 2), (16, 64, 64, 4, 3)),
    },
    "gfx942": {
        1: ((128, 128, 128, 8, 2), (64, 64, 128, 4, 2), (16, 64, 256, 4, 2)),
        2: ((128, 128, 64, 8, 2), (64, 64, 64, 4, 2), (16, 64, 128, 4, 2)),
        4: ((64, 64, 32, 8, 1), (16, 64, 64, 4, 1)),
    },
    "interpreter": {
        size: ((32, 32, 32, 4, 1), (16, 32, 32, 4, 1)) for size in (1, 2, 4)
    },
}  # fmt: skip
NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
SMALLEST_M = 16  # rows of a tile
COMBINE_BLOCK, COMBINE_WARPS = 1024, 4


@dataclass(frozen=True)
class Plan:
    """Tiles of y, and how many programs share the K of one."""

    tile: dict[str, int]
    tiles: int
    parts: int
    part_depth: int


def plan(a: Tensor, weight: Tensor) -> Plan:
    """The largest tile that gives half of the multiprocessors work, and parts for the others."""
    (rows, depth), cols = a.shape, weight.shape[0]
    table = TILES[_triton.architecture(a)][a.element_size()]
    most_rows = max(SMALLEST_M, triton.next_power_of_2(rows))
    fitting = [row for row in table if row[0] <= most_rows]
    multiprocessors = _triton.multiprocessors(a)

    def tiles(row: tuple[int, ...]) -> int:
        return triton.cdiv(rows, row[0]) * triton.cdiv(cols, row[1])

    found = next((row for row in fitting if 2 * tiles(row) >= multiprocessors), fitting[-1])
    block_k = found[2]
    blocks = triton.cdiv(depth, block_k)
    parts = max(1, min(multiprocessors // tiles(found), blocks // PART_BLOCKS, MAX_PARTS))
    part_blocks = triton.cdiv(blocks, parts)
    return Plan(
        dict(zip(NAMES, found, strict=True)),
        tiles(found),
        triton.cdiv(blocks, part_blocks),
        part_blocks * block_k,
    )


@dataclass(frozen=True)
class Layout:
    """How a and the weight lie in memory, in the terms of the kernel's arguments."""

    along_k: bool
    vec_k: int
    vec_n: int
    stride_a: int
    stride_b: int


def layout(a: Tensor, weight: Tensor) -> Layout:
    """Vectors of up to 16 bytes that divide every row; the stride of a single row is 0."""
    (rows, depth), cols = a.shape, weight.shape[0]
    along_k = weight.stride(1) == 1
    stride_a = a.stride(0) if rows > 1 else 0
    vec_k = math.gcd(VECTOR // a.element_size(), depth, stride_a)
    if along_k:
        stride_b = weight.stride(0) if cols > 1 else 0
        vec_k = math.gcd(VECTOR, depth, stride_b, stride_a)
        return Layout(True, vec_k, math.gcd(VECTOR, cols), stride_a // vec_k, stride_b // vec_k)
    stride_b = weight.stride(1) if depth > 1 else 0
    vec_n = math.gcd(VECTOR, cols, stride_b)
    return Layout(False, vec_k, vec_n, stride_a // vec_k, stride_b // vec_n)


def refusal(a: Tensor) -> str | None:
    if max(a.shape) >= 2**31:
        return f"x has shape {tuple(a.shape)}; a dimension of 2^31 or more is not supported"
    return None


def is_float(dtype: torch.dtype) -> bool:
    return dtype in _triton.DTYPES
