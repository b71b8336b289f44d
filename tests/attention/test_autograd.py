"""Attention as a citizen of PyTorch: autograd, compile, autocast, transforms, subclasses."""

from __future__ import annotations

import functools
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from kernels import dispatch
from kernels.attention import op
from kernels.attention import scaled_dot_product_attention as attention
from tests.tolerance import assert_as_exact_as_torch

Q, K, V = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))
SINKS = torch.randn(4)


def leaves(dtype=torch.float64, grad=True):
    shapes = ((1, 4, 3, 5), (1, 2, 6, 5), (1, 2, 6, 4), (3, 6), (4,))
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


FORMULAS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (1, 2), "global_tokens": 1, "causal_alignment": "lower_right"},
    "softcap, alibi": {"softcap": 1.5, "alibi_slopes": torch.rand(4)},
    "dropout": {"dropout_p": 0.4, "seed": 3},
}


@pytest.mark.parametrize("keywords", FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradcheck_and_gradgradcheck(backend, keywords):
    def function(q, k, v, mask, sinks):
        given = None if keywords.get("is_causal") else mask
        return attention(q, k, v, given, enable_gqa=True, sinks=sinks, return_lse=True, **keywords)

    inputs = leaves()
    if keywords.get("is_causal"):
        inputs[3] = inputs[3].detach()
    with dispatch.use(backend):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_second_derivative_of_rows_that_see_nothing():
    q, k, v, _, _ = leaves()
    mask = torch.rand(3, 6) > 0.4
    mask[1] = False

    def function(q, k, v):
        return attention(q, k, v, mask, enable_gqa=True)

    assert torch.autograd.gradgradcheck(function, (q, k, v), fast_mode=True)


def test_a_loss_of_lse_alone_and_of_neither():
    q, k, v, _, sinks = leaves()
    _, lse = attention(q, k, v, enable_gqa=True, sinks=sinks, return_lse=True)
    found = torch.autograd.grad(lse.square().sum(), (q, k, sinks), retain_graph=True)
    scores = q @ k.repeat_interleave(2, 1).transpose(-2, -1) * 5**-0.5
    columns = torch.cat((scores, sinks[:, None, None].expand(1, 4, 3, 1)), -1)
    wanted = torch.autograd.grad(columns.logsumexp(-1).square().sum(), (q, k, sinks))
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w)
    (nothing,) = torch.autograd.grad(lse.sum(), v)
    assert not nothing.any()


def backend_call(dtype=torch.float32, **keywords):
    q, k, v, _, _ = leaves(dtype, grad=False)
    return op.backend_arguments(q, k, v, enable_gqa=True, **keywords)


OPCHECKS = [
    {"is_causal": True, "sinks": torch.randn(4)},
    {"attn_mask": torch.rand(3, 6) > 0.5, "window": (2, 2)},
    {"dropout_p": 0.5, "seed": 1, "alibi_slopes": torch.rand(4), "softcap": 2.0},
]


@pytest.mark.parametrize("keywords", OPCHECKS, ids=range(len(OPCHECKS)))
def test_opcheck(keywords):
    call = backend_call(**keywords)
    forward = torch.ops.kernels.attention_forward.default
    torch.library.opcheck(forward, call)
    out, lse = forward(*call)
    backward = torch.ops.kernels.attention_backward.default
    mask = (True, "sinks" in keywords, True, False, "sinks" in keywords)
    dlse = torch.randn_like(lse) if "softcap" in keywords else None
    torch.library.opcheck(backward, (torch.randn_like(out), dlse, *call, out, lse, mask))


COMPILED = {
    "plain": {},
    "causal": {"is_causal": True},
    "all": {"window": (2, 1), "softcap": 2.0, "alibi_slopes": torch.rand(4), "global_tokens": 1},
    "dropout": {"dropout_p": 0.3, "seed": 5},
}


BY_DEFAULT = [("plain", True), ("causal", False), ("all", False), ("dropout", True)]
REST = [(name, not dynamic) for name, dynamic in BY_DEFAULT]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*BY_DEFAULT, *(pytest.param(*both, marks=pytest.mark.sweep) for both in REST)],
)
def test_compiles_without_a_graph_break(name, dynamic):
    keywords = COMPILED[name]

    def step(q, k, v, sinks):
        out, lse = attention(q * 2, k, v, enable_gqa=True, sinks=sinks, return_lse=True, **keywords)
        return out.sin(), lse

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for _ in range(2):
        q, k, v, _, sinks = leaves(torch.float32)
        given = (q, k, v, sinks)
        got, want = compiled(*given), step(*given)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        found, wanted = (
            torch.autograd.grad(out.sum() + lse.cos().sum(), given) for out, lse in (got, want)
        )
        for g, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(g, w)


