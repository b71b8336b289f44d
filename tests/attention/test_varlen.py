"""Packed sequences: each against the oracle by itself, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.attention import scaled_dot_product_attention, varlen_attention
from tests.attention import oracle
from tests.attention.compare import check

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths of the queries and keys of each sequence: ragged, with empty ones, with one sequence.
LENGTHS = [
    ((5, 64, 17), (7, 33, 80)),
    ((0, 3, 0, 40), (9, 0, 0, 41)),
    ((70,), (70,)),
    ((1, 1, 1, 1), (100, 1, 33, 64)),
]


def ends(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def by_sequence(lengths_q, lengths_k):
    """The oracle for [1, H, total, D], one sequence after the other."""

    def function(query, key, value, attn_mask=None, sinks=None, alibi_slopes=None, **keywords):
        parts = []
        queries, keys, values = (
            x.split(lengths, 2)
            for x, lengths in ((query, lengths_q), (key, lengths_k), (value, lengths_k))
        )
        for n, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            slopes = alibi_slopes if alibi_slopes is None else alibi_slopes.view(-1, q.shape[1])
            slopes = slopes if slopes is None else slopes[n if len(slopes) > 1 else 0]
            first = n * q.shape[1]
            keywords["first_number"] = first
            parts.append(oracle.attention(q, k, v, sinks=sinks, alibi_slopes=slopes, **keywords))
        return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)

    return function


def split(lengths_q, lengths_k):
    """The tensors and dout of each sequence."""

    def function(tensors, dout):
        query, key, value, mask, sinks = tensors
        of_keys = (x.split(lengths_k, 2) for x in (key, value))
        parts = zip(*(x.split(lengths_q, 2) for x in (query, dout)), *of_keys, strict=True)
        return [((q, k, v, mask, sinks), d) for q, d, k, v in parts]

    return function


def packed(lengths_q, lengths_k):
    """varlen_attention for the same."""

    def function(query, key, value, attn_mask=None, **keywords):
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]
        cu = ends(lengths_q), ends(lengths_k)
        out, lse = varlen_attention(*rows, *cu, return_lse=True, **keywords)
        return out.transpose(0, 1)[None], lse[None]

    return function


KEYWORDS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_alignment": "lower_right"},
    {"window": (6, 3), "global_tokens": 2},
    {"softcap": 2.0, "alibi_slopes": torch.rand(4), "dropout_p": 0.3, "seed": 4},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keywords", KEYWORDS, ids=range(len(KEYWORDS)))
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradients(implementation, lengths, keywords, dtype):
    rows = [sum(lengths[0]), sum(lengths[1]), sum(lengths[1])]
    made = [torch.randn(n, h, 16).to(dtype) for n, h in zip(rows, (4, 2, 2), strict=True)]
    tensors = [x.transpose(0, 1)[None] for x in made]
    given = [*tensors, None, torch.randn(4)]
    check(packed(*lengths), given, formula=by_sequence(*lengths), split=split(*lengths), **keywords)


def test_slopes_of_each_sequence(implementation):
    lengths = (4, 9), (12, 5)
    slopes = torch.rand(2, 4)
    q, k, v = (torch.randn(1, 4, n, 8) for n in (13, 17, 17))
    got = packed(*lengths)(q, k, v, alibi_slopes=slopes)
    want = by_sequence(*lengths)(q, k, v, alibi_slopes=slopes)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_longest_lengths_may_be_given_and_types_of_ends(implementation):
    q, k, v = (torch.randn(n, 2, 8) for n in (13, 17, 17))
    cu_q, cu_k = ends((4, 9)), ends((12, 5))
    want = varlen_attention(q, k, v, cu_q, cu_k, is_causal=True)
    for longest in ((9, 12), (13, 17), (4000, 12)):
        got = varlen_attention(q, k, v, cu_q.long(), cu_k.long(), *longest, is_causal=True)
        assert torch.equal(got, want)


def test_one_projection_of_all_rows_is_not_copied(monkeypatch):
    qkv = torch.randn(20, 3, 4, 8)
    seen = []
    backend = dispatch.load("attention", "eager")
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *call: seen.extend(call[:3]) or forward(*call))
    with dispatch.use("eager"):
        out = varlen_attention(*qkv.unbind(1), ends((8, 12)), ends((8, 12)))
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in qkv.unbind(1)]
    assert out.is_contiguous()


def test_no_sequences_and_no_rows():
    nothing = torch.zeros(0, 2, 8)
    for cu in (ends(()), ends((0, 0))):
        out, lse = varlen_attention(nothing, nothing, nothing, cu, cu, return_lse=True)
        assert (out.shape, lse.shape) == ((0, 2, 8), (2, 0))


def test_gradcheck():
    cu_q, cu_k = ends((2, 3)), ends((4, 2))
    leaves = [torch.randn(n, h, 3, dtype=torch.float64) for n, h in ((5, 2), (6, 1), (6, 1))]
    leaves = [x.requires_grad_() for x in leaves]

    def function(q, k, v):
        return varlen_attention(q, k, v, cu_q, cu_k, window=(1, 1), global_tokens=1)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_compiles_without_a_graph_break():
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (13, 17, 17))
    cu = ends((4, 9)), ends((12, 5))

    def step(q, k, v):
        return varlen_attention(q, k, v, *cu, is_causal=True).sin()

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(got, step(q, k, v))
    for g, w in zip(
        torch.autograd.grad(got.sum(), (q, k, v)),
        torch.autograd.grad(step(q, k, v).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(g, w)


Q, K = torch.randn(5, 4, 8), torch.randn(7, 2, 8)
CU_Q, CU_K = ends((2, 3)), ends((3, 4))
REFUSED = {
    "rank": ({"query": Q[None]}, RuntimeError, r"query must be \[total, heads, size\]"),
    "2-D": ({"query": Q[0]}, RuntimeError, "query must be at least 3-dimensional"),
    "dtype": ({"key": K.half()}, RuntimeError, "must have one dtype"),
    "heads": ({"key": K.expand(7, 2, 8)[:, :1]}, RuntimeError, "one number of heads"),
    "grouping": ({"query": Q[:, :3]}, RuntimeError, r"\(2\) must divide those of query \(3\)"),
    "size": ({"query": Q[..., :4]}, RuntimeError, "one last size"),
    "start": ({"cu_seqlens_q": CU_Q + 1}, ValueError, "go from 0 to the number of rows, 5"),
    "end": ({"cu_seqlens_k": ends((3, 3))}, ValueError, "cu_seqlens_k must go from 0 .* 7"),
    "order": ({"cu_seqlens_q": ends((6, -1))}, ValueError, "cu_seqlens_q must not decrease"),
    "float": ({"cu_seqlens_q": CU_Q.float()}, TypeError, "cu_seqlens_q is torch.float32"),
    "list": ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q must be a Tensor"),
    "2-D ends": ({"cu_seqlens_q": CU_Q[None]}, ValueError, r"cu_seqlens_q must be \[N \+ 1\]"),
    "empty ends": ({"cu_seqlens_q": CU_Q[:0]}, ValueError, r"cu_seqlens_q must be \[N \+ 1\]"),
    "counts": ({"cu_seqlens_k": ends((3, 2, 2))}, ValueError, "must be of one length"),
    "elsewhere": ({"cu_seqlens_q": CU_Q.to("meta")}, RuntimeError, "cu_seqlens_q is on meta"),
    "longest": ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q is 2, but .* a sequence of 3"),
    "longest type": ({"max_seqlen_k": 2.5}, TypeError, "max_seqlen_k must be an int"),
    "slopes": ({"alibi_slopes": torch.rand(3, 4)}, ValueError, r"\(4,\) or \(2, 4\)"),
    "window": ({"window": 3}, TypeError, "varlen_attention: window"),
    "dropout": ({"dropout_p": 2.0}, RuntimeError, "dropout_p must be between 0 and 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument(name):
    changes, kind, message = REFUSED[name]
    call = {"query": Q, "key": K, "value": K, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    with pytest.raises(kind, match=message):
        varlen_attention(**{**call, **changes})


def test_autocast_meta_tensors_and_equality_with_a_batch():
    q, k, v = (torch.randn(6, 2, 8) for _ in "qkv")
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen_attention(q, k, v, ends((6,)), ends((6,))).dtype == torch.bfloat16
    on_meta = varlen_attention(*(x.to("meta") for x in (q, k, v, ends((6,)), ends((6,)))))
    assert on_meta.shape == q.shape
    got = varlen_attention(q, k, v, ends((6,)), ends((6,)), scale=0.3)
    want = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), scale=0.3)
    torch.testing.assert_close(got, want.transpose(0, 1))
