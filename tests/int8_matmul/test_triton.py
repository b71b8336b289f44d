"""The Triton int8 matmul without a GPU: its machine code by reading.

Its values: tests/test_triton_interpreter.py and, compiled, tests/ptx.

Nothing here runs on a GPU.  Compiled kernels are checked for what the toolchain tells: that they
compile for every target, that no register spills, which tensor instructions multiply and how wide
the matrices are read.
"""

from __future__ import annotations

import re

import pytest
import torch

_triton = pytest.importorskip(
    "kernels._triton", reason="triton is not installed", exc_type=ImportError
)
from kernels.int8_matmul import triton as backend  # noqa: E402
from kernels.int8_matmul import triton_plan as plan  # noqa: E402
from kernels.int8_matmul.rows import triton as rows_backend  # noqa: E402
from tests.triton_code import moves, spilled  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ARCHITECTURES = dict(zip(_triton.TARGETS, ("sm_80", "sm_90", "sm_100", "sm_86"), strict=False))
FLOATS = {2: BF16, 4: FP32}  # by the bytes of an element


def swept(parameter):
    return pytest.param(parameter, marks=pytest.mark.sweep)


def swept_but(*default):
    """All targets, those not in `default` in the sweep."""
    return [target if target in default else swept(target) for target in _triton.TARGETS]


def product(target, m, n, k, dtype=torch.int8, activation="gelu", by_columns=False):
    """The product's kernel, with every argument there is."""
    x = torch.empty(m, k, dtype=dtype)
    weight = torch.empty((k, n) if by_columns else (n, k), dtype=torch.int8)
    x_scale, mode = (torch.empty(m), "int8") if dtype == torch.int8 else (None, "weight_only")
    vectors = torch.empty(n), torch.empty(n, dtype=BF16)
    with _triton.compile_only(target) as kernels:
        weight = weight.t() if by_columns else weight
        backend.forward(x, weight, x_scale, *vectors, activation, mode, BF16)
    return kernels[0]


# (target, bytes of an element, row of its table): by default the largest tile of each size on one
# target or two, where registers run out first; all of them in the sweep.
TILES = [
    (target, size, row)
    for target in _triton.TARGETS
    for size, rows in plan.TILES[ARCHITECTURES.get(target, "gfx942")].items()
    for row in rows
]
DEFAULT = [
    (target, size, plan.TILES[ARCHITECTURES.get(target, "gfx942")][size][0])
    for target, size in [("sm_80", 1), ("sm_90", 4), ("gfx942", 2)]
]


def with_tile(monkeypatch, target, size, row):
    architecture = ARCHITECTURES.get(target, "gfx942")
    monkeypatch.setitem(plan.TILES, architecture, plan.TILES[architecture] | {size: (row,)})


def check_tile(monkeypatch, target, size, row, by_columns):
    plain, rows = row[:2]
    with_tile(monkeypatch, target, size, row)
    activation = "none" if plain else "gelu"
    for n, k in ((512, 512), (500, 500))[: 1 if plain else 2]:  # vectors of 16 bytes, and of 4
        dtype = FLOATS.get(size, torch.int8)
        kernel = product(target, rows, n, k, dtype, activation, by_columns)
        assert kernel.name == "product_kernel"
        assert kernel.metadata.num_warps == row[4]
        assert spilled([kernel]) == {}, f"N = {n}, K = {k}"


@pytest.mark.parametrize(("target", "size", "row"), DEFAULT, ids=str)
def test_largest_tiles_compile_without_spills(monkeypatch, target, size, row):
    check_tile(monkeypatch, target, size, row, by_columns=target == "gfx942")


@pytest.mark.sweep
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(("target", "size", "row"), TILES, ids=str)
def test_every_tile_compiles_without_spills(monkeypatch, target, size, row, by_columns):
    check_tile(monkeypatch, target, size, row, by_columns)


