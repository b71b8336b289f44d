"""The modules: nn.MultiheadAttention's every argument, and a GPT's attention with a cache."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import CausalSelfAttention, KeyValueCache, MultiheadAttention
from kernels.attention import scaled_dot_product_attention as attention

EMBED, HEADS = 12, 3


def pair(**keywords):
    """Ours and PyTorch's with equal parameters, in float64."""
    ours = MultiheadAttention(EMBED, HEADS, **keywords).double()
    theirs = nn.MultiheadAttention(EMBED, HEADS, **keywords).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(kind, batch, batch_first, kdim=EMBED, vdim=EMBED, lengths=(5, 7)):
    """query, key and value; `batch` None: unbatched."""

    def make(length, size):
        shape = (length, size) if batch is None else (length, batch, size)
        if batch is not None and batch_first:
            shape = (batch, length, size)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    query = make(lengths[0], EMBED)
    if kind == "self":
        return query, query, query
    key = make(lengths[1], kdim)
    return (query, key, key) if kind == "shared" else (query, key, make(lengths[1], vdim))


def assert_equal(ours, theirs, call, **keywords):
    wanted = list({id(x): x for x in call}.values())
    runs = []
    for module in (ours, theirs):
        with sdpa_kernel(SDPBackend.MATH):
            out, weights = module(*call, **keywords)
            loss = out.square().sum()
            found = torch.autograd.grad(loss, [*wanted, *module.parameters()], allow_unused=True)
        runs.append((out, weights, *found))
    for g, w in zip(*runs, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("kind", ["self", "shared", "cross"])
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "keywords", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}]
)
def test_inputs_and_constructor_arguments(keywords, batch_first, batch, kind):
    modules = pair(batch_first=batch_first, **keywords)
    call = inputs(kind, batch, batch_first)
    assert_equal(*modules, call, need_weights=False)
    assert_equal(*modules, call, need_weights=True)


@pytest.mark.parametrize("bias", [False, True])
def test_sizes_of_keys_and_values(bias):
    modules = pair(kdim=5, vdim=7, bias=bias, batch_first=True)
    assert_equal(*modules, inputs("cross", 2, True, 5, 7), need_weights=False)


MASKS = [None, "bool", "float"]


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("mask", "rank"), [(None, 2), *itertools.product(MASKS[1:], (2, 3))])
@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(appended, mask, rank, padding, batch):
    modules = pair(batch_first=True, add_bias_kv=appended, add_zero_attn=appended)

    def make(kind, *shape):
        if kind is None:
            return None
        return torch.rand(shape) > 0.7 if kind == "bool" else torch.randn(shape).double()

    lead = () if rank == 2 else ((batch or 1) * HEADS,)
    attn_mask = make(mask, *lead, 5, 7)
    key_padding_mask = make(padding, *(() if batch is None else (batch,)), 7)
    if padding == "bool":
        key_padding_mask[..., 0] = False  # PyTorch's derivative of a row without keys is NaN
        attn_mask = attn_mask if mask != "bool" else attn_mask & False
    call = inputs("cross", batch, True)
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    assert_equal(*modules, call, need_weights=False, **masks)


def test_causal_hint():
    modules = pair(batch_first=True)
    call = inputs("self", 2, True)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    keywords = {"attn_mask": future, "is_causal": True, "need_weights": False}
    assert_equal(*modules, call, **keywords)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    assert_equal(*modules, call, key_padding_mask=padding, **keywords)


