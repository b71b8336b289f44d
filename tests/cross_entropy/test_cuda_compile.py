"""The CUDA kernels through the real compiler, no GPU needed: no spills, no local memory, and few
enough registers for the blocks that csrc/cross_entropy/cuda.cuh plans on a multiprocessor."""

from __future__ import annotations

import pytest

from tests.machine_code import REGISTERS, Usage, targets, usages

# Threads that the grids expect to be resident: the launch bounds in csrc/cross_entropy/.
RESIDENT = {
    "forward_tile_kernel": 256 * 3,
    "backward_tile_kernel": 256 * 3,
    "forward_rows_kernel": 256 * 3,
    "backward_rows_kernel": 256 * 3,
    "mass_kernel": 256 * 3,
}


@pytest.fixture(scope="module", params=targets(default=("80", "89", "90a", "100a")))
def compiled(request: pytest.FixtureRequest, tmp_path_factory) -> list[Usage]:
    return usages("cross_entropy", request.param, tmp_path_factory.mktemp("cuda"))


def test_every_kernel_is_compiled(compiled: list[Usage]) -> None:
    assert {u.kernel for u in compiled} == RESIDENT.keys() | {"merge_parts_kernel"}
    # 3 dtypes of each, and one kernel that merges
    assert len(compiled) == 3 * len(RESIDENT) + 1


def test_no_spills_and_no_local_memory(compiled: list[Usage]) -> None:
    assert [u for u in compiled if u.local] == []


def test_registers_leave_room_for_the_planned_blocks(compiled: list[Usage]) -> None:
    allocated = {u: -(-u.registers // 8) * 8 for u in compiled}  # handed out in eights
    crowded = [u for u in compiled if allocated[u] * RESIDENT.get(u.kernel, 64) > REGISTERS]
    assert crowded == []
