"""The arguments of attention: every refusal, and every shape and mask that PyTorch takes."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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
