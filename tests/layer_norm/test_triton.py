"""The Triton layer norm without a GPU: its machine code by reading.

Its values: tests/test_triton_interpreter.py and, compiled, tests/ptx.

Nothing here runs on a GPU.  Compiled kernels are checked for what the toolchain tells: that they
compile for every target, that no register spills, and that rows are moved by 128-bit instructions.
"""

from __future__ import annotations

import pytest
import torch

_triton = pytest.importorskip(
    "kernels._triton", reason="triton is not installed", exc_type=ImportError
)
from kernels.layer_norm import triton as backend  # noqa: E402
from tests.triton_code import moves, spilled  # noqa: E402

ALL = (True, True, True)

# (cols, dtype of x, dtype of the parameters): on each target one by turns: vectors, lanes to
# spare, none, the widest row that is held.
VARIANTS = [
    (1000, torch.bfloat16, torch.float32),
    (7, torch.float32, torch.float32),
    (1001, torch.float16, torch.float16),
    (16384, torch.float32, torch.float32),
]
# And rows that are swept, and what is widest of its kind, where registers ran out first, on the
# target where it takes most of those that it may have.
TIGHT = {
    (16385, torch.bfloat16, torch.bfloat16): "sm_90",
    (1000, torch.float32, torch.float32): "sm_100",
    (4095, torch.bfloat16, torch.float32): "sm_90",
    (8192, torch.float32, torch.float32): "sm_120",
    (8191, torch.float32, torch.float32): "sm_90",
}
COMPILED = [
    pytest.param(target, *variant, marks=[pytest.mark.sweep] * (v != t % len(VARIANTS)))
    for t, target in enumerate(_triton.TARGETS)
    for v, variant in enumerate(VARIANTS)
]
COMPILED += [
    pytest.param(target, *variant, marks=[pytest.mark.sweep] * (target != tightest))
    for variant, tightest in TIGHT.items()
    for target in _triton.TARGETS
]


def compiled(target, cols, dtype, parameters=None, rows=None, masks=(ALL,)):
    """Every kernel that a forward and these backward calls launch on `target`."""
    x = torch.empty(rows or max(64, cols // 16), cols, dtype=dtype)
    statistics = torch.empty(2 * x.shape[0])
    weight = torch.empty(cols, dtype=parameters or dtype)
    with _triton.compile_only(target) as kernels:
        backend.forward(x, (cols,), weight, weight, 1e-5)
        for mask in masks:
            backend.backward(x, x, (cols,), weight, weight, statistics, mask)
    return kernels


@pytest.mark.parametrize(("target", "cols", "dtype", "parameters"), COMPILED)
def test_compiles_without_spills(target, cols, dtype, parameters):
    masks = (ALL, (True, False, False), (False, True, True))
    kernels = compiled(target, cols, dtype, parameters, masks=masks)
    assert len(kernels) >= 3
    assert spilled(kernels) == {}


@pytest.mark.parametrize(("target", "cols"), [("sm_80", 8192), ("gfx942", 16384), ("sm_90", 16385)])
def test_few_rows_take_separate_kernels(target, cols):
    kernels = compiled(target, cols, torch.bfloat16, rows=4)
    long = "" if _triton.resident(backend.RESIDENT_COLS, cols, _triton.vector(cols)) else "_long"
    names = [f"_forward{long}_kernel", f"_backward{long}_kernel", "_sum_rows_kernel"]
    assert [kernel.name for kernel in kernels] == names
    assert spilled(kernels) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cols", [1000, 1024, 16392])
def test_rows_move_in_128_bit_vectors(dtype, cols):
    for kernel in compiled("sm_90", cols, dtype, masks=((True, False, False),)):
        count = moves(kernel)
        scalars = 4 if "backward" in kernel.name else 0  # mean and rstd
        assert count["ld128"] > 0
        assert count["st128"] > 0
        assert count.get("ld16", 0) == count.get("st16", 0) == 0
        assert count.get("ld32", 0) <= scalars


def test_odd_rows_move_element_by_element():
    forward = compiled("sm_80", 1001, torch.bfloat16)[0]
    assert set(moves(forward)) == {"ld16", "st16", "st32"}


def test_numbers_are_no_reason_to_compile_again():
    weight = torch.empty(64)
    with _triton.compile_only("sm_80") as kernels:
        for rows, eps in [(1, 1e-5), (16, 1.0), (17, 0.0), (1000, 1e-6)]:
            backend.forward(torch.empty(rows, 64), (64,), weight, weight, eps)
        for cols in (40, 48, 56):
            backend.forward(torch.empty(3, cols), (cols,), weight[:cols], weight[:cols], 1e-5)
    assert len(kernels) == 1


def test_refused():
    x = torch.randn(2, 8)
    assert "not on a GPU" in backend.unsupported(x, (8,), None, None)
    assert "float64" in backend.unsupported(x.double(), (8,), None, None)
    with _triton.compile_only("sm_80"):
        assert backend.unsupported(x.bfloat16(), (8,), None, None) is None
