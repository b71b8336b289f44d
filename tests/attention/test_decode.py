"""Attention against a cache: each sequence against the oracle by itself, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.attention import decode_attention
from tests.attention import oracle
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE = 16


def cache(batch=3, kv_heads=2, capacity=70, size=16, dtype=torch.float32) -> Tensor:
    return torch.randn(batch, kv_heads, capacity, size).to(dtype)


def want(query, key, value, lengths, dtype, alibi_slopes=None, **keywords):
    """out and lse of the oracle, computed in `dtype`."""
    parts = []
    for n, length in enumerate(lengths.tolist()):
        one = slice(n, n + 1)
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[n]
        call = [x[one].to(dtype) for x in (query, key[:, :, :length], value[:, :, :length])]
        keywords["causal_alignment"] = "lower_right"
        parts.append(oracle.attention(*call, alibi_slopes=slopes, **keywords))
    return [torch.cat(outs) for outs in zip(*parts, strict=True)]


def check(query, keys, values, lengths, is_causal=True, dense=None, exact_lse=None, **keywords):
    """`dense` are the keys and values where the caches hold them in another form."""
    extras = ("block_table", "k_scale", "v_scale")
    storage = {name: keywords.pop(name) for name in extras if name in keywords}
    got = decode_attention(
        query, keys, values, lengths, is_causal=is_causal, return_lse=True, **storage, **keywords
    )
    assert got[0].dtype == query.dtype
    call = query, *(dense or (keys, values)), lengths
    theirs = want(*call, query.dtype, is_causal=is_causal, **keywords)
    exact = want(*call, torch.float64, is_causal=is_causal, **keywords)
    if query.dtype.itemsize == 2:
        # The bits that 16-bit products lose show in no output; lse may be off by as much as p.
        theirs[1] = theirs[1] + torch.finfo(query.dtype).eps / 64
    # out is a mean of values, which may cancel.
    terms = [call[2].abs().nanmean().item(), 1.0]
    assert_as_exact_as_torch(got, theirs, exact, ("out", "lse"), terms)


def paged(x: Tensor, order: Tensor) -> Tensor:
    """[B, Hkv, S, ...] in pages; page order[b, n] holds the n-th of sequence b."""
    pages = x.new_zeros((order.numel() + 2, x.shape[1], PAGE, *x.shape[3:]))
    for b, n in itertools.product(*map(range, order.shape)):
        part = x[b, :, n * PAGE : (n + 1) * PAGE]
        pages[order[b, n], :, : part.shape[1]] = part
    return pages


KEYWORDS = [
    {},
    {"window": (20, 0), "global_tokens": 2},
    {"softcap": 3.0, "alibi_slopes": torch.rand(4), "scale": 0.4},
    {"alibi_slopes": torch.rand(3, 4), "sinks": torch.randn(4)},
    {"is_causal": False, "window": (9, 4)},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("keywords", KEYWORDS, ids=range(len(KEYWORDS)))
def test_values(decode_implementation, keywords, queries, dtype):
    query = torch.randn(3, 4, queries, 16).to(dtype)
    lengths = torch.tensor([70, 33, 17], dtype=torch.int32)
    check(query, cache(dtype=dtype), cache(dtype=dtype), lengths, **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dv"),
    [(1, 1, 1, 1), (8, 8, 64, 64), (8, 1, 80, 80), (6, 2, 17, 33), (2, 1, 256, 128)],
)
def test_heads_and_sizes(decode_implementation, heads, kv_heads, size, dv, dtype):
    query = torch.randn(2, heads, 1, size).to(dtype)
    keys = cache(2, kv_heads, 700, size, dtype)
    values = cache(2, kv_heads, 700, dv, dtype)
    check(query, keys, values, torch.tensor([700, 513]))


def test_short_and_empty_sequences(decode_implementation):
    query = torch.randn(4, 4, 3, 16)
    lengths = torch.tensor([0, 1, 2, 70])  # shorter than the queries: the first see nothing
    check(query, cache(4), cache(4), lengths)
    check(query, cache(4), cache(4), lengths, sinks=torch.randn(4))
    out, lse = decode_attention(query, cache(4), cache(4), lengths, return_lse=True)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()


def test_what_lies_behind_a_sequence_is_never_seen(decode_implementation):
    query, keys, values = torch.randn(3, 4, 1, 16), cache(), cache()
    lengths = torch.tensor([70, 33, 17])
    clean = decode_attention(query, keys, values, lengths)
    for x in (keys, values):
        for n, length in enumerate(lengths.tolist()):
            x[n, :, length:] = float("nan")
    assert torch.equal(decode_attention(query, keys, values, lengths), clean)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages(decode_implementation, dtype, queries):
    query = torch.randn(3, 4, queries, 16).to(dtype)
    keys, values = cache(dtype=dtype), cache(dtype=dtype)
    lengths = torch.tensor([70, 33, 16], dtype=torch.int32)
    order = torch.randperm(15).view(3, 5)
    table = order.int()
    table[1, 3:], table[2, 1:] = -1, 10_000  # what is not in use may be anything
    pages = paged(keys, order), paged(values, order)
    dense = keys, values
    check(query, *pages, lengths, block_table=table, dense=dense)
    check(query, *pages, lengths, block_table=table, dense=dense, window=(8, 0), global_tokens=1)


@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8(decode_implementation, dtype, in_pages):
    query = torch.randn(3, 4, 2, 16).to(dtype)
    caches = [torch.randint(-127, 128, (3, 2, 70, 16), dtype=torch.int8) for _ in "kv"]
    scales = [torch.rand(3, 2, 70) / 60 for _ in "kv"]
    dense = [x.double() * s[..., None] for x, s in zip(caches, scales, strict=True)]
    lengths = torch.tensor([70, 33, 0], dtype=torch.int32)
    storage = {}
    if in_pages:
        order = torch.randperm(15).view(3, 5)
        storage["block_table"] = order.int()
        caches, scales = ([paged(x, order) for x in xs] for xs in (caches, scales))
    storage |= {"k_scale": scales[0], "v_scale": scales[1]}
    check(query, *caches, lengths, dense=dense, **storage)


def test_strided_caches_are_read_as_they_are(decode_implementation):
    query = torch.randn(3, 4, 1, 16)
    keys, values = torch.randn(70, 3, 2, 2, 16).permute(2, 1, 3, 0, 4)
    check(query, keys, values, torch.tensor([70, 33, 17]))
    check(query[:, :, :, :7], keys[..., 3:10], values.mT.contiguous().mT, torch.tensor([9, 1, 70]))


Q, K, LENGTHS = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 10, 8), torch.tensor([3, 10])
TABLE = torch.tensor([[0, 1], [1, 0]])
INT8, SCALE = torch.zeros(2, 2, 10, 8, dtype=torch.int8), torch.ones(2, 2, 10)
REFUSED = {
    "query rank": ({"query": Q[0]}, RuntimeError, "query must be 4-dimensional"),
    "query dtype": ({"query": Q.long()}, NotImplementedError, "query is torch.int64"),
    "cache dtypes": ({"k_cache": K.half()}, NotImplementedError, "k_cache is torch.float16"),
    "cache shapes": ({"k_cache": K[:, :, :9]}, RuntimeError, "may differ in their last size only"),
    "cache list": ({"k_cache": [1.0]}, TypeError, "k_cache must be a Tensor"),
    "size": ({"query": Q[..., :4]}, RuntimeError, "must have one last size"),
    "heads": ({"query": Q[:, :3]}, RuntimeError, r"\(2\) must divide those of query \(3\)"),
    "batch": ({"query": Q[:1], "lengths": LENGTHS[:1]}, RuntimeError, "must hold 1 sequences"),
    "lengths shape": ({"lengths": LENGTHS[:1]}, ValueError, r"lengths must be \[2\]"),
    "lengths dtype": ({"lengths": LENGTHS.float()}, TypeError, "lengths is torch.float32"),
    "lengths list": ({"lengths": [3, 10]}, TypeError, "lengths must be a Tensor"),
    "beyond": ({"lengths": LENGTHS + 1}, ValueError, "between 0 and the 10 keys .* from 4 to 11"),
    "negative": ({"lengths": LENGTHS - 4}, ValueError, "from -1 to 6"),
    "table shape": ({"block_table": TABLE[0]}, ValueError, r"\[2, 'max_pages'\]"),
    "table": ({"block_table": TABLE + 1}, ValueError, r"block_table\[0, 0\] is|pages 0 ... 1"),
    "pages beyond": (
        {"block_table": TABLE[:, :1], "lengths": LENGTHS + 1},
        ValueError,
        "the 10 keys",
    ),
    "scale missing": ({"k_cache": INT8, "v_cache": INT8}, ValueError, "k_scale is None"),
    "scale too much": ({"k_scale": SCALE}, ValueError, "goes with an int8 cache"),
    "scale shape": (
        {"k_cache": INT8, "v_cache": INT8, "k_scale": SCALE[0], "v_scale": SCALE},
        ValueError,
        r"k_scale must be float32 of shape \[2, 2, 10\]",
    ),
    "window": ({"window": (-2, 0)}, ValueError, r"window\[0\] must be 0 or more"),
    "elsewhere": ({"lengths": LENGTHS.to("meta")}, RuntimeError, "lengths is on meta"),
    "gradient": ({"query": Q.clone().requires_grad_()}, RuntimeError, "has no gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument(name):
    changes, kind, message = REFUSED[name]
    call = {"query": Q, "k_cache": K, "v_cache": K, "lengths": LENGTHS}
    with pytest.raises(kind, match=message):
        decode_attention(**{**call, **changes})


def test_opcheck_compile_and_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = (Q, K, K, LENGTHS.int(), None, None, None, None, None, (1, 1, -1, -1, 0, 1, 10))
    torch.library.opcheck(
        torch.ops.kernels.attention_decode_forward.default, (*call, (0.3, 0.0, 0.0))
    )
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Q, K, K, LENGTHS), decode_attention(Q, K, K, LENGTHS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = torch.randn(2, 4, 1, 8)
        assert decode_attention(made, made, made, torch.ones(2).int()).shape == (2, 4, 1, 8)
    on_meta = decode_attention(*(x.to("meta") for x in (Q, K, K, LENGTHS)))
    assert on_meta.shape == decode_attention(Q, K, K, LENGTHS).shape


def test_explain():
    decision = dispatch.explain("attention.decode", Q, K, K, LENGTHS, window=(3, 0))
    assert decision.backend is not None
    assert dispatch.explain("attention.decode", Q.double(), K, K, LENGTHS).backend == "eager"
