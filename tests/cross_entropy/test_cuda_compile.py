"""The CUDA kernels through the real compiler, no GPU needed: no spills, no local memory, and few
enough registers for the blocks that csrc/cross_entropy/cuda.cuh plans on a multiprocessor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.layer_norm.test_cuda_compile import CSRC, REGISTERS, TARGETS, Usage, usages

SOURCE = """
#include "cross_entropy/cuda.cuh"
using namespace kernels;
void use(const cross_entropy::ForwardArgs& f, const cross_entropy::BackwardArgs& b) {
  cross_entropy::forward(f, DType::kFloat32, {1, nullptr});
  cross_entropy::backward(b, nullptr, DType::kFloat32, {1, nullptr});
}
"""
# Threads that the grids expect to be resident: the launch bounds in csrc/cross_entropy/.
RESIDENT = {
    "forward_tile_kernel": 256 * 3,
    "backward_tile_kernel": 256 * 3,
    "forward_rows_kernel": 256 * 3,
    "backward_rows_kernel": 256 * 3,
    "mass_kernel": 256 * 3,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder: Path = tmp_path_factory.mktemp("cuda")
    source = folder / "alone.cu"
    source.write_text(SOURCE)
    targets = [
        "-gencode=arch=compute_" + ptx + ",code=[" + ",".join(f"sm_{t}" for t in codes) + "]"
        for ptx, codes in TARGETS.items()
    ]
    command = [nvcc, "-O3", "-std=c++20", "-Xptxas=-v", "--threads=2", f"-I{CSRC}", *targets]
    command += ["-Werror=all-warnings", "-fatbin", "-o", str(folder / "alone.fatbin"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return usages(result.stderr)


def test_every_kernel_is_compiled_for_every_target(compiled: list[Usage]) -> None:
    targets = {code for codes in TARGETS.values() for code in codes}
    assert {u.target for u in compiled} == targets
    assert {u.kernel for u in compiled} == RESIDENT.keys() | {"merge_parts_kernel"}
    # 3 dtypes of each, and one kernel that merges
    assert len(compiled) == len(targets) * (3 * len(RESIDENT) + 1)


def test_no_spills_and_no_local_memory(compiled: list[Usage]) -> None:
    assert [u for u in compiled if u.local] == []


def test_registers_leave_room_for_the_planned_blocks(compiled: list[Usage]) -> None:
    allocated = {u: -(-u.registers // 8) * 8 for u in compiled}  # handed out in eights
    crowded = [u for u in compiled if allocated[u] * RESIDENT.get(u.kernel, 64) > REGISTERS]
    assert crowded == []
