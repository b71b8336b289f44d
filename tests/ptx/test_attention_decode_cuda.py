"""Decoding's CUDA kernels from the PTX that nvcc makes of them, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import ptx
from kernels.attention.decode import cuda, reference
from kernels.attention.pattern import Pattern, Scaling
from tests.ptx.attention_cases import Case, attend
from tests.ptx.conftest import ARCHS, DEFAULT_ARCHS, SCHEDULES
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SETTINGS = tuple(zip(DTYPES, SCHEDULES, strict=True))
(ARCH,) = DEFAULT_ARCHS["attention"]
LENGTHS = (0, 3, 130, 257)  # none, fewer than queries, and around tiles
PAGE = 48
# What a case has besides queries, a cache and lengths.
FEATURES: dict[str, dict[str, Any]] = {
    "one query": {"queries": 1, "shape": (4, 1)},
    "grouped heads": {"queries": 3, "shape": (6, 2)},
    "more rows than a tile": {"queries": 5, "shape": (4, 1)},
    "not causal": {"causal": False},
    "pages": {"paged": True, "shape": (4, 2)},
    "int8": {"int8": True},
    "int8 pages": {"int8": True, "paged": True, "head_dim": 40},
    "rows off 16-byte boundaries": {"head_dim": 37, "value_dim": 19},
    "window": {"window": (70, -1)},
    "window and global tokens": {"window": (20, -1), "global_tokens": 5},
    "all queries global": {"window": (20, -1), "global_tokens": 256},
    # exp(95) is more than float32 holds.
    "softcap and sinks": {"softcap": 2.0, "sinks": torch.tensor([-1.0, 95.0])},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 0.9, 8).view(4, 2)},
}


def paged(cache: Tensor, table: Tensor) -> Tensor:
    """[B, Hkv, S, ...] -> [pages, Hkv, page size, ...], page by page where `table` says."""
    pages = cache.new_full((table.max() + 2, cache.shape[1], PAGE, *cache.shape[3:]), 99)
    for b, n in itertools.product(range(cache.shape[0]), range(table.shape[1])):
        pages[table[b, n]] = cache[b, :, n * PAGE : (n + 1) * PAGE]
    return pages


def check(
    dtype: torch.dtype,
    *,
    queries: int = 2,
    shape: tuple[int, int] = (2, 2),
    head_dim: int = 64,
    value_dim: int | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    global_tokens: int = 0,
    softcap: float = 0.0,
    int8: bool = False,
    paged_cache: bool = False,
    cache_dtype: torch.dtype | None = None,
    **extras: Tensor,
) -> None:
    heads, kv_heads = shape
    batch, size = len(LENGTHS), 6 * PAGE
    query = torch.randn(batch, heads, queries, head_dim).to(dtype)
    caches, scales = [], [None, None]
    for columns in (head_dim, value_dim or head_dim):
        caches.append(torch.randn(batch, kv_heads, size, columns).to(cache_dtype or dtype))
    if int8:
        caches = [torch.randint(-127, 128, cache.shape, dtype=torch.int8) for cache in caches]
        scales = [torch.rand(cache.shape[:3]) / 64 for cache in caches]
    table = None
    if paged_cache:
        table = torch.randperm(batch * 6).view(batch, 6).int()
        caches = [paged(cache, table) for cache in caches]
        scales = [scale if scale is None else paged(scale, table) for scale in scales]
    pattern = Pattern(int(causal), 1, *window, global_tokens, queries, size)
    rest = (
        torch.tensor(LENGTHS, dtype=torch.int32),
        table,
        *scales,
        extras.get("alibi_slopes"),
        extras.get("sinks"),
        tuple(pattern),
        tuple(Scaling(head_dim**-0.5, softcap, 0.0)),
    )
    got = cuda.forward(query, *caches, *rest)
    dense = [
        reference.dense(cache, scale, table, torch.float64)
        for cache, scale in zip(caches, scales, strict=True)
    ]
    exact, torchs = (
        by_torch(query.to(wanted), *(x.to(wanted) for x in dense), rest)
        for wanted in (torch.float64, dtype)
    )
    assert_as_exact_as_torch(got, torchs, exact, ["out", "lse"])


def by_torch(query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...]) -> list[Tensor]:
    """out and lse, sequence by sequence, in the dtype of the tensors."""
    *_, slopes, sinks, pattern, scaling = rest
    parts = []
    for n, length in enumerate(LENGTHS):
        one = slice(n, n + 1)
        numbers = Pattern(*pattern)._replace(max_seqlen_k=length)
        tensors = query[one], key[one, :, :length], value[one, :, :length]
        each = Case(*tensors, numbers, Scaling(*scaling))
        each.alibi_slopes = None if slopes is None else slopes[one]
        parts.append(attend(each, [*tensors, sinks]))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def keywords(feature: str) -> dict[str, Any]:
    given = dict(FEATURES[feature])
    given["paged_cache"] = given.pop("paged", False)
    return given


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature):
    dtype, schedule = SETTINGS[list(FEATURES).index(feature) % len(SETTINGS)]
    with ptx.run(ARCH, schedule=schedule, multiprocessors=16):
        check(dtype, **keywords(feature))


def test_a_cache_of_16_bits_for_queries_of_32():
    with ptx.run(ARCH, multiprocessors=1):
        check(torch.float32, cache_dtype=torch.bfloat16)
        check(torch.float32, cache_dtype=torch.float16, head_dim=40)


@pytest.mark.sweep
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_everything_on_everything(arch, dtype, head_dim):
    for feature, schedule in itertools.product(FEATURES, SCHEDULES):
        with ptx.run(arch, schedule=schedule, multiprocessors=16):
            check(dtype, **{"head_dim": head_dim} | keywords(feature))
