"""The CUDA kernels through the real compiler, no GPU needed: no spills, no local memory, and few
enough registers for the grids that csrc/layer_norm/cuda.cuh plans."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.machine_code import REGISTERS, Usage, in_dtypes, targets, usages

# Threads that the persistent kernels expect to be resident, by columns per thread and whether they
# move 128 bits at a time: forward_bounds and backward_bounds in csrc/layer_norm/.
RESIDENT = {
    ("forward_rows_kernel", 8, True): 1024,
    ("forward_rows_kernel", 8, False): 768,
    ("forward_rows_kernel", 16, True): 768,
    ("forward_rows_kernel", 16, False): 512,
    ("forward_rows_kernel", 32, True): 512,
    ("backward_rows_kernel", 8, True): 768,
    ("backward_rows_kernel", 8, False): 768,
    ("backward_rows_kernel", 16, True): 512,
    ("backward_rows_kernel", 16, False): 512,
    ("backward_rows_kernel", 32, True): 256,
}


@in_dtypes
@pytest.mark.parametrize("target", targets("layer_norm"))
def test_machine_code(target: str, dtypes: Sequence[str]) -> None:
    compiled = usages("layer_norm", target, dtypes)
    kernels = {(u.kernel, u.integers) for u in compiled}
    assert {name for name, *_ in RESIDENT} < {name for name, _ in kernels}
    # dtypes of x times 5 row classes each way, 3 sweeping or column kernels, and one reduction
    assert len(compiled) == len(dtypes) * (2 * 5 + 3 * 2) + 1
    assert [u for u in compiled if u.local] == []
    assert [u for u in compiled if not room_for_the_planned_blocks(u)] == []


def room_for_the_planned_blocks(usage: Usage) -> bool:
    if not usage.kernel.endswith("_rows_kernel"):
        return True
    vec, items = usage.integers
    allocated = -(-usage.registers // 8) * 8  # handed out in eights
    return allocated * RESIDENT[usage.kernel, items, vec > 1] <= REGISTERS
