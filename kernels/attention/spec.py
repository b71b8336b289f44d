"""Attention as tests, bench and the command line see it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from kernels._spec import Case, Direction, Inputs, Spec
from kernels.attention.op import scaled_dot_product_attention
from kernels.attention.pattern import Pattern, dropout_factor, grid, keep_mask

SEED = 2026  # of dropout
BOTH: tuple[Direction, ...] = ("forward+backward",)
FORWARD: tuple[Direction, ...] = ("forward",)


def explicit(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = True
) -> Tensor:
    """Attention written out, as before there were fused ops; drops what SEED says."""
    length = query.shape[2]
    scores = query @ key.transpose(-2, -1) * query.shape[3] ** -0.5
    if is_causal:
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    weights = scores.softmax(-1)
    if dropout_p:
        pattern = Pattern(1, 0, -1, -1, 0, length, length)
        places = grid(pattern, length, length, query.device)
        seed = torch.tensor([SEED], device=query.device)
        kept = keep_mask(seed, places, query.shape[0], query.shape[1], pattern, dropout_p)
        weights = weights * kept * dropout_factor(dropout_p)
    return weights @ value


def math_path(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **keywords: Any
) -> Tensor:
    """PyTorch's unfused path, for one key head at a time: its scores are never all in memory."""
    group = query.shape[1] // key.shape[1]

    def one(batch: int, head: int) -> Tensor:
        b, h = slice(batch, batch + 1), slice(head, head + 1)
        mask = None if attn_mask is None else attn_mask.expand(query.shape[0], 1, -1, -1)[b]
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                query[b, head * group : (head + 1) * group],
                key[b, h],
                value[b, h],
                mask,
                **keywords,
            )

    return torch.cat(
        [
            torch.cat([checkpoint(one, b, h, use_reentrant=False) for h in range(key.shape[1])], 1)
            for b in range(query.shape[0])
        ]
    )


def _case(
    shape: tuple[int, int, int, int], name: str | None = None, keywords: Any = None, **rest: Any
) -> Case:
    """`shape` is (B, H, T, D); `keywords` are our function's."""
    options: dict[str, Any] = {
        key: rest.pop(key) for key in ("kv_heads", "time_first", "mask") if key in rest
    }
    sizes = dict(zip(("batch", "heads", "length", "size"), shape, strict=True))
    full_name = " ".join(filter(None, (",".join(map(str, shape)), name)))
    options["keywords"] = {"is_causal": True} if keywords is None else keywords
    return Case(full_name, sizes, options, **{"compiled": False, **rest})


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Normal queries, keys, values and output gradient, all in `dtype`."""
    batch, heads, length, size = case.sizes.values()
    generator = torch.Generator().manual_seed(sum(case.sizes.values()))

    def normal(heads: int) -> Tensor:
        if case.options.get("time_first"):
            made = torch.randn(batch, length, heads, size, generator=generator).transpose(1, 2)
        else:
            made = torch.randn(batch, heads, length, size, generator=generator)
        return made.to(device=device, dtype=dtype)

    kv_heads = case.options.get("kv_heads", heads)
    query, key, value, dout = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    keywords = dict(case.options["keywords"])
    if kv_heads != heads:
        keywords["enable_gqa"] = True
    if case.options.get("mask"):
        keywords["attn_mask"] = torch.rand(batch, 1, length, length, generator=generator) > 0.3
    keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
    torch_keywords = _torch_keywords(keywords, length, device)
    return Inputs((query, key, value), (0, 1, 2), dout, keywords, torch_keywords)


def _torch_keywords(keywords: dict[str, Any], length: int, device: str) -> dict[str, Any]:
    """What PyTorch's function computes the same with: a dense mask for a window."""
    theirs = {name: value for name, value in keywords.items() if name != "seed"}
    if "window" not in keywords:
        return theirs
    (left, right), reach = theirs.pop("window"), theirs.pop("global_tokens", 0)
    causal = theirs.pop("is_causal", False)
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)
    seen = (key >= query - left) & (key <= query + right) | (key < reach) | (query < reach)
    return {**theirs, "attn_mask": seen & (key <= query) if causal else seen}


