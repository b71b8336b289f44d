"""int8_matmul and int8_linear as citizens of PyTorch: autograd, compile, transforms, threads."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import _native, dispatch
from kernels.int8_matmul import (
    Quantized,
    dequantize,
    int8_linear,
    int8_matmul,
    layer_norm_quantize,
    quantize,
)
from kernels.int8_matmul import calls as calls_module
from tests.tolerance import assert_as_exact_as_torch

A = torch.randint(-128, 128, (3, 6), dtype=torch.int8)
B = torch.randint(-128, 128, (6, 4), dtype=torch.int8)
ONE = torch.ones(())
X = torch.randn(3, 6)
WEIGHT = quantize(torch.randn(4, 6))


def variants(*options):
    return itertools.product(*options)


def test_the_shortest_way_is_for_calls_that_are_right():
    """What is_plain accepts, linear_call accepts, too, and leaves as it is."""
    taken = 0
    zero_point = Quantized(*WEIGHT[:2], torch.zeros(4, 1).int())
    inputs = [X, X[None], X.double(), X[:, :5], X.t(), X.int(), quantize(X), None]
    weights = [WEIGHT, tuple(WEIGHT), zero_point, Quantized(B.t(), ONE), quantize(X, 0), None]
    biases = [None, X[0, :4].clone(), torch.randn(4, 2)[:, 0], X[0], X[0, :4].double(), 1.0]
    options = [("dynamic", None), ("weight_only", "relu"), ("static", None), ("dynamic", [])]
    for x, weight, bias, (mode, activation) in variants(inputs, weights, biases, options):
        call = x, weight, bias, mode, activation, None, None
        if not calls_module.is_plain(*call):
            continue
        taken += 1
        made = calls_module.linear_call(*call)
        for one, other in ((x, made.x), (weight.values, made.weight), (bias, made.bias)):
            assert one is other or one.data_ptr() == other.data_ptr()
        assert made.x.stride() == (6, 1)
        assert made.weight_scale.data_ptr() == weight.scale.data_ptr()
        assert made.mode == mode
        assert made.out_dtype == x.dtype
    assert taken == 2 * 2 * 2  # X in two shapes, WEIGHT, two biases, two options


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "static"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_dequantised_weight(implementation, dtype, activation, mode):
    """With x + constant for the rounded x: in float64 the same from PyTorch's ops."""
    x, weight = torch.randn(2, 5, 40).to(dtype), quantize(torch.randn(9, 40))
    bias, dy = torch.randn(9).to(dtype), torch.randn(2, 5, 9).to(dtype)
    x_scale = torch.tensor(0.02) if mode == "static" else None
    act = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu}.get(
        activation, lambda y: F.gelu(y, approximate="tanh")
    )

    def torch_gradients(wide):
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, bias)]
        rounded = x.to(wide)
        if mode == "dynamic":
            rounded = dequantize(quantize(x), wide)
        elif mode == "static":
            rounded = (x.float() / x_scale).round().clamp(-127, 127).to(wide) * x_scale.to(wide)
        straight = leaves[0] + (rounded - leaves[0]).detach()
        y = act(F.linear(straight, dequantize(weight, wide), leaves[1]))
        return torch.autograd.grad(y, leaves, dy.to(wide))

    leaves = [t.detach().requires_grad_() for t in (x, bias)]
    y = int8_linear(leaves[0], weight, leaves[1], mode, activation, x_scale=x_scale)
    got = torch.autograd.grad(y, leaves, dy)
    theirs = [g.to(dtype) for g in torch_gradients(dtype)]
    assert_as_exact_as_torch(got, theirs, torch_gradients(torch.float64), ("dx", "dbias"))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
def test_second_derivatives_without_rounding(activation):
    """gradcheck needs a smooth function: weight_only in float64 is one."""
    weight = quantize(torch.randn(4, 6))
    leaves = torch.randn(3, 6).double(), torch.randn(4).double()
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)

    def function(x, bias):
        return int8_linear(x, weight, bias, "weight_only", activation)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_second_derivative_of_the_kernel(implementation, mode):
    x = torch.randn(5, 40, requires_grad=True)
    y = int8_linear(x, quantize(torch.randn(9, 40)), None, mode, "gelu")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


