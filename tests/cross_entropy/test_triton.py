"""The Triton cross-entropy without a GPU: its machine code by reading.

Its values: tests/test_triton_interpreter.py and, compiled, tests/ptx.

Nothing here runs on a GPU.  Compiled kernels are checked for what the toolchain tells: that they
compile for every target, that no register spills, and that rows are moved by 128-bit instructions
wherever they start.
"""

from __future__ import annotations

import pytest
import torch

_triton = pytest.importorskip(
    "kernels._triton", reason="triton is not installed", exc_type=ImportError
)
from kernels.cross_entropy import triton as backend  # noqa: E402
from kernels.cross_entropy import triton_linear  # noqa: E402
from kernels.cross_entropy import triton_plan as plan  # noqa: E402
from tests.cross_entropy import linear_cases  # noqa: E402
from tests.ptx.cross_entropy_cases import EVERYTHING, PLAIN, SOFT, Options  # noqa: E402
from tests.triton_code import moves, spilled  # noqa: E402

# (classes, dtype, options): whole sectors, spans of 4 and of 8 warps, powers of two; rows swept by
# eight warps; every option at once, and probabilities, where registers ran out first.
VARIANTS = [
    (96, torch.bfloat16, EVERYTHING),
    (255, torch.float32, EVERYTHING),
    (1001, torch.float16, EVERYTHING),
    (256, torch.bfloat16, SOFT),
    (32000, torch.bfloat16, PLAIN),
    (
        50257,
        torch.float32,
        Options(0.1, 1e-3, 6.0, weighted=True, dlse=True, probabilities=torch.float32),
    ),
]


def compiled(target: str, classes: int, dtype: torch.dtype, options: Options, rows: int = 64):
    """Every kernel that a forward and a backward launch on `target`."""
    logits = torch.empty(rows, classes, dtype=dtype)
    labels = torch.zeros(rows, dtype=torch.int64)
    if options.probabilities is not None:
        labels = torch.empty(rows, classes, dtype=options.probabilities)
    weight = torch.empty(classes) if options.weighted else None
    dlse = torch.empty(rows) if options.dlse else None
    arguments = options.arguments(labels, weight)
    with _triton.compile_only(target) as kernels:
        _, lse, *_ = backend.forward(logits, *arguments)
        backend.backward(
            torch.empty(rows), dlse, logits, *arguments, lse, (True, False), options.inplace
        )
    return kernels


# By default every target compiles its turn of the variants.
TURNS = [
    pytest.param(target, *variant, marks=() if n == turn % len(VARIANTS) else pytest.mark.sweep)
    for turn, target in enumerate(_triton.TARGETS)
    for n, variant in enumerate(VARIANTS)
]


@pytest.mark.parametrize(("target", "classes", "dtype", "options"), TURNS, ids=str)
def test_compiles_without_spills(target, classes, dtype, options):
    kernels = compiled(target, classes, dtype, options)
    assert len(kernels) >= 2
    assert spilled(kernels) == {}


def compiled_linear(target: str, dtype: torch.dtype, case: linear_cases.Case):
    """Every kernel of linear + cross-entropy without logits."""
    problem = linear_cases.make_problem(300, 1000, 512, dtype, case)
    dlse = torch.empty(300) if case.dlse else None
    with _triton.compile_only(target) as kernels:
        _, lse, *_ = triton_linear.forward(problem)
        triton_linear.backward(problem, torch.empty(300), dlse, lse, (True, True, case.bias))
    return kernels


LINEAR = linear_cases.Case()
LINEAR_EVERYTHING = linear_cases.Case(linear_cases.EVERYTHING, True, True, True)


@pytest.mark.parametrize(("target", "dtype", "case"), [
    ("sm_90", torch.bfloat16, LINEAR),
    ("gfx942", torch.bfloat16, LINEAR_EVERYTHING),
    *(
        pytest.param(target, dtype, case, marks=pytest.mark.sweep)
        for target in _triton.TARGETS
        for dtype in (torch.bfloat16, torch.float16)
        for case in (LINEAR, LINEAR_EVERYTHING)
    ),
], ids=str)  # fmt: skip
def test_linear_compiles_without_spills(target, dtype, case):
    kernels = compiled_linear(target, dtype, case)
    assert len(kernels) == 4  # forward, merge, and the gradient of rows and of classes
    assert spilled(kernels) == {}
    if (target, dtype) == ("sm_90", torch.bfloat16):
        for kernel in kernels:
            multiplies = "wgmma.mma_async" in kernel.file("ptx").read_text()
            assert multiplies == (kernel.name != "merge_kernel")


@pytest.mark.parametrize("classes", [32000, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_move_in_128_bit_vectors_wherever_they_start(dtype, classes):
    for options in (PLAIN, Options(inplace=True)):
        for kernel in compiled("sm_90", classes, dtype, options):
            if "rows" not in kernel.name:
                continue
            count = moves(kernel)
            assert count["ld128"] == plan.SWEEP_ELEMENTS * dtype.itemsize // 16
            if "backward" in kernel.name:
                # Those of the gradient, and of an ignored row's zeros.
                assert count["st128"] == 2 * count["ld128"]


def test_tiles_move_in_128_bit_vectors():
    for kernel in compiled("sm_80", 96, torch.bfloat16, PLAIN):
        count = moves(kernel)
        assert count["ld128"] > 0
        assert count.get("ld16", 0) == count.get("st16", 0) == 0


def test_spans_move_in_128_bit_vectors():
    """Elements one by one are those that the last span has beyond its vectors."""
    for kernel in compiled("sm_80", 77, torch.bfloat16, PLAIN):
        count = moves(kernel)
        assert count["ld128"] == count["ld16"] // 8
        assert count.get("st128", 0) == count.get("st16", 0) // 8


def test_numbers_are_no_reason_to_compile_again():
    with _triton.compile_only("sm_80") as kernels:
        for rows, classes in [(1, 9000), (16, 12000), (17, 16384)]:
            arguments = (None, -100, 0.0, 0.5 * rows, 0.0, 1.0 * rows, False)
            logits, target = torch.empty(rows, classes), torch.zeros(rows, dtype=torch.int64)
            _, lse, *_ = backend.forward(logits, target, *arguments)
            mask = (True, False)
            backend.backward(torch.empty(rows), None, logits, target, *arguments, lse, mask, False)
    names = [kernel.name for kernel in kernels]
    # Rows few enough to be cut into parts are merged by a kernel of their own.
    assert sorted(set(names)) == ["_backward_rows_kernel", "_forward_rows_kernel", "merge_kernel"]
    assert names.count("_forward_rows_kernel") == names.count("_backward_rows_kernel") == 1


def test_refused():
    logits, target = torch.randn(2, 8), torch.tensor([1, 2])
    rest = (None, -100, 0.0, 0.0, 0.0, 1.0, False)
    assert "not on a GPU" in backend.unsupported(logits, target, *rest)
    assert "float64" in backend.unsupported(logits.double(), target, *rest)
    with _triton.compile_only("sm_80"):
        assert backend.unsupported(logits.bfloat16(), target, *rest) is None
        soft = torch.rand(2, 8, requires_grad=True)
        assert "gradient" in backend.unsupported(logits, soft, *rest)
        assert "float16" in backend.unsupported(logits, soft.detach().half(), *rest)
        expanded = torch.randn(1, 1).expand(1, 2**30 + 1)
        assert "classes" in backend.unsupported(expanded, target[:1], *rest)