def visible_pairs(case: Case) -> int:
    """Pairs of a query and a key it sees, in one head."""
    length, keywords = case.sizes["length"], case.options["keywords"]
    if not keywords.get("is_causal"):
        return length * length
    left = (keywords.get("window") or (length, 0))[0]
    reach = keywords.get("global_tokens", 0)
    near = (min(i, left) + 1 for i in range(length))
    return sum(n + min(reach, i + 1 - n) for i, n in enumerate(near))


def flops(case: Case, direction: Direction) -> int:
    """Two products of matrices forward, five backward, of the visible part."""
    products = 2 if direction == "forward" else 7
    heads = case.sizes["batch"] * case.sizes["heads"]
    return 2 * products * visible_pairs(case) * case.sizes["size"] * heads


_WINDOW = {"is_causal": True, "window": (255, 0)}
_DROPOUT = {"is_causal": True, "dropout_p": 0.1, "seed": SEED}

ACCURACY = (
    _case((2, 4, 131, 64)),
    _case((1, 3, 77, 80), "full", {}),
    _case((1, 8, 150, 64), "gqa 8:2", kv_heads=2),
    _case((2, 2, 129, 128), "views", time_first=True),
    _case((1, 2, 300, 32), "window, global", {**_WINDOW, "window": (40, 0), "global_tokens": 5}),
    _case((2, 2, 100, 40), "mask", {}, mask=True),
    _case((1, 2, 140, 64), "dropout", _DROPOUT, yardstick=explicit),
)

# name of the case, (fp32, bf16) forward, (fp32, bf16) forward and backward
_SPEED: tuple[tuple[Case, tuple[float, float] | None, tuple[float, float] | None], ...] = (
    (_case((1, 8, 2048, 64)), (1.5, 2.9), (1.65, 2.4)),
    (_case((4, 8, 512, 64)), (2.3, 4.8), (2.5, 4.3)),
    (_case((1, 8, 2048, 128)), (1.3, 2.0), (1.3, 2.0)),
    (_case((4, 8, 512, 128)), (1.3, 2.0), (1.3, 2.0)),
    (_case((1, 8, 1000, 80)), (1.3, 2.0), (1.3, 2.0)),
    (_case((1, 8, 2048, 64), "gqa 8:2", kv_heads=2), (1.3, 2.0), (1.3, 2.0)),
    (_case((1, 8, 2048, 64), "views", time_first=True), (1.3, 2.0), (1.3, 2.0)),
    (
        _case(
            (1, 1, 4096, 64),
            "ours on 1 thread",
            torch_function=scaled_dot_product_attention,
            torch_threads=1,
            directions=BOTH,
        ),
        None,
        (1.8, 1.8),
    ),
    (
        _case(
            (1, 8, 2048, 64),
            "written out",
            torch_function=explicit,
            directions=BOTH,
            compiled=True,
        ),
        None,
        (6.0, 5.0),
    ),
    (_case((1, 8, 4096, 64), "window 256", _WINDOW, directions=FORWARD), (20.0, 32.0), None),
    (
        _case(
            (1, 8, 4096, 64),
            "window 256, 16 global",
            {**_WINDOW, "global_tokens": 16},
            directions=BOTH,
        ),
        None,
        (12.0, 15.0),
    ),
    (
        _case((4, 8, 512, 64), "dropout", _DROPOUT, yardstick=explicit, directions=BOTH),
        None,
        (2.0, 3.0),
    ),
    (_case((8, 4, 32, 32), directions=BOTH), None, (0.9, 0.9)),
)


def _bars() -> dict[tuple[str, torch.dtype, Direction], float]:
    bars: dict[tuple[str, torch.dtype, Direction], float] = {}
    for case, forward, both in _SPEED:
        rows: tuple[tuple[Direction, Any], ...] = ("forward", forward), ("forward+backward", both)
        for direction, pair in rows:
            if pair is not None:
                bars[case.name, torch.float32, direction] = pair[0]
                bars[case.name, torch.bfloat16, direction] = pair[1]
    return bars


_QUICK = {"4,8,512,64", "4,8,512,128", "1,8,1000,80", "8,4,32,32"}

SPEC = Spec(
    op="attention",
    function=scaled_dot_product_attention,
    torch_function=F.scaled_dot_product_attention,
    make_inputs=make_inputs,
    gradient_names=("dquery", "dkey", "dvalue"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    accuracy_cases=ACCURACY,
    speed_cases=tuple(replace(case, quick=case.name in _QUICK) for case, _, _ in _SPEED),
    flops=flops,
    yardstick=math_path,
    bars=_bars(),
)
