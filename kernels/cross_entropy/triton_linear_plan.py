"""How the Triton kernels of linear + cross-entropy are launched: tiles, parts, what they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels import _triton
from kernels.cross_entropy.chunks import Problem
from kernels.cross_entropy.triton_plan import MAX_CLASSES, MAX_PARTS

WAVES = 2  # of programs, that the device is given where the work can be split into as many

# Per architecture, first match wins: (largest bytes of an element, 1 where the row is for plain
# calls only, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages).  Chosen by what the compilers say,
# not timed: the largest tile of those tried whose loops fit the registers and the shared memory.
FORWARD = {
    "sm_80": (
        (2, 1, 128, 128, 64, 8, 3),
        (2, 0, 128, 64, 64, 8, 3),  # 128 classes spill 64 bytes
        (4, 1, 64, 32, 32, 4, 2),  # tf32x3 holds every operand twice
        (4, 0, 64, 32, 32, 8, 1),  # 4 warps of 2 stages take 16 bytes of stack
    ),
    "sm_86": (
        (2, 1, 128, 128, 64, 8, 2),  # 99 KiB of shared memory
        (2, 0, 128, 64, 64, 8, 2),
        (4, 1, 64, 32, 32, 4, 2),
        (4, 0, 64, 32, 32, 8, 1),
    ),
    "sm_90": (
        (2, 1, 128, 256, 64, 8, 3),
        (2, 0, 128, 64, 64, 8, 3),  # 256 classes spill 1048 bytes
        (4, 1, 64, 32, 32, 4, 2),
        (4, 0, 64, 32, 32, 8, 1),
    ),
    "sm_100": (
        (2, 1, 128, 128, 64, 8, 3),
        (2, 0, 128, 64, 64, 8, 3),
        (4, 1, 64, 32, 32, 4, 2),
        (4, 0, 64, 32, 32, 8, 1),
    ),
    "gfx942": (
        (2, 0, 128, 64, 64, 8, 1),
        (4, 0, 64, 32, 32, 4, 1),
    ),
    "interpreter": ((4, 0, 16, 32, 16, 4, 1),),
}
# The same of the gradients, BLOCK_M being what a program owns: rows or classes.
GRADIENT = {
    "sm_80": (
        (2, 1, 128, 128, 32, 8, 2),
        (2, 0, 128, 64, 32, 8, 2),  # 128 to walk over spill 208 bytes
        (4, 0, 32, 32, 32, 4, 1),
    ),
    "sm_86": (
        (2, 1, 128, 128, 32, 8, 2),
        (2, 0, 128, 64, 32, 8, 2),
        (4, 0, 32, 32, 32, 4, 1),
    ),
    "sm_90": (
        (2, 0, 128, 64, 64, 8, 3),  # 128 to walk over spill 384 bytes
        (4, 0, 32, 32, 32, 4, 1),
    ),
    "sm_100": (
        (2, 0, 128, 64, 32, 8, 3),  # 64 features at a time take 16 to 32 bytes of stack
        (4, 0, 32, 32, 32, 4, 1),
    ),
    "gfx942": (
        (2, 0, 64, 64, 64, 8, 1),
        (4, 0, 32, 32, 32, 4, 1),
    ),
    "interpreter": ((4, 0, 16, 32, 16, 4, 1),),
}
Tiles = Mapping[str, tuple[tuple[int, ...], ...]]
NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


def tile(table: Tiles, problem: Problem, plain: bool) -> dict[str, int]:
    """Of FORWARD or GRADIENT; a `plain` call has nothing but indices, and perhaps a bias."""
    x = problem.input
    options = problem.options
    plain = plain and not (options.label_smoothing or options.softcap or options.stats)
    plain = plain and problem.weight is None
    found = next(
        row[2:]
        for row in table[_triton.architecture(x)]
        if x.element_size() <= row[0] and (plain or not row[1])
    )
    return dict(zip(NAMES, found, strict=True))


def precision(x: Tensor) -> str:
    return _triton.float32_dot(x) if x.dtype == torch.float32 else "ieee"


@dataclass(frozen=True)
class Split:
    """Blocks of what programs own, times parts of what they walk over."""

    blocks: int
    parts: int
    part_blocks: int  # blocks in a part


def split(
    x: Tensor, owned: int, walked: int, block: int, step: int, most: int = MAX_PARTS
) -> Split:
    """Parts, at most `most`, so that there are programs for WAVES waves."""
    blocks, steps = triton.cdiv(owned, block), triton.cdiv(walked, step)
    wanted = triton.cdiv(WAVES * _triton.multiprocessors(x), blocks)
    part_blocks = triton.cdiv(steps, max(1, min(wanted, most, steps)))
    return Split(blocks, triton.cdiv(steps, part_blocks), part_blocks)


def prepared(problem: Problem) -> Problem:
    """The call with what kernels take as contiguous; rows may be any distance apart."""
    x, w, bias = problem.input, problem.linear_weight, problem.linear_bias
    return problem._replace(
        input=x if x.stride(1) == 1 else x.contiguous(),
        linear_weight=w if w.stride(1) == 1 else w.contiguous(),
        linear_bias=None if bias is None else bias.contiguous(),
        target=problem.target.contiguous(),
    )


def unsupported(problem: Problem) -> str | None:
    """None where the kernels take the call that the Triton backend takes row by row."""
    x, w = problem.input, problem.linear_weight
    if problem.chunk_rows is not None:
        return "options name a chunk's rows"
    if problem.target.is_floating_point():
        return "target holds probabilities"
    if x.dtype not in _triton.DTYPES or w.dtype != x.dtype:
        return f"input is {x.dtype} and linear_weight {w.dtype}"
    if w.shape[0] > MAX_CLASSES:
        return f"linear_weight has {w.shape[0]} classes, more than {MAX_CLASSES}"
    if 0 in x.shape:
        return "input is empty"
    return None
