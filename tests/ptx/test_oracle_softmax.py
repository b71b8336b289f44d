"""Triton's softmax on the executor: shuffles, sums over warps in shared memory, TMA.

Triton is a production compiler: numbers must be right, and any report would be a false alarm.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import ptx
from tests.tolerance import assert_as_exact_as_torch

triton = pytest.importorskip("triton")
from tests.ptx import oracle_kernels as kernels  # noqa: E402

ARCHS = ("sm_80", "sm_90a", "sm_100a")
SCHEDULES = ("round_robin", "reverse", "random")


def check(x, y) -> None:
    exact = torch.softmax(x.double(), -1)
    assert_as_exact_as_torch([y], [torch.softmax(x, -1)], [exact], [f"{x.dtype} {x.shape}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_pointers(arch, dtype):
    # One lane, a row short of the block, one past a vector, a full block; one tile and several,
    # the last of them ragged.
    sizes = [(1, 1), (7, 200), (33, 129), (8, 256)]
    for (rows, cols), schedule in zip(sizes, itertools.cycle(SCHEDULES)):
        x = (3 * torch.randn(rows, cols)).to(dtype)
        y = torch.empty_like(x)
        with ptx.run(arch, schedule=schedule):
            kernels.softmax[(3,)](x, y, rows, cols, BLOCK_M=4, BLOCK_N=256)
        check(x, y)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_descriptors(arch):
    for (rows, cols), schedule in zip([(7, 200), (33, 64), (8, 256)], itertools.cycle(SCHEDULES)):
        x = 3 * torch.randn(rows, cols)
        y = torch.empty_like(x)
        with ptx.run(arch, schedule=schedule):
            kernels.softmax_descriptors[(3,)](x, y, rows, cols, BLOCK_M=4, BLOCK_N=256)
        check(x, y)
