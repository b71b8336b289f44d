"""The CUDA kernels through the real compiler, no GPU needed: no spills, no local memory, and few
enough registers for the grids that csrc/layer_norm/cuda.cuh plans."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
# PTX version -> machine code; 80, 86 and 89 from one PTX, which saves a third of the time.
TARGETS = {"80": ("80", "86", "89"), "90a": ("90a",), "100a": ("100a",), "120a": ("120a",)}
SOURCE = """
#include "layer_norm/cuda.cuh"
using namespace kernels;
void use(const layer_norm::ForwardArgs& f, const layer_norm::BackwardArgs& b) {
  layer_norm::forward(f, DType::kFloat32, {1, nullptr});
  layer_norm::backward(b, DType::kFloat32, nullptr, {1, nullptr});
}
"""
REGISTERS = 65536  # of a multiprocessor, on every target
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


class Usage(NamedTuple):
    kernel: str
    target: str
    integers: tuple[int, ...]  # template arguments: elements per chunk, columns per thread
    registers: int
    local: int  # bytes of stack and spills


def usages(ptxas: str) -> list[Usage]:
    """What `ptxas -v` says of each kernel and target."""
    found = []
    for entry in ptxas.split("Compiling entry function ")[1:]:
        head = re.match(r"'(?P<name>\S+)' for 'sm_(?P<target>\w+)'", entry)
        memory = re.search(r"(\d+) bytes stack.*?(\d+) bytes spill.*?(\d+) bytes spill", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert head, entry
        assert memory, entry
        assert registers, entry
        kernel = re.search(r"\d([a-z]+(?:_[a-z]+\d*)*_kernel)", head["name"])
        assert kernel, head["name"]
        integers = tuple(int(n) for n in re.findall(r"Li(\d+)E", head["name"]))
        local = sum(int(n) for n in memory.groups())
        found.append(Usage(kernel[1], head["target"], integers, int(registers[1]), local))
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    source = folder / "alone.cu"
    source.write_text(SOURCE)
    targets = [
        "-gencode=arch=compute_" + ptx + ",code=[" + ",".join(f"sm_{t}" for t in codes) + "]"
        for ptx, codes in TARGETS.items()
    ]
    command = [nvcc, "-O3", "-std=c++20", "-Xptxas=-v", "--threads=2", f"-I{CSRC}", *targets]
    command += ["-fatbin", "-o", str(folder / "alone.fatbin"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return usages(result.stderr)


def test_every_kernel_is_compiled_for_every_target(compiled: list[Usage]) -> None:
    targets = {code for codes in TARGETS.values() for code in codes}
    assert {u.target for u in compiled} == targets
    kernels = {(u.kernel, u.integers) for u in compiled}
    assert {name for name, *_ in RESIDENT} < {name for name, _ in kernels}
    # 3 dtypes of x times 5 row classes each way, 3 sweeping or column kernels, and one reduction
    assert len(compiled) == len(targets) * (3 * (2 * 5 + 3 * 2) + 1)


def test_no_spills_and_no_local_memory(compiled: list[Usage]) -> None:
    assert [u for u in compiled if u.local] == []


def test_registers_leave_room_for_the_planned_blocks(compiled: list[Usage]) -> None:
    crowded = []
    for usage in compiled:
        if usage.kernel.endswith("_rows_kernel"):
            vec, items = usage.integers
            allocated = -(-usage.registers // 8) * 8  # handed out in eights
            if allocated * RESIDENT[usage.kernel, items, vec > 1] > REGISTERS:
                crowded.append(usage)
    assert crowded == []
