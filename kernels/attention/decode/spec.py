"""Attention against a cache as tests, bench and the command line see it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._spec import Case, Direction, Inputs, Spec
from kernels.attention.decode.op import decode_attention


def torch_decode(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **scales: Tensor
) -> Tensor:
    """F.scaled_dot_product_attention for one sequence after the other, on its part of the cache."""
    outs = []
    for number, length in enumerate(lengths.tolist()):
        one = slice(number, number + 1)
        key, value = (
            cache[one, :, :length]
            if name not in scales
            else (cache[one, :, :length] * scales[name][one, :, :length, None]).to(query.dtype)
            for cache, name in ((k_cache, "k_scale"), (v_cache, "v_scale"))
        )
        causal = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device)
        mask = causal.tril(length - query.shape[2]) if query.shape[2] > 1 else None
        gqa = query.shape[1] != key.shape[1]
        outs.append(F.scaled_dot_product_attention(query[one], key, value, mask, enable_gqa=gqa))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _case(name: str, **sizes: Any) -> Case:
    defaults = {"batch": 1, "heads": 16, "kv_heads": 16, "queries": 1, "capacity": 4096, "size": 64}
    lengths, int8 = sizes.pop("lengths"), sizes.pop("int8", False)
    options = {"lengths": lengths, "int8": int8}
    return Case(name, {**defaults, **sizes}, options, directions=("forward",), compiled=False)


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Normal queries, keys and values; an int8 cache with a scale for each vector."""
    batch, heads, kv_heads, queries, capacity, size = case.sizes.values()
    generator = torch.Generator().manual_seed(capacity)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query = normal(batch, heads, queries, size)
    caches = [normal(batch, kv_heads, capacity, size) for _ in "kv"]
    keywords = {}
    if case.options["int8"]:
        scales = [cache.abs().amax(-1) / 127 for cache in caches]
        caches = [
            (cache / scale[..., None]).round().to(device=device, dtype=torch.int8)
            for cache, scale in zip(caches, scales, strict=True)
        ]
        keywords = {"k_scale": scales[0].to(device), "v_scale": scales[1].to(device)}
    else:
        caches = [cache.to(device=device, dtype=dtype) for cache in caches]
    lengths = torch.tensor(case.options["lengths"], dtype=torch.int32, device=device)
    query = query.to(device=device, dtype=dtype)
    return Inputs((query, *caches, lengths), (), query, keywords)


def least_bytes(case: Case, dtype: torch.dtype, direction: Direction) -> int:
    """The keys and values in use, read once."""
    keys = sum(case.options["lengths"]) * case.sizes["kv_heads"] * case.sizes["size"]
    return 2 * keys * (1 if case.options["int8"] else dtype.itemsize)


SPEC = Spec(
    op="attention.decode",
    function=decode_attention,
    torch_function=torch_decode,
    make_inputs=make_inputs,
    gradient_names=(),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    accuracy_cases=(
        _case("2x8:2, 3 queries", batch=2, heads=8, kv_heads=2, queries=3, lengths=(700, 4096)),
        _case("int8", capacity=1000, size=80, lengths=(1000,), int8=True),
    ),
    speed_cases=(_case("4096 keys", lengths=(4096,)), _case("4000 keys", lengths=(4000,))),
    least_bytes=least_bytes,
    bars={
        (f"{keys} keys", dtype, "forward"): bar
        for keys in (4096, 4000)
        for dtype, bar in ((torch.float32, 1.3), (torch.bfloat16, 15.0))
    },
)
