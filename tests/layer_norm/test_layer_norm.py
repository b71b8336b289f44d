"""Values and gradients of layer norm, in every implementation that runs on this CPU.

The oracle is F.layer_norm in float64; the tolerance is the rule in tests/tolerance.py.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch
from kernels.layer_norm import layer_norm, reference
from kernels.layer_norm.op import choose
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("y", "dx", "dweight", "dbias")

# (rows, cols): one element, less than a vector, one vector and its neighbours for every instruction
# set, primes, GPT widths, many short rows, few long ones, and both sides of the chunk of 16384.
SIZES = [
    (1, 1),
    (5, 1),
    (3, 3),
    (2, 4),
    (3, 7),
    (4, 8),
    (7, 15),
    (3, 16),
    (5, 17),
    (2, 31),
    (3, 63),
    (3, 64),
    (2, 65),
    (33, 127),
    (70, 768),
    (33, 1000),
    (3, 1021),
    (2000, 8),
    (4099, 5),
    (2, 16383),
    (3, 16384),
    (2, 16385),
    (70, 16400),
    (1, 100_003),
]


def gradients(output: Tensor, leaves: list[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(output, wanted, dy))
    return [None if leaf is None else next(found) for leaf in leaves]


def results(function, tensors, shape, dy, dtype=None, eps=1e-5) -> list[Tensor | None]:
    """The output and the gradients of x, weight and bias (None where there is none)."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
    ]
    x, weight, bias = leaves
    y = function(x, shape, weight, bias, eps)
    return [y, *gradients(y, leaves, dy.to(y.dtype))]


def terms(x, shape, weight, dy, eps, rounded_input) -> list[float]:
    """The sizes of what y, dx, dweight and dbias are summed from: dx of few columns cancels.

    `rounded_input` adds what a change of x in its last place does to each: of two nearly equal
    columns nothing more can be asked.
    """
    if not x.numel():
        return [0.0] * 4
    mean, rstd = reference.row_statistics(x.detach().double(), shape, eps).view(2, -1)
    lost = 1.0 + ((mean.abs() * rstd).max().item() if rounded_input else 0.0)
    largest_weight = 1.0 if weight is None else weight.detach().abs().max().item()
    size = dy.abs().max().item() * lost
    return [largest_weight * (lost - 1), size * rstd.max().item() * largest_weight, size, size]


