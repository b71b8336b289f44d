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
TARGETS = ("80", "86", "89", "90a", "100a", "120a")
REGISTERS = 65536  # of a multiprocessor, on every target
# Threads that the persistent kernels expect to be resident, by columns per thread and elements per
# chunk (1: not vectorised): forward_threads and backward_threads of csrc/layer_norm/cuda.cuh.
RESIDENT = {
    ("forward_rows_kernel", 8, True): 1024,
    ("forward_rows_kernel", 8, False): 768,
    ("forward_rows_kernel", 16, True): 704,
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
        numbers = re.search(r"(\d+) bytes stack.*?(\d+) bytes spill.*?(\d+) bytes spill", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert head, entry
        assert numbers, entry
        assert registers, entry
        kernel = re.search(r"\d([a-z_]+_kernel)", head["name"])
        assert kernel, head["name"]
        integers = tuple(int(n) for n in re.findall(r"Li(\d+)E", head["name"]))
        local = sum(int(n) for n in numbers.groups())
        found.append(Usage(kernel[1], head["target"], integers, int(registers[1]), local))
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    source = folder / "alone.cu"
    source.write_text('#include "layer_norm/cuda.cuh"\n')
    targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS]
    command = [nvcc, "-O3", "-std=c++20", "-Xptxas=-v", "--threads=2", f"-I{CSRC}", *targets]
    command += ["--cubin", "-o", str(folder / "alone"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return usages(result.stderr)
