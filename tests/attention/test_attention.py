"""Values and gradients of attention, in every implementation that runs on this CPU.

The oracle is the formula written out (oracle.py), itself held against PyTorch's unfused path; the
tolerance is the rule in tests/tolerance.py.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import dispatch
from kernels.attention import scaled_dot_product_attention
from tests.attention import oracle
from tests.attention.compare import check, results
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
attention = functools.partial(scaled_dot_product_attention, return_lse=True, enable_gqa=True)


def tensors(shape=(2, 4, 37, 51, 16), dtype=torch.float32, kv_heads=None, dv=None, sinks=False):
    """query, key, value, no mask and sinks for (B, H, Tq, Tk, D)."""
    batch, heads, length_q, length_k, size = shape
    kv_heads = kv_heads or heads
    query = torch.randn(batch, heads, length_q, size).to(dtype)
    key = torch.randn(batch, kv_heads, length_k, size).to(dtype)
    value = torch.randn(batch, kv_heads, length_k, dv or size).to(dtype)
    return [query, key, value, None, torch.randn(heads).to(dtype) if sinks else None]


PYTORCHS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -1.5},
    "bool mask": {"attn_mask": torch.rand(9, 13) > 0.4},
    "float mask": {"attn_mask": torch.randn(2, 1, 9, 13).double()},
}


@pytest.mark.parametrize("keywords", PYTORCHS.values(), ids=PYTORCHS)
def test_the_oracle_is_pytorchs_unfused_path(keywords):
    q, k, v, _, _ = tensors((2, 4, 9, 13, 8), torch.float64, kv_heads=2, dv=5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **keywords)
    got, _ = oracle.attention(q, k, v, **keywords)
    dout = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    for g, w in zip(
        torch.autograd.grad(got, leaves, dout), torch.autograd.grad(want, leaves, dout), strict=True
    ):
        torch.testing.assert_close(g, w)


# (B, H, Tq, Tk, D): one of everything; less than a vector; tiles of 16, 32, 64 and 128 and their
# neighbours in queries, keys and head dimensions; one query and one key; a long row of keys.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 2, 1, 5, 3),
    (2, 1, 5, 1, 8),
    (1, 2, 15, 17, 16),
    (1, 1, 16, 16, 17),
    (2, 3, 31, 33, 24),
    (1, 2, 63, 65, 64),
    (1, 1, 65, 63, 65),
    (1, 2, 64, 128, 32),
    (1, 1, 127, 129, 80),
    (1, 1, 33, 40, 128),
    (1, 1, 20, 19, 256),
    (1, 1, 3, 700, 16),
    (1, 1, 300, 2, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(implementation, shape, dtype):
    cancels = min(shape[2:4]) < 4
    check(attention, tensors(shape, dtype), cancels=cancels)
    check(attention, tensors(shape, dtype), dlse=False, cancels=cancels, is_causal=True)
    lower = {"is_causal": True, "causal_alignment": "lower_right"}
    check(attention, tensors(shape, dtype), cancels=cancels, **lower)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 1), (4, 4), (3, 1)])
def test_grouped_heads_and_another_size_of_values(implementation, heads, kv_heads, dtype):
    for dv in (24, 7, 40):
        check(attention, tensors((2, heads, 21, 35, 24), dtype, kv_heads, dv), is_causal=True)


WINDOWS = [
    {"window": (0, 0)},
    {"window": (3, 2)},
    {"window": (None, 4)},
    {"window": (5, None)},
    {"window": (7, 3), "is_causal": True},
    {"window": (16, 0), "is_causal": True, "causal_alignment": "lower_right"},
    {"window": (2, 1), "causal_alignment": "lower_right"},
    {"window": (2, 3), "global_tokens": 3},
    {"window": (4, 0), "global_tokens": 5, "is_causal": True},
    {"window": (1, 1), "global_tokens": 200},
    {"window": (4, 2), "global_tokens": 2, "causal_alignment": "lower_right"},
    {"global_tokens": 4},
    {"window": (1000, 1000)},
]
LENGTHS = [(1, 1, 40, 40, 16), (1, 2, 70, 150, 16), (1, 1, 150, 70, 16)]


def test_a_scale_that_is_not_positive_hides_what_is_hidden(implementation):
    for scale in (0.0, -1.5):
        check(attention, tensors((1, 2, 70, 70, 16)), is_causal=True, scale=scale)


@pytest.mark.parametrize("shape", LENGTHS, ids=str)
@pytest.mark.parametrize("keywords", WINDOWS, ids=str)
def test_windows_and_global_tokens(implementation, keywords, shape):
    # Past the last key a window shrinks to one key.
    cancels = keywords.get("window") == (0, 0) or shape[2] > shape[3]
    check(attention, tensors(shape), cancels=cancels, **keywords)


@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("causal", [False, True])
def test_global_mask(implementation, causal, alignment):
    for length_q, length_k in ((60, 60), (40, 90), (90, 40)):
        marked = torch.rand(2, length_k) < 0.08
        keywords = {"window": (3, 2), "global_mask": marked, "is_causal": causal}
        keywords["causal_alignment"] = alignment
        check(attention, tensors((2, 2, length_q, length_k, 16)), **keywords)
        check(attention, tensors((2, 2, length_q, length_k, 16)), global_tokens=2, **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [(2, 4, 33, 49), (1, 4, 1, 49), (2, 1, 33, 1), (33, 49), (1, 1)])
def test_masks(implementation, form, dtype):
    query, key, value, _, sinks = tensors((2, 4, 33, 49, 16), dtype)
    added = torch.randn(form)
    added[..., :1] = -torch.inf
    for mask in (torch.rand(form) > 0.4, added, added.to(dtype)):
        check(attention, [query, key, value, mask, sinks])
    window = {"window": (9, 4), "global_tokens": 1}
    check(attention, [query, key, value, torch.rand(form) > 0.4, sinks], **window)


@pytest.mark.parametrize("form", [(2, 4, 9, 13), (1, 4, 1, 13), (9, 13), (1, 1)])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradient_of_a_mask(backend, form):
    """Of a float mask that requires one: the backends with kernels refuse it."""
    query, key, value, _, sinks = tensors((2, 4, 9, 13, 8), sinks=True)
    with dispatch.use(backend):
        check(attention, [query, key, value, torch.randn(form), sinks], mask_gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "keywords",
    [
        {"softcap": 2.0},
        {"softcap": 30.0, "is_causal": True},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
        {"alibi_slopes": torch.rand(2, 4), "causal_alignment": "lower_right", "is_causal": True},
        {"softcap": 5.0, "alibi_slopes": torch.rand(2, 4), "window": (20, 3), "global_tokens": 2},
    ],
    ids=["softcap", "softcap causal", "alibi", "alibi of each batch", "all"],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_alibi_and_sinks(implementation, keywords, sinks, dtype):
    check(attention, tensors((2, 4, 33, 70, 16), dtype, 2, sinks=sinks), **keywords)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing_are_zero(implementation, sinks):
    given = tensors((1, 2, 70, 40, 16), sinks=sinks)
    mask = torch.rand(70, 40) > 0.5
    mask[3] = mask[17] = mask[63] = False
    given[3] = mask
    out, lse, dquery, *rest = check(attention, given)
    if not sinks:
        assert not out[:, :, [3, 17, 63]].any()
        assert (lse[:, :, [3, 17, 63]] == -torch.inf).all()
    assert not dquery[:, :, [3, 17, 63]].any()
    assert all(x is None or x.isfinite().all() for x in (out, dquery, *rest))
    given[3] = torch.zeros(1, 1, dtype=torch.bool)
    out, _, *gradients = check(attention, given)
    assert not out.any()
    assert all(x is None or not x.any() for x in gradients[:3])
    given[3] = None
    # The first 30 queries stand before the first key.
    out = check(attention, given, is_causal=True, causal_alignment="lower_right")[0]
    assert not out[:, :, :30].any()
    assert out[:, :, 30:].any(-1).all()


@pytest.mark.parametrize(
    "shape", [(1, 2, 5, 0, 8), (2, 1, 0, 5, 8), (1, 2, 0, 0, 8), (0, 2, 4, 5, 8)]
)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_attend_to(implementation, shape, sinks, causal):
    out, lse, *_ = check(attention, tensors(shape, sinks=sinks), cancels=True, is_causal=causal)
    assert not out.any()
    assert sinks or (lse == -torch.inf).all()


def packed(size):
    """Views of one projection's output [B, T, 3, H, D]."""
    return torch.randn(2, 29, 3, 4, size).permute(2, 0, 3, 1, 4)