def check(x, shape, weight, bias, dy, eps=1e-5, rounded_input=False) -> None:
    tensors = (x, weight, bias)
    ours = results(layer_norm, tensors, shape, dy, eps=eps)
    assert ours[0].dtype == x.dtype
    assert ours[0].shape == x.shape
    assert ours[0].is_contiguous()
    for gradient, leaf in zip(ours[1:], tensors, strict=True):
        assert leaf is None or gradient.dtype == leaf.dtype
    # PyTorch takes fewer mixes of dtypes; its error is that of the input's dtype.
    torchs = results(F.layer_norm, tensors, shape, dy, dtype=x.dtype, eps=eps)
    exact = results(F.layer_norm, tensors, shape, dy, dtype=torch.float64, eps=eps)
    sizes = terms(x, shape, weight, dy, eps, rounded_input)
    assert_as_exact_as_torch(ours, torchs, exact, NAMES, sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_values_and_gradients(implementation, rows, cols, dtype):
    x = (torch.randn(rows, cols) * 3 + torch.randn(rows, 1)).to(dtype)
    weight, bias, dy = (torch.randn(*s).to(dtype) for s in ((cols,), (cols,), (rows, cols)))
    check(x, (cols,), weight, bias, dy)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("cols", [48, 16_400])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_parameters(implementation, dtype, cols, has_weight, has_bias):
    x, dy = torch.randn(6, cols).to(dtype), torch.randn(6, cols).to(dtype)
    weight = torch.randn(cols).to(dtype) if has_weight else None
    bias = torch.randn(cols).to(dtype) if has_bias else None
    check(x, (cols,), weight, bias, dy)


@pytest.mark.parametrize("cols", [40, 16_401])
@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes(dtype, weight_dtype, bias_dtype, cols):
    x, dy = torch.randn(9, cols).to(dtype), torch.randn(9, cols).to(dtype)
    weight, bias = torch.randn(cols).to(weight_dtype), torch.randn(cols).to(bias_dtype)
    tensors = (x, weight, bias)
    ours = results(layer_norm, tensors, (cols,), dy)
    exact = results(F.layer_norm, tensors, (cols,), dy, dtype=torch.float64)
    torchs = results(F.layer_norm, tensors, (cols,), dy, dtype=dtype)
    assert [t.dtype for t in ours] == [dtype, dtype, weight_dtype, bias_dtype]
    assert_as_exact_as_torch(ours, torchs, exact, NAMES)


def test_mixed_dtypes_in_every_implementation(implementation):
    x, dy = torch.randn(9, 40).bfloat16(), torch.randn(9, 40).bfloat16()
    check(x, (40,), torch.randn(40), torch.randn(40).half(), dy)


@pytest.mark.parametrize(
    ("lead", "shape"),
    [
        ((), (5,)),
        ((), (2, 3, 4)),
        ((4,), (1,)),
        ((2, 3), (4, 5)),
        ((2, 1, 3), (7,)),
        ((2,), (3, 1, 5, 2)),
    ],
)
def test_any_rank_of_normalized_shape(implementation, lead, shape):
    x, dy = torch.randn(*lead, *shape), torch.randn(*lead, *shape)
    check(x, shape, torch.randn(*shape), torch.randn(*shape), dy)


@pytest.mark.parametrize("size", [(0, 5), (3, 0), (2, 0, 5), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_input(implementation, size, dtype):
    shape = size[-1:]
    x, dy = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    ours = results(layer_norm, (x, weight, bias), shape, dy)
    assert [tuple(t.shape) for t in ours] == [size, size, shape, shape]
    assert all(t.dtype == dtype for t in ours)
    assert all(bool((t == 0).all()) for t in ours[2:])  # sums over no rows


STRIDED = {
    "transposed": lambda: torch.randn(24, 10).t(),
    "every other column": lambda: torch.randn(10, 48)[:, ::2],
    "part of longer rows": lambda: torch.randn(10, 31)[:, 3:27],
    "offset by one element": lambda: torch.randn(241)[1:].view(10, 24),
    "expanded rows": lambda: torch.randn(1, 24).expand(10, 24),
    "expanded columns": lambda: torch.randn(10, 1).expand(10, 24),
    "reversed": lambda: torch.randn(10, 24).flip(0),
    "channels last": lambda: torch.randn(2, 24, 5, 3).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(5, 24, 2).permute(2, 0, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", STRIDED)
def test_any_strides_of_input_and_gradient(implementation, view, dtype):
    x, dy = STRIDED[view]().to(dtype), STRIDED[view]().to(dtype)
    shape = x.shape[-1:]
    parameters = torch.randn(*shape, 2).to(dtype)
    check(x, shape, parameters[..., 0], parameters[..., 1], dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [300, 16_390])
def test_mean_far_from_zero(implementation, dtype, cols):
    x = (torch.randn(5, cols) + 1e3).to(dtype)
    check(x, (cols,), torch.randn(cols).to(dtype), None, torch.randn(5, cols).to(dtype))


def test_constant_rows_have_no_variance(implementation):
    x = torch.tensor([[2.0] * 33, [0.0] * 33, [-1e4] * 33])
    check(x, (33,), torch.randn(33), torch.randn(33), torch.randn(3, 33))


@pytest.mark.parametrize("eps", [1e-12, 0.0, 1.0, 1e-3])
def test_eps(implementation, eps):
    x = torch.randn(4, 50) * 1e-3
    check(x, (50,), torch.randn(50), torch.randn(50), torch.randn(4, 50), eps=eps)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [37, 16_390])
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(
    implementation, value, dtype, cols
):
    x, weight = torch.randn(3, cols).to(dtype), torch.randn(cols).to(dtype)
    x[1, cols // 2] = value
    y = layer_norm(x, (cols,), weight)
    want = F.layer_norm(x.double(), (cols,), weight.double())
    assert y[1].isnan().all()
    assert torch.equal(y.isnan(), want.isnan())


@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
@pytest.mark.parametrize("cols", [20, 16_385])
def test_only_the_gradients_asked_for(implementation, asked, cols):
    tensors = [torch.randn(40, cols), torch.randn(cols), torch.randn(cols)]
    dy = torch.randn(40, cols)
    exact = results(F.layer_norm, tensors, (cols,), dy, dtype=torch.float64)
    torchs = results(F.layer_norm, tensors, (cols,), dy)
    leaves = [t.clone().requires_grad_(bool(a)) for t, a in zip(tensors, asked, strict=True)]
    layer_norm(leaves[0], (cols,), leaves[1], leaves[2]).backward(dy)
    for leaf, wanted, theirs, want, name in zip(
        leaves, asked, torchs[1:], exact[1:], NAMES[1:], strict=True
    ):
        assert (leaf.grad is not None) == bool(wanted), name
        if wanted:
            assert_as_exact_as_torch([leaf.grad], [theirs], [want], [name])


@pytest.mark.parametrize("cols", [100, 20_000])
def test_statistics_mean_the_same_in_every_implementation(implementation, cols):
    """float32, the means and then the rstds, so that another backend's backward can use them."""
    for dtype in DTYPES:
        x = (torch.randn(2, 3, cols) * 2 + 1).to(dtype)
        backend = choose(x, (cols,), None, None)
        y, statistics = backend.forward(x, (cols,), None, None, 1e-5)
        assert statistics.dtype == torch.float32
        assert statistics.shape == (2 * 6,)
        mean, rstd = statistics.double().view(2, 2, 3)
        torch.testing.assert_close(mean, x.double().mean(-1), rtol=1e-5, atol=1e-6)
        want_rstd = 1 / torch.sqrt(x.double().var(-1, correction=0) + 1e-5)
        torch.testing.assert_close(rstd, want_rstd, rtol=1e-5, atol=0)


@pytest.mark.parametrize("forward_backend", ["reference", "eager", "cpu"])
def test_backward_takes_another_backends_statistics(implementation, forward_backend):
    x, dy = torch.randn(6, 70), torch.randn(6, 70)
    weight, bias = torch.randn(70), torch.randn(70)
    tensors = (x, weight, bias)
    with dispatch.use(forward_backend):
        first = choose(x, (70,), weight, bias)
        y, statistics = first.forward(x, (70,), weight, bias, 1e-5)
    second = choose(x, (70,), weight, bias)
    ours = second.backward(dy, x, (70,), weight, bias, statistics, (True, True, True))
    exact = results(F.layer_norm, tensors, (70,), dy, dtype=torch.float64)
    assert_as_exact_as_torch([y, *ours], results(F.layer_norm, tensors, (70,), dy), exact, NAMES)


def test_inputs_are_not_written(implementation):
    tensors = [torch.randn(8, 30), torch.randn(30), torch.randn(30), torch.randn(8, 30)]
    copies = [t.clone() for t in tensors]
    x, weight, bias, dy = tensors
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    versions = [t._version for t in tensors]
    torch.autograd.grad(layer_norm(x, (30,), weight, bias), leaves, dy)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))
    assert [t._version for t in tensors] == versions


@pytest.mark.parametrize(("rows", "cols"), [(4096, 96), (300, 1000), (3, 50_000), (70, 17_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_equal_for_any_number_of_threads(rows, cols, dtype):
    x, dy = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
    weight, bias = torch.randn(cols).to(dtype), torch.randn(cols).to(dtype)
    before = torch.get_num_threads()
    runs = []
    try:
        with dispatch.use("cpu"):
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                runs.append(results(layer_norm, (x, weight, bias), (cols,), dy))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_call(lead, shape, dtype, has_weight, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    x, dy = normal(*lead, *shape), normal(*lead, *shape)
    weight = normal(*shape) if has_weight else None
    bias = normal(*shape) if has_bias else None
    check(x, tuple(shape), weight, bias, dy, rounded_input=True)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    rows, cols = 2**17 + 1, 2**14
    x = torch.zeros(rows, cols, dtype=torch.bfloat16)
    x[-1] = torch.randn(cols)
    y = layer_norm(x, (cols,))
    want = F.layer_norm(x[-1].double(), (cols,))
    assert_as_exact_as_torch([y[-1]], [F.layer_norm(x[-1], (cols,))], [want], ["last row"])
    assert not y[0].any()
