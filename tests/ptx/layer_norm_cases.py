"""What the layer norm's tests on the executor share: where a dtype runs, and the sharpest inputs.

With random inputs one lost element of a long row changes its mean by less than bfloat16 rounds.
`check_sharp` has x = 3 ± 1, and gradients that are 2 ± 3 with the same signs once they are
multiplied by the weights: both directions that the backward removes, so dx is nearly 0 unless an
element of a sum is lost, doubled or taken from elsewhere; the statistics and, with float32
parameters, dweight and dbias are seen in float32 whatever the dtype of x. Weights are powers of two
and all inputs short fractions, so that nothing is rounded before the kernel sees it.
The mutation test (ptx/mutate.py) showed the need: half of its mutants of long rows had survived.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layer_norm import reference
from kernels.layer_norm.op import choose
from tests.ptx.conftest import DEFAULT_ARCHS

EPS = 1e-5

# ---- what runs by default; the full product runs under the marker `sweep`
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
(CUDA_ARCH,) = DEFAULT_ARCHS["layer_norm"]


def cuda_in_turn(dtype: torch.dtype, cols: int) -> bool:
    """Whether CUDA's kernel for rows of this length runs by default: every one in bfloat16, and
    again in float32 where its vectors are others, in float16 where it has none."""
    elements = 4 if dtype == FP32 else 8  # of a vector
    return dtype == BF16 or (cols % elements == 0) == (dtype == FP32)


# Of Triton's kernels, which are other ones for each power of two that holds a row, from 8 up, and
# for rows that are swept.
TRITON_DTYPES = (FP32, FP16, BF16, FP32, BF16, FP32, FP16, BF16, FP32, FP16, BF16, FP32, FP32)
TRITON_ARCHS = ("sm_80", "sm_90a")


def tile_of(cols: int) -> int:
    """The number of the power of two that holds a row, from 8 up."""
    return min(max(0, (cols - 1).bit_length() - 3), len(TRITON_DTYPES) - 1)


def in_turn(cols: int) -> bool:
    """Whether Triton's kernel for rows of this length runs by default.

    Of two neighbouring tiles one runs with vectors and one without, so that either code meets each
    switch; the rows of up to 128, which are swept by their length, and swept rows run with both.
    """
    tile, vectors = tile_of(cols), cols % 8 == 0
    return tile in (4, len(TRITON_DTYPES) - 1) or vectors == bool(tile % 2)


def compiled_in_turn(shapes: Sequence[tuple[int, int]]) -> list[object]:
    """These (rows, cols) as parameters; `sweep` where their kernel does not run by default."""
    return [
        pytest.param(*shape, marks=[pytest.mark.sweep] * (not in_turn(shape[1])))
        for shape in shapes
    ]


def triton_setting(cols: int) -> tuple[str, torch.dtype, torch.dtype]:
    """Architecture, dtype, and dtype of the parameters for rows of this length."""
    tile = tile_of(cols)
    dtype = TRITON_DTYPES[tile]
    return TRITON_ARCHS[tile // 2 % 2], dtype, FP32 if tile % 2 else dtype


def swept_setting(vec: int) -> tuple[str, torch.dtype, torch.dtype]:
    """As above, for rows that are swept in vectors of `vec` elements."""
    return TRITON_ARCHS[0], BF16 if vec in (2, 4) else FP32, FP32


# ---- the sharpest inputs


def balanced_signs(rows: int, cols: int) -> Tensor:
    """±1 in a random order, as many of each in a row as an odd length allows."""
    order = torch.rand(rows, cols).argsort(1)
    return torch.where(order % 2 == 0, 1.0, -1.0)


def check_sharp(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,  # as the weight's
    *,
    present: tuple[bool, bool] = (True, True),  # weight and bias
    wanted: tuple[bool, bool, bool] = (True, True, True),  # dx, dweight, dbias
) -> None:
    """Forward and backward of the backend in use against float64, inside a session."""
    signs = balanced_signs(rows, cols)
    scale = torch.ones(cols)
    if present[0]:
        scale = 2.0 ** torch.randint(-1, 2, (cols,)) * balanced_signs(1, cols)[0]
    shift = torch.randint(-4, 5, (cols,)) / 4 * present[1]
    x, dy = (3 + signs).to(dtype), ((2 + 3 * signs) / scale).to(dtype)
    weight, bias = scale.to(weight_dtype), shift.to(bias_dtype or weight_dtype)
    given = [p if there else None for p, there in zip((weight, bias), present, strict=True)]

    backend = choose(x, (cols,), *given)
    y, statistics = backend.forward(x, (cols,), *given, EPS)
    gradients = backend.backward(dy, x, (cols,), *given, statistics, wanted)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact_y = F.layer_norm(leaves[0], (cols,), leaves[1], leaves[2], EPS)
    exact = torch.autograd.grad(exact_y, leaves, dy.double())
    exact_statistics = reference.row_statistics(x.double(), (cols,), EPS)
    xhat = F.layer_norm(x.double(), (cols,), eps=EPS)

    assert_near("statistics", statistics, exact_statistics, 1e-6)
    assert_near("y", y, exact_y.detach(), 4e-6)
    assert [gradient is not None for gradient in gradients] == list(wanted)
    # What is added up, of which dx is the small rest.
    terms = (
        5.0,
        (dy.double() * xhat).abs().sum(0).max().item(),
        dy.double().abs().sum(0).max().item(),
    )
    for name, found, right, size in zip(
        ("dx", "dweight", "dbias"), gradients, exact, terms, strict=True
    ):
        if found is not None:
            assert_near(name, found, right, 2e-6 * size)


def assert_near(name: str, found: Tensor, right: Tensor, tolerance: float) -> None:
    """Up to `tolerance`, of values below 1 absolutely, plus the rounding to its own dtype."""
    error = (found.double().reshape(right.shape) - right).abs()
    rounding = torch.finfo(found.dtype).eps * right.abs().max()
    allowed = tolerance * right.abs().clamp(min=1) + rounding
    worst = (error - allowed).argmax()
    where = f"{name}: error {error.view(-1)[worst]:.2e}, allowed {allowed.view(-1)[worst]:.2e}"
    assert (error <= allowed).all(), where