STRIDED = {
    "time before heads": lambda: [torch.randn(2, 29, 4, 16).transpose(1, 2) for _ in "qkv"],
    "views of one projection": lambda: list(packed(16)),
    "offset by one element": lambda: [torch.randn(2 * 4 * 29 * 16 + 1)[1:].view(2, 4, 29, 16)] * 3,
    "expanded batch": lambda: [torch.randn(1, 4, 29, 16).expand(2, 4, 29, 16) for _ in "qkv"],
    "expanded heads": lambda: [torch.randn(2, 1, 29, 16).expand(2, 4, 29, 16) for _ in "qkv"],
    "expanded time": lambda: [torch.randn(2, 4, 1, 16).expand(2, 4, 29, 16) for _ in "qkv"],
    "part of longer rows": lambda: [torch.randn(2, 4, 29, 40)[..., 3:19] for _ in "qkv"],
    "last dimension strided": lambda: [torch.randn(2, 4, 16, 29).transpose(2, 3) for _ in "qkv"],
    "every other element": lambda: [torch.randn(2, 4, 29, 32)[..., ::2] for _ in "qkv"],
    "reversed heads": lambda: [torch.randn(29, 4, 2, 16).permute(2, 1, 0, 3) for _ in "qkv"],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", STRIDED)
def test_any_strides(implementation, view, dtype):
    query, key, value = (x.to(dtype) for x in STRIDED[view]())
    check(attention, [query, key, value, None, None], is_causal=True)


def test_any_strides_of_the_output_gradient(implementation):
    query, key, value, _, _ = tensors((2, 4, 29, 29, 16))
    for dout in (
        torch.randn(2, 29, 4, 16).transpose(1, 2),
        torch.randn(16, 29, 4, 2).permute(3, 2, 1, 0),
        torch.randn(1, 1, 1, 1).expand(2, 4, 29, 16),
        torch.randn(2, 4, 1, 16).expand(2, 4, 29, 16),
    ):
        runs = []
        for grad in (dout, dout.contiguous()):
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            out = scaled_dot_product_attention(*leaves)
            runs.append(torch.autograd.grad(out, leaves, grad))
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)


