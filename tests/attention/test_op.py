"""Attention as a citizen of PyTorch: errors, shapes, autograd, compile, autocast, transforms."""

from __future__ import annotations

import functools
import itertools
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from kernels import dispatch
from kernels.attention import op
from kernels.attention import scaled_dot_product_attention as attention

Q, K, V = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


# name: (arguments, keywords, what the message must contain).  PyTorch refuses each of these too.
REFUSED_BY_BOTH = {
    "query None": ((None, K, V), {}, "query must be a Tensor"),
    "key a list": ((Q, [1.0], V), {}, "key must be a Tensor"),
    "one dimension": ((Q[0, 0, 0], K, V), {}, "query must be at least 2-dimensional"),
    "dtypes": ((Q, K.double(), V), {}, "must have one dtype"),
    "integers": ((ones(1, 1, 3, 4, dtype=torch.int64),) * 3, {}, "query is torch.int64"),
    "complex": ((ones(1, 1, 3, 4, dtype=torch.complex64),) * 3, {}, "query is torch.complex64"),
    "device": ((Q, K.to("meta"), V), {}, "key is on meta"),
    "head dim": ((Q, K[..., :4], V), {}, "one last size"),
    "batch": ((Q, K[:1].expand(3, 4, 7, 8), V), {}, "do not broadcast"),
    "heads": ((Q, K[:, :2], V[:, :2]), {}, "do not broadcast"),
    "gqa divides": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, r"heads of key \(3\)"),
    "gqa more keys": ((Q[:, :2], K, V), {"enable_gqa": True}, "must divide"),
    "gqa 2-D": ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, "dimension of heads"),
    "mask shape": ((Q, K, V, ones(4, 7)), {}, "attn_mask must be broadcastable"),
    "mask larger": ((Q, K, V, ones(3, 1, 5, 7)), {}, "attn_mask must be broadcastable"),
    "mask dtype": ((Q, K, V, ones(5, 7, dtype=torch.int64)), {}, "attn_mask is torch.int64"),
    "mask double": ((Q, K, V, ones(5, 7, dtype=torch.float64)), {}, "attn_mask is torch.float64"),
    "mask a list": ((Q, K, V, [1.0]), {}, "attn_mask must be a Tensor"),
    "mask and causal": ((Q, K, V, ones(5, 7)), {"is_causal": True}, "attn_mask must be None"),
    "dropout above": ((Q, K, V), {"dropout_p": 1.5}, "dropout_p must be between 0 and 1"),
    "dropout below": ((Q, K, V), {"dropout_p": -0.1}, "dropout_p must be between 0 and 1"),
    "dropout str": ((Q, K, V), {"dropout_p": "a"}, "dropout_p must be a float"),
    "dropout None": ((Q, K, V), {"dropout_p": None}, "dropout_p must be a float"),
    "causal int": ((Q, K, V), {"is_causal": 1}, "is_causal must be a bool"),
    "causal None": ((Q, K, V), {"is_causal": None}, "is_causal must be a bool"),
    "scale str": ((Q, K, V), {"scale": "x"}, "scale must be a float"),
    "gqa int": ((Q, K, V), {"enable_gqa": 1}, "enable_gqa must be a bool"),
}


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_errors_are_pytorchs_and_name_the_argument(name):
    arguments, keywords, message = REFUSED_BY_BOTH[name]
    # PyTorch's fused op for CPUs takes both, against its documentation.
    unfused = sdpa_kernel(SDPBackend.MATH) if name == "mask and causal" else nullcontext()
    with pytest.raises(Exception, match=r".") as theirs, unfused:
        F.scaled_dot_product_attention(*arguments, **keywords)
    # PyTorch's IndexError is about its own indexing.
    kind = RuntimeError if theirs.type is IndexError else theirs.type
    if name == "integers":
        kind = NotImplementedError  # theirs is a RuntimeError about mat1 and mat2
    with pytest.raises(kind, match=message):
        attention(*arguments, **keywords)


SLOPES, SINKS, GLOBAL = torch.rand(4), torch.randn(4), torch.zeros(2, 7, dtype=torch.bool)

