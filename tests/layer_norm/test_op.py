"""Layer norm as a citizen of PyTorch: errors, autograd, compile, autocast, transforms, module."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import _native, dispatch
from kernels.layer_norm import LayerNorm, cpu, layer_norm, op
from tests.tolerance import assert_as_exact_as_torch

X = torch.randn(3, 5)

# name: (arguments, what the message must contain).  PyTorch refuses each of these too.
REFUSED = {
    "input not a tensor": (([1.0, 2.0], (2,)), "input"),
    "input None": ((None, (2,)), "input"),
    "input integer": ((torch.ones(2, 5, dtype=torch.int64), (5,)), "input is torch.int64"),
    "input bool": ((torch.ones(2, 5, dtype=torch.bool), (5,)), "input is torch.bool"),
    "input complex": ((torch.ones(2, 5, dtype=torch.complex64), (5,)), "input is torch.complex64"),
    "input float8": ((torch.ones(2, 5).to(torch.float8_e4m3fn), (5,)), "input is torch.float8"),
    "normalized_shape empty": ((X, ()), "normalized_shape is empty"),
    "normalized_shape wrong": ((X, (4,)), r"normalized_shape=\[4\] expects .* \[\*, 4\]"),
    "normalized_shape too long": ((X, (1, 3, 5)), "normalized_shape"),
    "normalized_shape negative": ((X, (-1,)), "normalized_shape"),
    "normalized_shape int": ((X, 5), "normalized_shape must be a tuple or list"),
    "normalized_shape str": ((X, "5"), "normalized_shape must be a tuple or list"),
    "normalized_shape tensor": ((X, torch.tensor([5])), "normalized_shape must be a tuple or list"),
    "normalized_shape of float": ((X, (5.0,)), "normalized_shape must hold ints"),
    "0-dim input": ((torch.tensor(1.0), (1,)), "normalized_shape"),
    "weight shape": ((X, (5,), torch.ones(4)), "weight must have shape"),
    "bias shape": ((X, (5,), torch.ones(5), torch.ones(1, 5)), "bias must have shape"),
    "weight not a tensor": ((X, (5,), [1.0] * 5), "weight must be a Tensor"),
    "bias not a tensor": ((X, (5,), None, 1.0), "bias must be a Tensor"),
    "weight integer": ((X, (5,), torch.ones(5, dtype=torch.int64)), "weight is torch.int64"),
    "weight elsewhere": ((X, (5,), torch.ones(5, device="meta")), "weight is on meta"),
    "bias elsewhere": ((X, (5,), None, torch.ones(5, device="meta")), "bias is on meta"),
    "eps str": ((X, (5,), None, None, "1e-5"), "eps must be a float"),
    "eps None": ((X, (5,), None, None, None), "eps must be a float"),
    "eps list": ((X, (5,), None, None, [1e-5]), "eps must be a float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_pytorchs_and_name_the_argument(name):
    arguments, message = REFUSED[name]
    with pytest.raises(Exception, match=r".") as theirs:
        F.layer_norm(*arguments)
    with pytest.raises(theirs.type, match=message):
        layer_norm(*arguments)


@pytest.mark.parametrize("shape", [[5], torch.Size([5]), (torch.tensor(5),)], ids=repr)
@pytest.mark.parametrize("eps", [1, True, 1e-3, torch.tensor(1e-3)], ids=repr)
def test_what_pytorch_takes_is_taken(shape, eps):
    torch.testing.assert_close(
        layer_norm(X, shape, None, None, eps), F.layer_norm(X, tuple(shape), None, None, eps)
    )


def test_keyword_arguments_are_pytorchs():
    keywords = {"input": X, "normalized_shape": (5,), "weight": X[0], "bias": X[1], "eps": 0.1}
    torch.testing.assert_close(layer_norm(**keywords), F.layer_norm(**keywords))


def test_default_dtype_and_device_do_not_matter():
    want = layer_norm(X, (5,))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(layer_norm(X, (5,)), want)
    finally:
        torch.set_default_dtype(torch.float32)


def leaves(dtype=torch.float64, rows=4, cols=6):
    sizes = ((rows, cols), (cols,), (cols,))
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradcheck_and_gradgradcheck(backend):
    def function(x, weight, bias):
        return layer_norm(x, (2, 3), weight.view(2, 3), bias.view(2, 3))

    x, weight, bias = leaves()
    inputs = (x.detach().view(4, 2, 3).requires_grad_(), weight, bias)
    with dispatch.use(backend):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
        assert torch.autograd.gradcheck(lambda x: layer_norm(x, (6,)), leaves()[:1])
        assert torch.autograd.gradgradcheck(lambda x: layer_norm(x, (6,)), leaves()[:1])


def test_second_derivative_of_the_fused_kernel(implementation):
    """A gradient penalty, in float32, against the same in float64."""

    def penalty(function, tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        y = function(tensors[0], (6,), *tensors[1:])
        (dx,) = torch.autograd.grad((y * y.exp()).sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), tensors[:2])

    tensors = leaves(torch.float32)
    exact = penalty(F.layer_norm, [t.double() for t in tensors])
    names = ("x", "weight")
    assert_as_exact_as_torch(
        penalty(layer_norm, tensors), penalty(F.layer_norm, tensors), exact, names
    )


def test_float64_stays_float64():
    x, weight, bias = leaves()
    assert dispatch.explain("layer_norm", x, (6,), weight, bias).backend == "eager"
    torch.testing.assert_close(
        layer_norm(x, (6,), weight, bias), F.layer_norm(x, (6,), weight, bias)
    )


def test_calls_taken_without_questions_are_those_that_pass_every_check():
    """The C++ answer to `_check` and `unsupported`: never a number where one of them refuses."""
    x = torch.randn(3, 6)
    nothing = types.SimpleNamespace(shape=(6,), dtype=torch.float32, is_cpu=True)
    inputs = [x, x.double(), x.bfloat16(), x.long(), x.to("meta"), x[0], torch.randn(()), None]
    inputs += [torch.randn(6, 3).T, x[:0]]
    shapes = [(6,), (3, 6), [6], (5,), (), (6, 3), (True,), (2**70,), torch.Size([6]), "6", None]
    parameters = [None, torch.ones(6), torch.nn.Parameter(torch.ones(6).half()), torch.ones(3, 6)]
    parameters += [torch.ones(5), torch.ones(6).double(), torch.ones(6, device="meta"), nothing]
    parameters += [torch.ones(12)[::2]]
    taken = 0
    for call in itertools.product(inputs, shapes, parameters, parameters, [1e-5, 1, None]):
        rows = op._rows(*call)
        if not rows:
            continue
        taken += 1
        assert rows == call[0].numel() // math.prod(call[1])
        shape, eps = op._check(*call)
        assert (shape, eps) == (call[1], call[4])
        assert cpu.unsupported(*call) is None
    # x and its bfloat16 copy with (6,) and 3 parameters each, or with (3, 6) and 2; x[0] with (6,).
    usual = 2 * (3 * 3 + 2 * 2) + 3 * 3
    assert taken == usual
    with pytest.raises(TypeError, match="number of arguments"):
        op._rows(x)


def test_native_entry_points_refuse_what_they_cannot_read():
    x, y = torch.randn(2, 4), torch.empty(2, 4)
    with pytest.raises(TypeError, match="float32, bfloat16 and float16"):
        _native.cpu.layer_norm_forward(x.double(), 2, 4, None, None, 1e-5, y, None)
    with pytest.raises(TypeError):
        _native.cpu.layer_norm_forward(x, "2", 4, None, None, 1e-5, y, None)
    with pytest.raises(AttributeError):
        _native.cpu.layer_norm_forward([1.0], 2, 4, None, None, 1e-5, y, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", [True, False])
def test_opcheck(dtype, parameters):
    x, weight, bias = (t.detach() for t in leaves(dtype))
    if not parameters:
        weight = bias = None
    forward = torch.ops.kernels.layer_norm_forward.default
    torch.library.opcheck(forward, (x, (6,), weight, bias, 1e-5))
    _, statistics = forward(x, (6,), weight, bias, 1e-5)
    backward = torch.ops.kernels.layer_norm_backward.default
    for mask in ((True, True, True), (True, False, False), (False, True, True)):
        dy = torch.randn_like(x)
        torch.library.opcheck(backward, (dy, x, (6,), weight, bias, statistics, mask))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_graph_break(dtype, dynamic):
    def step(x, weight, bias):
        return layer_norm(x * 2, (6,), weight, bias).sin()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7) if dynamic else (4,):
        tensors = leaves(dtype, rows=rows)
        got, want = compiled(*tensors), step(*tensors)
        dy = torch.randn_like(want)
        torch.testing.assert_close(got, want)
        for g, w in zip(
            torch.autograd.grad(got, tensors, dy),
            torch.autograd.grad(want, tensors, dy),
            strict=True,
        ):
            torch.testing.assert_close(g, w)


def test_compiled_code_calls_the_fused_op_in_both_directions():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    module = torch.compile(LayerNorm(6), fullgraph=True, backend=backend)
    module(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert "kernels.layer_norm_forward" in graphs[0]
    assert "kernels.layer_norm_backward" in graphs[1]


def test_compiles_with_inductor():
    module = LayerNorm(6)
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    want = torch.autograd.grad(module(x).square().sum(), (x, module.weight, module.bias))
    got = torch.autograd.grad(compiled(x).square().sum(), (x, module.weight, module.bias))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_autocast_is_pytorchs(input_dtype):
    ours, theirs = LayerNorm(5), nn.LayerNorm(5)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(X.to(input_dtype)), theirs(X.to(input_dtype))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_saved_tensors_are_seen_by_hooks_and_checkpoint():
    x, weight, bias = leaves(torch.float32)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        layer_norm(x, (6,), weight, bias)
    assert len(packed) == 2  # x and weight

    def function(x):
        return layer_norm(x, (6,), weight, bias).sin()

    want = torch.autograd.grad(function(x).sum(), (x, weight))
    for reentrant in (False, True):
        y = checkpoint(function, x, use_reentrant=reentrant)
        y.sum().backward()
        torch.testing.assert_close(x.grad, want[0])
        x.grad = None


def test_saved_tensors_hooks_may_give_back_other_strides():
    x, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((5, 6), (6,), (6,)))
    want = torch.autograd.grad(F.layer_norm(x, (6,), weight, bias).sin().sum(), (x, weight, bias))

    def strided(t):
        return torch.stack((t, t), -1)[..., 0]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
        y = layer_norm(x, (6,), weight, bias)
    got = torch.autograd.grad(y.sin().sum(), (x, weight, bias))
    torch.testing.assert_close(got, want)


def test_changing_an_input_before_backward_is_an_error():
    x, weight, bias = leaves(torch.float32)
    y = layer_norm(x, (6,), weight, bias)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_function_transforms_run_pytorchs_op():
    x, weight, bias = (t.detach() for t in leaves(torch.float32))

    def loss(x, function):
        return function(x, (6,), weight, bias).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        got, want = transform(loss)(x, layer_norm), transform(loss)(x, F.layer_norm)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("compiled", [False, True])
def test_vmap(compiled):
    x, weight, bias = (t.detach() for t in leaves(torch.float32))

    def rows(x):
        return torch.func.vmap(lambda row: layer_norm(row, (6,), weight, bias))(x)

    function = torch.compile(rows, fullgraph=True, backend="eager") if compiled else rows
    torch.testing.assert_close(function(x), F.layer_norm(x, (6,), weight, bias))


def test_forward_mode_differentiation():
    x, tangent = torch.randn(2, 4, 6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(layer_norm(dual, (6,))).tangent
        want = torch.autograd.forward_ad.unpack_dual(F.layer_norm(dual, (6,))).tangent
    torch.testing.assert_close(got, want)


def test_tensor_subclasses_may_override():
    class Traced(torch.Tensor):
        calls: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            cls.calls.append(function.__name__)
            return super().__torch_function__(function, types, arguments, keywords or {})

    y = layer_norm(X.as_subclass(Traced), (5,))
    assert Traced.calls == ["layer_norm"]
    assert isinstance(y, Traced)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), layer_norm(X, (5,)))


def test_runs_under_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = LayerNorm(5)(torch.randn(3, 5))
        assert y.shape == (3, 5)
    assert layer_norm(X.to("meta"), (5,)).shape == (3, 5)


MODULES = [
    ((5,), {}),
    (([3, 5],), {}),
    ((5, 1e-3), {}),
    ((5,), {"elementwise_affine": False}),
    ((5,), {"bias": False}),
    ((5,), {"dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("arguments", "keywords"), MODULES, ids=repr)
def test_module_is_nn_layer_norm_but_for_its_forward(arguments, keywords):
    ours, theirs = LayerNorm(*arguments, **keywords), nn.LayerNorm(*arguments, **keywords)
    assert isinstance(ours, nn.LayerNorm)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = X.to(keywords.get("dtype", torch.float32))
    want = theirs(x)
    torch.testing.assert_close(ours(x), want)
    torch.testing.assert_close(copy.deepcopy(ours)(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(x), want)


def test_module_of_integers_is_refused_with_the_accepted_dtypes():
    with pytest.raises(RuntimeError, match=r"dtype is torch\.int64; accepted are float32"):
        LayerNorm(5, dtype=torch.int64)


def test_module_converts_and_moves():
    module = LayerNorm(5).to(torch.bfloat16)
    assert module(X.bfloat16()).dtype == torch.bfloat16
    assert module.to("meta")(X.bfloat16().to("meta")).device.type == "meta"