@pytest.mark.parametrize("dtype", [torch.int8, swept(FP32)], ids=str)
@pytest.mark.parametrize("target", swept_but("sm_80"))
def test_narrow_rows_compile_without_spills(target, dtype):
    for by_columns in (False, True):
        assert spilled([product(target, 16, 501, 503, dtype, by_columns=by_columns)]) == {}


# The longest rows that are held, with vectors and without; rows that are swept; short ones.
ROWS = [(8192, FP32), (8191, BF16), (16392, FP32)]
ROWS += [
    pytest.param(*row, marks=pytest.mark.sweep) for row in [(16384, BF16), (4095, FP32), (64, BF16)]
]


@pytest.mark.parametrize(("cols", "dtype"), ROWS)
@pytest.mark.parametrize("target", swept_but("sm_90"))
def test_rows_compile_without_spills(target, cols, dtype):
    x, weight = torch.empty(max(4, 4096 // cols), cols, dtype=dtype), torch.empty(cols)
    with _triton.compile_only(target) as kernels:
        rows_backend.forward(x, True, weight, weight, 1e-5)
        rows_backend.forward(x, False, None, None, 0.0)
    assert spilled(kernels) == {}


@pytest.mark.parametrize(
    ("target", "m", "dtype", "instruction"),
    [
        ("sm_80", 512, torch.int8, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        ("sm_90", 512, torch.int8, "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"),
        ("sm_90", 512, BF16, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
        ("sm_90", 512, FP32, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"),
        ("sm_90", 1, torch.int8, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
    ],
)
def test_tensor_cores_multiply_what_is_copied_in_vectors(target, m, dtype, instruction):
    kernel = product(target, m, 512, 512, dtype)
    ptx = kernel.file("ptx").read_text()
    assert instruction in ptx
    assert "cp.async.cg.shared.global" in ptx
    assert not re.search(r"cp\.async\.ca|ld\.global\.b8", ptx)


def test_no_tf32_instead_of_float32():
    """Triton 3.7 makes tf32 of a float32 product on sm_100, whatever precision is asked for."""
    assert "tf32" not in product("sm_100", 512, 512, 512, FP32).file("ptx").read_text()


def test_rows_move_in_128_bit_vectors():
    with _triton.compile_only("sm_90") as kernels:
        rows_backend.forward(torch.empty(64, 1000, dtype=BF16), True, None, None, 1e-5)
    count = moves(kernels[0])
    assert count["ld128"] > 0
    assert not {"ld16", "ld32", "st8"} & set(count)


def test_numbers_are_no_reason_to_compile_again():
    with _triton.compile_only("sm_80") as kernels:
        for m, n, k in [(1, 8, 36), (3, 24, 100), (16, 40, 1028)]:
            x, weight = torch.empty(m, k), torch.empty(n, k, dtype=torch.int8)
            scales = torch.empty(1), torch.empty(1 if n == 8 else n)
            backend.forward(x.char(), weight, *scales, None, "none", "int8", FP32)
    assert [kernel.name for kernel in kernels] == ["product_kernel"]


def test_refused():
    x, weight = torch.randn(2, 8), torch.zeros(3, 8, dtype=torch.int8)
    scale = torch.ones(3)

    def asked(x=x, bias=None, mode="dynamic", out_dtype=FP32):
        return backend.unsupported(x, weight, None, scale, bias, "none", mode, out_dtype)

    assert "not on a GPU" in asked()
    assert "not on a GPU" in rows_backend.unsupported(x, False, None, None, 0.0)
    with _triton.compile_only("sm_80"):
        assert asked() is None
        assert asked(x.char(), mode="raw", out_dtype=torch.int32) is None
        assert "not one of int8" in asked(mode="raw", out_dtype=torch.int32)
        assert "float64" in asked(x.double())
        assert "bias is torch.float64" in asked(bias=scale.double())
        assert "out_dtype torch.float64" in asked(out_dtype=torch.float64)
        assert "float64" in rows_backend.unsupported(x.double(), False, None, None, 0.0)