def test_compiles_where_one_tensor_is_query_key_and_value():
    x = torch.randn(1, 2, 5, 8, requires_grad=True)

    def step(x):
        return attention(x, x, x, is_causal=True).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,), (want,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x)
    torch.testing.assert_close(got, want)


def test_a_compiled_mask_gets_its_gradient():
    q, k, v, mask, _ = leaves(torch.float32)
    function = functools.partial(attention, enable_gqa=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(q, k, v, mask).sin().sum(), mask)
    (want,) = torch.autograd.grad(function(q, k, v, mask).sin().sum(), mask)
    torch.testing.assert_close(got, want)


def test_compiles_with_inductor_and_time_before_heads():
    x = torch.randn(2, 6, 3, 4, 8, requires_grad=True)

    def step(x):
        q, k, v = x.permute(2, 0, 3, 1, 4)
        return attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) * 2

    got, want = torch.compile(step, fullgraph=True)(x), step(x)
    torch.testing.assert_close(got, want)
    for g, w in zip(
        torch.autograd.grad(got.sin().sum(), x),
        torch.autograd.grad(want.sin().sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("dtype", "masked"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.float64, False)],
)
def test_cpu_autocast_is_pytorchs(dtype, masked):
    q, k, v = (x.to(dtype) for x in (Q, K, V))
    mask = torch.randn(5, 7) if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(q, k, v, mask)
        theirs = F.scaled_dot_product_attention(q, k, v, mask)
    assert got.dtype == theirs.dtype
    if dtype == torch.float64:  # left alone: the oracle itself
        return torch.testing.assert_close(got, theirs)
    want = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), mask)
    return assert_as_exact_as_torch([got], [theirs], [want], ["out"])


def test_checkpoint_repeats_dropout():
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))

    def function(q):
        return attention(q, k, v, dropout_p=0.5).sin()

    torch.manual_seed(3)
    want = torch.autograd.grad(function(q).sum(), q)
    for reentrant in (False, True):
        torch.manual_seed(3)
        checkpoint(function, q, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(q.grad, want[0])
        q.grad = None


def test_changing_an_input_before_backward_is_an_error():
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    out = attention(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_function_transforms():
    def loss(q, function):
        return function(q, K[0, 0], V[0, 0]).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with sdpa_kernel(SDPBackend.MATH):
            want = transform(loss)(Q[0, 0], F.scaled_dot_product_attention)
        torch.testing.assert_close(transform(loss)(Q[0, 0], attention), want)
    windowed = functools.partial(attention, window=(1, 1), sinks=SINKS)
    torch.testing.assert_close(torch.func.vmap(windowed)(Q, K, V), windowed(Q, K, V))


def test_forward_mode_differentiation():
    tangent = torch.randn_like(Q)
    with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = torch.autograd.forward_ad.make_dual(Q, tangent)
        got = torch.autograd.forward_ad.unpack_dual(attention(dual, K, V)).tangent
        want = F.scaled_dot_product_attention(dual, K, V)
        torch.testing.assert_close(got, torch.autograd.forward_ad.unpack_dual(want).tangent)


def test_tensor_subclasses_may_override():
    class Traced(torch.Tensor):
        calls: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, function, types, arguments=(), keywords=None):
            cls.calls.append(function.__name__)
            return super().__torch_function__(function, types, arguments, keywords or {})

    out = attention(Q, K.as_subclass(Traced), V, window=(1, 1))
    assert Traced.calls[0] == "scaled_dot_product_attention"
    assert isinstance(out, Traced)
    want = attention(Q, K, V, window=(1, 1))
    torch.testing.assert_close(out.as_subclass(torch.Tensor), want)


def test_runs_under_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        made = torch.randn(2, 4, 5, 8)
        assert attention(made, made, made, is_causal=True).shape == (2, 4, 5, 8)
    with torch.autocast("cpu"):
        out, lse = attention(Q.to("meta"), K.to("meta"), V.to("meta"), return_lse=True)
    assert (out.shape, lse.shape) == ((2, 4, 5, 8), (2, 4, 5))
