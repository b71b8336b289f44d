"""The CUDA kernels through the real compiler, no GPU needed: no spills, no local memory, few enough
registers for the blocks that launch bounds and grids plan, and int8 products on tensor cores."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from bench import sass
from bench.loops import Instruction, innermost_loops
from ptx.machine_code import cuobjdump
from tests.machine_code import REGISTERS, Usage, machine_code, targets, usages

# Kernel -> its instances, and the threads that are to be resident on a multiprocessor.
KERNELS = {
    "gemm_kernel": (2, 128 * 2),
    "weight_only_kernel": (3, 128 * 3),
    "add_parts_kernel": (2, 128 * 8),
    "gemv_kernel": (2, 256 * 3),
    "quantize_rows_kernel": (9, 640),
    "transpose_kernel": (1, 256 * 4),
    "realign_kernel": (1, 256 * 4),
}


class Compiled(NamedTuple):
    usages: list[Usage]
    listings: dict[str, list[Instruction]]  # by mangled name

    def loop(self, kernel: str, instruction: str) -> list[str]:
        """Opcodes of the innermost loop of a kernel that has most of an instruction."""
        (name,) = (name for name in self.listings if kernel in name)
        loops = [[i.opcode for i in loop] for loop in innermost_loops(self.listings[name])]
        return max(loops, key=lambda loop: count(loop, instruction))


def count(opcodes: list[str], instruction: str) -> int:
    return sum(opcode.startswith(instruction) for opcode in opcodes)


@pytest.fixture(scope="module", params=targets("int8_matmul"))
def compiled(request: pytest.FixtureRequest) -> Compiled:
    cubin, _ = machine_code("int8_matmul", request.param)
    found = usages("int8_matmul", request.param)
    return Compiled(found, sass.functions(cuobjdump("-sass", cubin)))


def test_every_kernel_is_compiled(compiled: Compiled) -> None:
    names = [u.kernel for u in compiled.usages]
    assert {name: names.count(name) for name in names} == {
        name: instances for name, (instances, _) in KERNELS.items()
    }


def test_no_spills_and_no_local_memory(compiled: Compiled) -> None:
    assert [u for u in compiled.usages if u.local] == []


def test_registers_leave_room_for_the_planned_blocks(compiled: Compiled) -> None:
    allocated = {u: -(-u.registers // 8) * 8 for u in compiled.usages}  # handed out in eights
    crowded = [u for u in compiled.usages if allocated[u] * KERNELS[u.kernel][1] > REGISTERS]
    assert crowded == []


def test_the_loop_over_the_depth_is_products_and_what_feeds_them(compiled: Compiled) -> None:
    """Of tiles of 128 and of 64 rows: two steps of 32 columns by a warp's quarter of the tile."""
    for rows in (128, 64):
        loop = compiled.loop(f"11gemm_kernelILi{rows}E", "IMMA")
        tall, wide = rows // 2 // 16, rows // 2 // 8
        assert count(loop, "IMMA.16832.S8.S8") == 2 * tall * wide
        assert count(loop, "LDSM.16.M88.4") == 2 * (tall + wide // 2)
        assert count(loop, "LDGSTS") == 2 * rows * 64 // 16 // 128
        assert all(".128" in opcode for opcode in loop if opcode.startswith("LDGSTS"))
        assert count(loop, "BAR.") == 1


def test_weights_are_loaded_before_they_are_needed(compiled: Compiled) -> None:
    """16 bytes a lane for two steps of two columns: of the first batch ahead of the barrier behind
    which its products stand, and of the next batch ahead of those products."""
    for integer, product in enumerate(("FFMA", "IDP")):
        (name,) = (name for name in compiled.listings if f"gemv_kernelILb{integer}E" in name)
        opcodes = [i.opcode for i in compiled.listings[name]]
        first = next(at for at, opcode in enumerate(opcodes) if opcode.startswith(product))
        barrier = max(at for at, opcode in enumerate(opcodes[:first]) if opcode.startswith("BAR."))
        wide = [opcode.startswith("LDG") and ".128" in opcode for opcode in opcodes]
        assert sum(wide[:barrier]) >= 4
        assert sum(wide[barrier:first]) == 4