REFUSED_BY_US = {
    "value length": ({"value": V[:, :, :6]}, RuntimeError, "one length"),
    "window int": ({"window": 5}, TypeError, "window must be None or a pair"),
    "window three": ({"window": (1, 2, 3)}, TypeError, "window must be None or a pair"),
    "window negative": ({"window": (-1, 0)}, ValueError, r"window\[0\] must be 0 or more, got -1"),
    "window float": ({"window": (1.5, 0)}, TypeError, r"window\[0\] must be an int"),
    "globals negative": ({"global_tokens": -1}, ValueError, "global_tokens must be 0 or more"),
    "globals bool": ({"global_tokens": True}, TypeError, "global_tokens must be an int"),
    "global_mask dtype": ({"global_mask": GLOBAL.float()}, TypeError, "must be bool"),
    "global_mask shape": ({"global_mask": GLOBAL[:, :5]}, ValueError, r"shape \[2, 7\]"),
    "global_mask list": ({"global_mask": [True]}, TypeError, "global_mask must be a Tensor"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be None or positive"),
    "softcap infinite": ({"softcap": float("inf")}, ValueError, "softcap must be None or positive"),
    "slopes shape": ({"alibi_slopes": SLOPES[:3]}, ValueError, r"alibi_slopes .* \(4,\)"),
    "slopes integer": ({"alibi_slopes": SLOPES.long()}, TypeError, "alibi_slopes is torch.int64"),
    "slopes list": ({"alibi_slopes": [1.0]}, TypeError, "alibi_slopes must be a Tensor"),
    "slopes gradient": (
        {"alibi_slopes": SLOPES.clone().requires_grad_()},
        ValueError,
        "alibi_slopes has no gradient",
    ),
    "slopes elsewhere": ({"alibi_slopes": SLOPES.to("meta")}, RuntimeError, "is on meta"),
    "sinks shape": ({"sinks": SINKS[None]}, ValueError, r"sinks must have shape \(4,\)"),
    "sinks integer": ({"sinks": SINKS.long()}, TypeError, "sinks is torch.int64"),
    "sinks list": ({"sinks": [1.0]}, TypeError, "sinks must be a Tensor"),
    "alignment": ({"causal_alignment": "left"}, ValueError, "'upper_left', 'lower_right'"),
    "seed float": ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int"),
    "seed large": ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed must fit 64 bits"),
    "seed tensor": ({"dropout_p": 0.1, "seed": torch.ones(2)}, TypeError, "one int64"),
}


@pytest.mark.parametrize("name", REFUSED_BY_US)
def test_errors_of_our_own_arguments(name):
    keywords, kind, message = REFUSED_BY_US[name]
    with pytest.raises(kind, match=message):
        attention(**{"query": Q, "key": K, "value": V, **keywords})


def test_the_right_forms_of_our_own_arguments():
    keywords = {"window": [2, None], "global_mask": GLOBAL[0], "alibi_slopes": SLOPES[None]}
    for seed in (3, torch.tensor(3), torch.tensor([3]), -(2**63)):
        attention(Q, K, V, dropout_p=0.5, seed=seed, sinks=SINKS.half(), softcap=3, **keywords)
    assert attention(Q, K, V, dropout_p=1).eq(0).all()


SHAPES = [
    ((5, 8), (7, 8), (7, 6)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    ((2, 4, 5, 8), (7, 8), (7, 8)),
    ((2, 3, 4, 5, 8), (1, 3, 4, 7, 8), (3, 4, 7, 8)),
    ((1, 1, 5, 8), (1, 1, 7, 8), (2, 4, 7, 8)),
    ((1, 4, 5, 8), (3, 1, 7, 8), (1, 4, 7, 8)),
    ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
    ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    ((2, 4, 5, 0), (2, 4, 7, 0), (2, 4, 7, 3)),
    ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 0)),
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
    ((2, 2, 3, 300), (2, 2, 4, 300), (2, 2, 4, 300)),
]
GROUPED = [
    ((2, 8, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)),
    ((2, 8, 5, 4), (2, 2, 7, 4), (2, 4, 7, 3)),
    ((8, 5, 4), (2, 7, 4), (2, 7, 4)),
    ((2, 8, 5, 4), (1, 2, 7, 4), (2, 2, 7, 4)),
    ((2, 8, 5, 4), (2, 7, 4), (2, 7, 4)),
]


