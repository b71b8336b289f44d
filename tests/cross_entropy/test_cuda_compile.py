"""The CUDA kernels through the real compiler, no GPU needed: no spills, no local memory, and few
enough registers for the blocks that csrc/cross_entropy/cuda.cuh plans on a multiprocessor."""

from __future__ import annotations

import pytest

from tests.machine_code import REGISTERS, targets, usages

# Threads that the grids expect to be resident: the launch bounds in csrc/cross_entropy/.
RESIDENT = {
    "forward_tile_kernel": 256 * 3,
    "backward_tile_kernel": 256 * 3,
    "forward_rows_kernel": 256 * 3,
    "backward_rows_kernel": 256 * 3,
    "mass_kernel": 256 * 3,
}


@pytest.mark.parametrize("target", targets("cross_entropy"))
def test_machine_code(target: str) -> None:
    compiled = usages("cross_entropy", target)
    assert {u.kernel for u in compiled} == RESIDENT.keys() | {"merge_parts_kernel"}
    # 3 dtypes of each, and one kernel that merges
    assert len(compiled) == 3 * len(RESIDENT) + 1
    assert [u for u in compiled if u.local] == []
    allocated = {u: -(-u.registers // 8) * 8 for u in compiled}  # handed out in eights
    crowded = [u for u in compiled if allocated[u] * RESIDENT.get(u.kernel, 64) > REGISTERS]
    assert crowded == []