def test_results_have_the_order_of_the_inputs_in_memory(implementation):
    given = [torch.randn(2, 29, 4, 16).transpose(1, 2).requires_grad_() for _ in "qkv"]
    out, lse = attention(*given)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    for gradient in torch.autograd.grad(out.sum(), given):
        assert gradient.transpose(1, 2).is_contiguous()
    given = [torch.randn(2, 4, 29, 16, requires_grad=True) for _ in "qkv"]
    out, lse = attention(*given)
    assert all(x.is_contiguous() for x in (out, lse, *torch.autograd.grad(out.sum(), given)))


@pytest.mark.parametrize(
    "asked", [p for p in itertools.product([0, 1], repeat=4) if any(p)], ids=str
)
def test_only_the_gradients_asked_for(implementation, asked):
    query, key, value, _, sinks = tensors((1, 4, 17, 23, 8), kv_heads=2, sinks=True)
    dout = torch.randn(1, 4, 17, 8)
    runs = []
    for wanted in (asked, (1, 1, 1, 1)):
        leaves = [
            x.detach().requires_grad_(bool(w))
            for x, w in zip((query, key, value, sinks), wanted, strict=True)
        ]
        out, _ = attention(*leaves[:3], sinks=leaves[3], is_causal=True)
        out.backward(dout)
        runs.append([x.grad for x in leaves])
    for one, every, wanted in zip(*runs, asked, strict=True):
        assert (one is not None) == bool(wanted)
        if wanted:
            torch.testing.assert_close(one, every)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(implementation, dtype):
    """Scores in the hundreds, where exp without the running maximum overflows."""
    query, key, value, _, _ = tensors((1, 2, 40, 90, 16), dtype)
    out, lse = attention(query * 30, key * 10, value)
    want, want_lse = oracle.attention((query * 30).double(), (key * 10).double(), value.double())
    got_in_dtype, lse_in_dtype = oracle.attention(query * 30, key * 10, value)
    assert_as_exact_as_torch(
        (out, lse), (got_in_dtype, lse_in_dtype), (want, want_lse), ("out", "lse")
    )