def compare_with_pytorch(shapes, **keywords):
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(*leaves, **keywords)
        got = attention(*leaves, **keywords)
        dout = torch.randn_like(want)
        wanted = torch.autograd.grad(want, leaves, dout)
        found = torch.autograd.grad(got, leaves, dout)
    torch.testing.assert_close(got, want)
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, w)
    assert attention(*(x.bfloat16() for x in leaves), **keywords).shape == want.shape


@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"scale": 0.7}], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_every_shape_that_pytorch_takes(shapes, keywords):
    compare_with_pytorch(shapes, **keywords)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", GROUPED, ids=str)
def test_grouped_heads_as_pytorchs(shapes, causal):
    compare_with_pytorch(shapes, enable_gqa=True, is_causal=causal)


MASKS = [(), (7,), (5, 7), (1, 7), (5, 1), (1, 1), (4, 5, 7), (1, 5, 7), (2, 1, 5, 7), (2, 4, 1, 1)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_as_pytorchs(shape):
    shapes = SHAPES[2]
    compare_with_pytorch(shapes, attn_mask=torch.rand(shape) > 0.3)
    compare_with_pytorch(shapes, attn_mask=torch.randn(shape))
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    q, k, v = (torch.randn(s, dtype=torch.float64) for s in shapes)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, mask)
    (theirs,) = torch.autograd.grad(want.sin().sum(), mask)
    (ours,) = torch.autograd.grad(attention(q, k, v, mask).sin().sum(), mask)
    torch.testing.assert_close(ours, theirs)


def test_strided_inputs_reach_the_backend_without_a_copy(monkeypatch):
    seen = []
    backend = dispatch.load("attention", "eager")
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *call: seen.append(call) or forward(*call))
    views = torch.randn(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    with dispatch.use("eager"):
        attention(*views)
        attention(*views, window=(2, 2), attn_mask=ones(1, 1, 5, 5)[..., :1])
        attention(views[0], *views[1:, :, :1])
    for call in seen:
        pointers = [x.data_ptr() for x in call[:3]]
        assert pointers == [views[0].data_ptr(), views[1].data_ptr(), views[2].data_ptr()]
    assert seen[1][3].shape == (2, 4, 5, 5)
    assert seen[1][3].untyped_storage().nbytes() == 4 * 25
    assert seen[2][1].shape[1] == 1  # one key head for all, never expanded


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


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("keywords", COMPILED.values(), ids=COMPILED)
def test_compiles_without_a_graph_break(keywords, dynamic):
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
        want = F.scaled_dot_product_attention(q, k, v, mask)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


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
    out, lse = attention(Q.to("meta"), K.to("meta"), V.to("meta"), return_lse=True)
    assert (out.shape, lse.shape) == ((2, 4, 5, 8), (2, 4, 5))


def test_explain_names_every_backend():
    decision = dispatch.explain("attention", Q, K, V, is_causal=True, return_lse=True)
    assert decision.backend is not None
    assert set(decision.refusals) == set(dispatch.CPU_ORDER)
    assert dispatch.explain("attention", *(x.double() for x in (Q, K, V))).backend == "eager"


def test_calls_without_questions_are_those_that_prepare_would_make():
    """The shortcut for usual calls gives what the checks give, and takes nothing they refuse."""
    tensors = [Q, K, V[:, :, :6], Q.double(), Q[0], Q.to("meta"), Q.mT, Q[:, :2], K[..., :4], None]
    taken = 0
    for q, k, causal, scale in itertools.product(
        tensors, tensors, [True, False, 1, None], [None, 0.5, 2, "x"]
    ):
        call = op._usual_call(q, k, k, causal, scale)
        if call is None:
            continue
        taken += 1
        want = op.backend_arguments(q, k, k, is_causal=causal, scale=scale)
        assert [x is y or x == y for x, y in zip(call, want, strict=True)] == [True] * 12
    assert taken >= 40