@pytest.mark.parametrize(
    ("call", "keywords"),
    [
        ((torch.randn(2, 5, 11),) * 3, {}),
        ((torch.randn(2, 2, 5, EMBED),) * 3, {}),
        ((torch.randn(2, 5, EMBED), *(torch.randn(3, 5, EMBED),) * 2), {}),
        ((torch.randn(2, 5, EMBED),) * 3, {"is_causal": True}),
        ((torch.randn(2, 5, EMBED),) * 3, {"attn_mask": torch.ones(4, 5)}),
        ((torch.randn(2, 5, EMBED),) * 3, {"key_padding_mask": torch.ones(5, 2)}),
    ],
)
def test_errors_are_pytorchs(call, keywords):
    modules = (
        MultiheadAttention(EMBED, HEADS, batch_first=True),
        nn.MultiheadAttention(EMBED, HEADS, batch_first=True),
    )
    errors = []
    for module in modules:
        with pytest.raises(Exception, match=r".") as error:
            module(*call, need_weights=False, **keywords)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_module_is_nn_multihead_attention_but_for_its_forward():
    ours, theirs = MultiheadAttention(EMBED, HEADS, 0.5), nn.MultiheadAttention(EMBED, HEADS, 0.5)
    assert isinstance(ours, nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(4, 2, EMBED)
    ours.eval()
    want = ours(x, x, x, need_weights=False)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x, x, x, need_weights=False)[0], want)
    ours.train()
    assert not torch.equal(*(ours(x, x, x, need_weights=False)[0] for _ in range(2)))


def test_in_a_transformer_and_compiled():
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 6, EMBED)
    want = layer(x)
    ours = MultiheadAttention(EMBED, HEADS, batch_first=True)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    torch.testing.assert_close(layer(x), want)
    compiled = torch.compile(
        lambda x: ours(x, x, x, need_weights=False)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), ours(x, x, x, need_weights=False)[0])


PATTERNS = [{}, {"num_kv_heads": 1}, {"window": (3, 0), "global_tokens": 1}, {"softcap": 2.0}]


@pytest.mark.parametrize("keywords", PATTERNS, ids=str)
def test_self_attention_is_what_its_parameters_say(keywords):
    module = CausalSelfAttention(EMBED, HEADS, **keywords)
    x = torch.randn(2, 9, EMBED)
    kv_heads = keywords.pop("num_kv_heads", HEADS)
    q, k, v = module.qkv(x).split((EMBED, kv_heads * 4, kv_heads * 4), -1)
    heads = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q, k, v))
    y = attention(*heads, is_causal=True, enable_gqa=True, **keywords)
    torch.testing.assert_close(module(x), module.proj(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("keywords", PATTERNS, ids=str)
@pytest.mark.parametrize("steps", [(1,) * 30, (20, 1, 1, 8), (3, 17, 10), (30,)], ids=str)
@torch.no_grad()
def test_a_cache_gives_what_the_whole_text_gives(steps, keywords):
    module = CausalSelfAttention(EMBED, HEADS, **keywords)
    x = torch.randn(2, 30, EMBED)
    cache = module.new_cache(2, 30)
    parts = [module(part, cache) for part in x.split(steps, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), module(x))
    assert cache.length == 30
    with pytest.raises(ValueError, match="holds 30 of 30 tokens, 1 more do not fit"):
        module(x[:, :1], cache)


def test_what_self_attention_refuses():
    with pytest.raises(ValueError, match="embed_dim=12 is not a multiple of num_heads=5"):
        CausalSelfAttention(12, 5)
    with pytest.raises(ValueError, match="num_heads=3 is not a multiple of num_kv_heads=2"):
        CausalSelfAttention(12, 3, num_kv_heads=2)
    module = CausalSelfAttention(12, 3)
    with pytest.raises(RuntimeError, match="a cache has no gradient"):
        module(torch.randn(1, 1, 12), module.new_cache(1, 4))


def test_dropout_of_self_attention_acts_in_training_only():
    module, x = CausalSelfAttention(EMBED, HEADS, dropout=0.5), torch.randn(1, 9, EMBED)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_cache_has_the_dtype_of_its_module():
    module = CausalSelfAttention(EMBED, HEADS, num_kv_heads=1).bfloat16()
    cache = module.new_cache(2, 5)
    assert isinstance(cache, KeyValueCache)
    assert (cache.key.dtype, cache.key.shape) == (torch.bfloat16, (2, 1, 5, 4))