def test_only_what_is_asked_for_is_differentiated():
    x = torch.randn(5, 6, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    assert torch.autograd.grad(int8_linear(x, WEIGHT).sum(), x)[0].shape == x.shape
    (dbias,) = torch.autograd.grad(int8_linear(X, WEIGHT, bias).sum(), bias)
    assert torch.equal(dbias, torch.full((4,), 3.0))
    (dbias,) = torch.autograd.grad(int8_matmul(A, B, ONE, ONE, bias).sum(), bias)
    assert torch.equal(dbias, torch.full((4,), 3.0))
    assert not int8_linear(X, WEIGHT).requires_grad
    with torch.no_grad():
        assert not int8_linear(x, WEIGHT, bias).requires_grad


def test_groups_and_zero_points_run_on_the_dequantised_weight():
    float_weight = torch.randn(9, 12)
    for options in ({"group_size": 4}, {"symmetric": False}):
        weight = quantize(float_weight, **options)
        x = torch.randn(2, 3, 12, requires_grad=True)
        got = int8_linear(x, weight, None, "weight_only", "relu")
        torch.testing.assert_close(got, F.linear(x, dequantize(weight)).relu())
        assert torch.autograd.grad(got.sum(), x)[0].shape == x.shape
        with pytest.raises(ValueError, match="groups or zero points"):
            dispatch.explain("int8_matmul", X.new_zeros(2, 12), weight, mode="weight_only")


def test_float64_is_computed_in_float64():
    x, weight = torch.randn(3, 40).double(), quantize(torch.randn(9, 40))
    got = int8_linear(x, weight, None, "weight_only")
    torch.testing.assert_close(got, x @ dequantize(weight, torch.float64).t())
    assert int8_linear(x, weight).dtype == torch.float64
    a, b = WEIGHT.values, WEIGHT.values.t()
    scale = torch.full((), 1 / 3)
    got = int8_matmul(a, b, scale, scale, out_dtype=torch.float64)
    torch.testing.assert_close(got, (a.long() @ b.long()) * scale.double() ** 2)


def calls():
    x, bias = torch.randn(2, 5, 40), torch.randn(9)
    weight = quantize(torch.randn(9, 40))
    a = torch.randint(-128, 128, (7, 40), dtype=torch.int8)
    return {
        "dynamic": lambda: int8_linear(x, weight, bias, "dynamic", "gelu"),
        "weight_only": lambda: int8_linear(x, weight, bias, "weight_only"),
        "static": lambda: int8_linear(x, weight, None, "static", x_scale=torch.tensor(0.1)),
        "raw": lambda: int8_matmul(a, weight.values.t()),
        "scaled": lambda: int8_matmul(
            a, weight.values.t(), torch.rand(7), weight.scale[:, 0], bias, "relu", torch.bfloat16
        ),
        "norm": lambda: int8_linear(layer_norm_quantize(x, 40), weight, bias),
        "quantize": lambda: quantize(x).values,
    }


@pytest.mark.parametrize("name", calls())
def test_compiled_whole(name):
    torch._dynamo.reset()
    call = calls()[name]
    torch.manual_seed(1)
    want = call()
    torch.manual_seed(1)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(got, want)


def test_compiled_training_and_new_sizes():
    torch._dynamo.reset()
    weight, bias = quantize(torch.randn(9, 40)), torch.randn(9, requires_grad=True)

    def step(x):
        return int8_linear(x, weight, bias, "dynamic", "gelu").square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 8):
        x = torch.randn(rows, 40, requires_grad=True)
        want = torch.autograd.grad(step(x), (x, bias))
        got = torch.autograd.grad(compiled(x), (x, bias))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["raw", "int8", "dynamic", "static", "weight_only"])
def test_opcheck(mode):
    is_int8 = mode in ("raw", "int8")
    x = torch.randint(-9, 9, (3, 6), dtype=torch.int8) if is_int8 else torch.randn(3, 6)
    x_scale = {"int8": torch.rand(3), "static": torch.rand(1)}.get(mode)
    scale, bias = (None, None) if mode == "raw" else (torch.rand(4), torch.rand(4))
    out_dtype = torch.int32 if mode == "raw" else torch.bfloat16
    call = x, WEIGHT.values, x_scale, scale, bias, "none", mode, out_dtype
    torch.library.opcheck(torch.ops.kernels.int8_matmul_forward, call)


