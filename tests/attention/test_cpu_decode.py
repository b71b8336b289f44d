"""The CPU backend of attention against a cache, with every instruction set, against float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import _native
from kernels.attention.decode import cpu, reference
from kernels.attention.pattern import Pattern, Scaling
from tests.tolerance import assert_as_exact_as_torch

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(isinstance(_native.cpu, str), reason=str(_native.cpu)),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTRUCTION_SETS = [] if isinstance(_native.cpu, str) else _native.cpu.instruction_sets()


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.cpu.instruction_set()
    _native.cpu.use_instruction_set(request.param)
    yield request.param
    _native.cpu.use_instruction_set(before)


def cache_of(
    shape: tuple[int, ...], dtype: torch.dtype, lengths: list[int], page: int, table: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A cache, NaN (int8: a scale of NaN) past every sequence's length, and its scales."""
    batch, heads, capacity, dim = shape
    values = torch.randn(shape)
    scale = None
    if dtype == torch.int8:
        scale = values.abs().amax(-1) / 127
        values = (values / scale[..., None]).round()
    values = values.to(dtype)
    for sequence, length in enumerate(lengths):
        if scale is None:
            values[sequence, :, length:] = torch.nan
        else:
            scale[sequence, :, length:] = torch.nan
    if table is None:
        return values, scale
    pages = values.new_zeros(int(table.max()) + 1, heads, page, dim)
    scales = None if scale is None else scale.new_zeros(pages.shape[:3])
    for sequence in range(batch):
        for number in range(capacity // page):
            rows = slice(number * page, (number + 1) * page)
            pages[table[sequence, number]] = values[sequence, :, rows]
            if scale is not None and scales is not None:
                scales[table[sequence, number]] = scale[sequence, :, rows]
    return pages, scales


def arguments(
    dtype: torch.dtype,
    cache: torch.dtype,
    shape: tuple[int, int, int, int, int, int, int],
    lengths: list[int],
    *,
    page: int = 0,
    causal: bool = True,
    left: int = -1,
    right: int = -1,
    global_tokens: int = 0,
    softcap: float = 0.0,
    alibi: bool = False,
    sinks: bool = False,
    seed: int = 0,
) -> tuple[Any, ...]:
    """`shape`: batch, heads, key heads, queries, capacity, head dim, value dim."""
    torch.manual_seed(seed)
    batch, heads, kv_heads, queries, capacity, dim, value_dim = shape
    table = None
    if page:
        pages = batch * (capacity // page)
        table = torch.randperm(pages).to(torch.int32).view(batch, -1)
    key, key_scale = cache_of((batch, kv_heads, capacity, dim), cache, lengths, page, table)
    value, value_scale = cache_of(
        (batch, kv_heads, capacity, value_dim), cache, lengths, page, table
    )
    return (
        torch.randn(batch, heads, queries, dim).to(dtype),
        key,
        value,
        torch.tensor(lengths, dtype=torch.int32),
        table,
        key_scale,
        value_scale,
        torch.rand(batch, heads) if alibi else None,
        torch.randn(heads) if sinks else None,
        Pattern(int(causal), 1, left, right, global_tokens, queries, capacity),
        Scaling(dim**-0.5, softcap, 0.0),
    )


def to_float64(call: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call)


def check(*positional: Any, **options: Any) -> None:
    call = arguments(*positional, **options)
    ours, plain = cpu.forward(*call), reference.forward(*call)
    exact = reference.forward(*to_float64(call))
    assert ours[0].dtype == call[0].dtype
    assert_as_exact_as_torch(ours, plain, exact, ("out", "lse"))


CACHES = (
    [(d, d) for d in DTYPES]
    + [(d, torch.int8) for d in DTYPES[:2]]
    + [(torch.float32, torch.float16)]
)


@pytest.mark.parametrize(("dtype", "cache"), CACHES, ids=str)
def test_caches(instruction_set, dtype, cache):
    # One part and several of 512 keys, no keys at all, groups of heads, odd head dims.
    check(dtype, cache, (3, 2, 2, 1, 700, 64, 64), [700, 513, 1])
    check(dtype, cache, (2, 6, 2, 1, 80, 33, 70), [65, 0])
    check(dtype, cache, (1, 4, 1, 3, 130, 128, 16), [130])


@pytest.mark.parametrize("page", [1, 7, 16, 64, 100])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_pages(instruction_set, page, cache):
    capacity = 700 // page * page
    check(torch.float32, cache, (2, 4, 2, 1, capacity, 32, 48), [capacity, 50], page=page)
    check(torch.float32, cache, (2, 2, 2, 4, capacity, 16, 16), [capacity, 50], page=page, left=20)


FEATURES = {
    "not causal": {"causal": False},
    "window": {"left": 100},
    "window of one": {"left": 0},
    "window and globals": {"left": 70, "global_tokens": 5},
    "not causal window": {"causal": False, "left": 70, "right": 2, "global_tokens": 600},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"left": 30, "global_tokens": 3, "softcap": 3.0, "alibi": True, "sinks": True},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("queries", [1, 5, 16])
def test_features(instruction_set, feature, queries):
    # The second sequence has fewer keys than queries: its first rows may see nothing.
    shape = (3, 4, 2, queries, 620, 24, 40)
    check(torch.float32, torch.float32, shape, [620, 3, 65], **FEATURES[feature])


def test_random_combinations():
    choices = random.Random(3)
    for number in range(60):
        kv_heads, batch = choices.choice((1, 2)), choices.choice((1, 3))
        capacity = choices.choice((16, 96, 320, 1040))
        check(
            choices.choice(DTYPES),
            choices.choice((*DTYPES, torch.int8)),
            (
                batch,
                kv_heads * choices.choice((1, 4)),
                kv_heads,
                choices.choice((1, 1, 2, 9)),
                capacity,
                choices.randint(1, 80),
                choices.randint(1, 80),
            ),
            [choices.randint(0, capacity) for _ in range(batch)],
            page=choices.choice((0, 8, 16)),
            causal=choices.random() < 0.7,
            left=choices.choice((-1, 0, 40)),
            right=choices.choice((-1, 3)),
            global_tokens=choices.choice((0, 4)),
            softcap=choices.choice((0.0, 2.0)),
            alibi=choices.random() < 0.3,
            sinks=choices.random() < 0.3,
            seed=number,
        )


def test_strided_caches(instruction_set):
    call = list(arguments(torch.float32, torch.bfloat16, (2, 4, 2, 1, 300, 40, 24), [300, 77]))
    dense = cpu.forward(*call)
    for place in (1, 2):  # [B, S, H, D] memory, rows apart
        batch, heads, keys, dim = call[place].shape
        wide = torch.empty(batch, keys, heads, dim + 3, dtype=torch.bfloat16)
        wide[..., 2:-1] = call[place].transpose(1, 2)
        call[place] = wide[..., 2:-1].transpose(1, 2)
    for one, other in zip(dense, cpu.forward(*call), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    call = arguments(torch.float32, dtype, (2, 2, 1, 2, 3000, 64, 64), [3000, 1700], left=2500)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(cpu.forward(*call))
    torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def test_nan_in_the_cache_is_seen_only_where_its_key_is(instruction_set):
    call = arguments(torch.float32, torch.float32, (1, 2, 2, 3, 100, 16, 16), [100])
    call[1][0, 0, 98, 3] = torch.nan
    out, lse = cpu.forward(*call)
    assert not out[0, 0, 0].isnan().any()
    assert not lse[0, 0, 0].isnan()
    assert out[0, 0, 1:].isnan().all()
    assert lse[0, 0, 1:].isnan().all()
    assert not out[0, 1].isnan().any()


def test_what_is_refused():
    call = arguments(torch.float32, torch.float32, (1, 1, 1, 1, 8, 8, 8), [8])
    assert cpu.unsupported(*call) is None
    assert "torch.float64" in cpu.unsupported(call[0].double(), *call[1:])
    assert "torch.float64" in cpu.unsupported(call[0], call[1].double(), *call[2:])
    wide = torch.zeros(1, 1, 1, 257)
    assert "257 exceeds 256" in cpu.unsupported(wide, *call[1:])