@pytest.mark.parametrize("causal", [False, True])
def test_scores_so_large_that_neighbouring_floats_are_thousands_apart(implementation, causal):
    query, key, value, _, _ = tensors((1, 2, 40, 90, 16))
    for size in (1e10, 1e11):
        leaves = [x.detach().requires_grad_() for x in (query * size, key, value)]
        out, _ = attention(*leaves, is_causal=causal)
        want, _ = oracle.attention(*(x.detach().double() for x in leaves), is_causal=causal)
        torch.testing.assert_close(out.double(), want)  # each query's largest key's value
        for gradient in torch.autograd.grad(out.sum(), leaves):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_leaves_the_others_alone(implementation, value):
    query, key, values, _, _ = tensors((1, 2, 70, 70, 16))
    clean, _ = attention(query, key, values, is_causal=True)
    query[0, 1, 33, 5] = value
    out, lse = attention(query, key, values, is_causal=True)
    assert out[0, 1, 33].isnan().all()
    out[0, 1, 33] = clean[0, 1, 33]
    torch.testing.assert_close(out, clean)


def test_repeated_calls_are_equal_to_the_bit(implementation):
    given = tensors((2, 4, 70, 90, 24), kv_heads=2, sinks=True)
    dout, dlse = torch.randn(2, 4, 70, 24), torch.randn(2, 4, 70)
    keywords = {"is_causal": True, "dropout_p": 0.2, "seed": 1}
    first, second = (results(attention, given, dout, dlse, **keywords) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_not_written(implementation):
    given = tensors((1, 4, 33, 50, 16), kv_heads=2, sinks=True)
    copies = [None if x is None else x.clone() for x in given]
    results(attention, given, torch.randn(1, 4, 33, 16), None, is_causal=True)
    assert all(x is None or torch.equal(x, y) for x, y in zip(given, copies, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), label="seed"))
    lengths = [draw(st.integers(0, 90), label="length") for _ in "qk"]
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]), label="heads")
    size, dv = draw(st.integers(1, 70), label="D"), draw(st.integers(1, 40), label="Dv")
    batch = draw(st.integers(1, 2), label="batch")
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    reach = st.one_of(st.none(), st.integers(0, 60))
    keywords = {
        "is_causal": draw(st.booleans(), label="causal"),
        "window": draw(st.one_of(st.none(), st.tuples(reach, reach)), label="window"),
        "global_tokens": draw(st.sampled_from([0, 0, 1, 7]), label="global_tokens"),
        "softcap": draw(st.sampled_from([None, None, 3.0]), label="softcap"),
        "causal_alignment": draw(st.sampled_from(["upper_left", "lower_right"]), label="alignment"),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3]), label="dropout"),
        "seed": draw(st.integers(-(2**63), 2**63 - 1), label="dropout's seed"),
    }
    if draw(st.booleans(), label="alibi"):
        keywords["alibi_slopes"] = torch.rand(batch, heads)
    if draw(st.booleans(), label="global_mask"):
        keywords["global_mask"] = torch.rand(batch, lengths[1]) < 0.1
    sinks = draw(st.booleans(), label="sinks")
    made = tensors((batch, heads, *lengths, size), dtype, kv_heads, dv, sinks)
    if draw(st.booleans(), label="time first"):
        made[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made[:3]]
    if not keywords["is_causal"] and draw(st.booleans(), label="mask"):
        made[3] = torch.rand(batch, 1, *lengths) > 0.3
    check(attention, made, cancels=True, **keywords)
