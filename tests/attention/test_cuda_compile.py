"""Attention's CUDA kernels through the real compiler, no GPU needed: no spills and no local
memory. That tiles fit into the shared memory of every target is asserted in the sources.

The PTX is the executor's, from its cache. By default one target; the others in the sweep.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ptx import build
from tests.layer_norm.test_cuda_compile import Usage, usages

SOURCE = build.CSRC / "attention" / "module_cuda.cu"
# Machine code -> the PTX it is made of.
TARGETS = {"80": "80", "86": "80", "89": "80", "90a": "90a", "100a": "100a", "120a": "120a"}
DEFAULT = "90a"
CLASSES = {64, 128, 256}  # head dimensions
KERNELS = {"forward_kernel", "dquery_kernel", "dkey_dvalue_kernel", "decode_kernel"}
ROW_KERNELS = {"delta_kernel", "combine_kernel", "dsinks_kernel", "globals_kernel"}
# Blocks that the registers of a multiprocessor must hold: two of 128 threads, four of 64.
REGISTERS_PER_THREAD = 255


@pytest.fixture(
    scope="module",
    params=[
        target if target == DEFAULT else pytest.param(target, marks=pytest.mark.sweep)
        for target in TARGETS
    ],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """What ptxas says of each kernel for one target."""
    folder = tmp_path_factory.mktemp("cuda")
    text = folder / "kernels.ptx"
    text.write_text(build.nvcc_ptx(SOURCE, f"sm_{TARGETS[request.param]}"))
    ptxas = Path(build.nvcc()).resolve().with_name("ptxas")
    command = [ptxas, "-v", f"-arch=sm_{request.param}", text, "-o", folder / "kernels.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return usages(result.stderr)


def test_every_kernel_is_compiled(compiled: list[Usage]) -> None:
    assert {u.kernel for u in compiled} == KERNELS | ROW_KERNELS
    # three dtypes of every class, of delta and of combine
    assert len(compiled) == 3 * len(CLASSES) * len(KERNELS) + 3 * 2 + 2
    assert {u.integers for u in compiled if u.kernel in KERNELS} == {(c,) for c in CLASSES}


def test_no_spills_and_no_local_memory(compiled: list[Usage]) -> None:
    assert [u for u in compiled if u.local] == []
    assert max(u.registers for u in compiled) <= REGISTERS_PER_THREAD
