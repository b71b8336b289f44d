"""Every CUDA kernel of the package (csrc/<op>/module_cuda.cu) is one that the executor can run:
nothing in the PTX that nvcc makes of it is left to be reported when a thread gets there."""

from __future__ import annotations

import re

import pytest

from ptx import build
from ptx.translate import split_kernels, translate
from tests.ptx.conftest import ARCHS

FOR_THE_SWEEP = {("attention", "sm_100a")}  # its code is that of sm_90a, half a minute of nvcc


def forms(ptx: str) -> set[str]:
    """The instructions without what tells two of one form apart: numbers and parameters' names."""
    found = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*\s+[^;]*);", ptx, re.MULTILINE)
    split = (re.sub(r"\w+_param_\d+", "parameter", line).split(maxsplit=1) for line in found)
    number = r"\b0[fdx][0-9A-Fa-f]+|\d+"
    return {f"{opcode} {re.sub(number, '#', ' '.join(rest))}" for opcode, *rest in split}


@pytest.mark.parametrize(
    "every_kernel", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["forms", "kernels"]
)
@pytest.mark.parametrize(
    ("op", "arch"),
    [
        pytest.param(op, arch, marks=[pytest.mark.sweep] * ((op, arch) in FOR_THE_SWEEP))
        for op in build.op_sources()
        for arch in ARCHS
    ],
)
def test_no_instruction_is_unsupported(op: str, arch: str, every_kernel: bool) -> None:
    """By default only of kernels that have a form of instruction which none before them had."""
    seen: set[str] = set()
    for name, kernel in split_kernels(build.nvcc_ptx(build.op_sources()[op], arch)).items():
        new = forms(kernel) - seen
        if new or every_kernel:
            assert translate(kernel).unsupported == {}, name
        seen |= new
    assert any(form.startswith("st.global.") for form in seen)
