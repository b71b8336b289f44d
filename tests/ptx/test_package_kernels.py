"""Every CUDA kernel of the package (csrc/<op>/module_cuda.cu) is one that the executor can run:
nothing in the PTX that nvcc makes of it is left to be reported when a thread gets there."""

from __future__ import annotations

import pytest

from ptx import build
from ptx.translate import translate
from tests.ptx.conftest import ARCHS


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", build.op_sources())
def test_no_instruction_is_unsupported(op: str, arch: str) -> None:
    text = build.nvcc_ptx(build.op_sources()[op], arch)
    assert ".entry" in text
    assert translate(text).unsupported == {}