@pytest.mark.parametrize("normalized", [True, False])
def test_opcheck_of_rows(normalized):
    call = torch.randn(3, 6), normalized, torch.rand(6), None, 1e-5
    torch.library.opcheck(torch.ops.kernels.int8_matmul_rows_forward, call)


def test_meta_and_fake_tensors():
    x, weight = X.to("meta"), Quantized(*(t.to("meta") for t in WEIGHT[:2]))
    for mode in ("dynamic", "weight_only"):
        got = int8_linear(x, weight, None, mode, out_dtype=torch.bfloat16)
        assert got.is_meta
        assert (got.shape, got.dtype) == ((3, 4), torch.bfloat16)
    assert quantize(x).scale.is_meta
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert int8_linear(torch.randn(3, 6), WEIGHT).shape == (3, 4)


def test_transforms_run_pytorchs_ops():
    x, weight, bias = torch.randn(5, 6), quantize(torch.randn(4, 6)), torch.randn(4)

    def total(x, bias):
        return int8_linear(x, weight, bias, "dynamic", "gelu").sum()

    leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
    want = torch.autograd.grad(total(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(total, (0, 1))(x, bias), want)
    rows = torch.vmap(lambda row: int8_linear(row, weight, bias))(x)
    torch.testing.assert_close(rows, int8_linear(x, weight, bias))
    _, tangent = torch.func.jvp(lambda x: int8_linear(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, x @ dequantize(weight).t())
    _, tangent = torch.func.jvp(lambda x: quantize(x).scale, (x,), (x,))
    assert (tangent == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_chooses_the_results_dtype_as_for_linear(dtype):
    with torch.autocast("cpu", dtype):
        assert int8_linear(X, WEIGHT).dtype == F.linear(X, dequantize(WEIGHT)).dtype == dtype
        assert int8_linear(X.double(), WEIGHT).dtype == torch.float64
        assert int8_linear(quantize(X), WEIGHT).dtype == torch.float32
    want = int8_linear(X, WEIGHT)
    with torch.autocast("cpu", dtype):
        assert torch.equal(int8_linear(X, WEIGHT), want.to(dtype))  # x itself is not rounded


def test_checkpointing():
    x = torch.randn(3, 6, requires_grad=True)
    y = checkpoint(int8_linear, x, WEIGHT, use_reentrant=False)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, torch.autograd.grad(int8_linear(x, WEIGHT).sum(), x)[0])


def test_default_dtype_and_device_do_not_matter(implementation):
    weight, bias = torch.randn(4, 6), torch.randn(4)

    def results():
        quantized = quantize(weight)
        rows = layer_norm_quantize(X, 6)
        return [
            *(*quantized[:2], *rows[:2], int8_linear(X, quantized, bias)),
            *(int8_linear(rows, quantized), int8_matmul(A, B), dequantize(quantized)),
            *quantize(weight, 0, symmetric=False),
        ]

    want = results()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_threads_of_the_caller(implementation):
    """Calls from several threads at once do not share scratch memory."""
    x, weight = torch.randn(40, 300), quantize(torch.randn(70, 300))
    want, wrong = int8_linear(x, weight), []

    def work():
        for _ in range(10):
            if not torch.equal(int8_linear(x, weight), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_torch_function_mode_sees_the_call():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        int8_linear(X, WEIGHT)
        int8_matmul(A, B)
        layer_norm_quantize(X, 6)
    assert {int8_linear, int8_matmul, layer_norm_quantize} <= set(seen)


@pytest.mark.skipif(isinstance(_native.cpu, str), reason="the C++ module is not built")
def test_explain():
    assert dispatch.explain("int8_matmul", X, WEIGHT, None, "weight_only").backend == "cpu"
    assert dispatch.explain("int8_matmul", A, B).backend == "cpu"
    assert dispatch.explain("int8_matmul", x=X, quantized_weight=WEIGHT).backend == "cpu"
    assert dispatch.explain("int8_matmul.rows", X, 6).backend == "cpu"
    decision = dispatch.explain("int8_matmul", X.double(), WEIGHT)
    assert decision.backend == "eager"
    assert "torch.float64" in str(decision.refusals["cpu"])
