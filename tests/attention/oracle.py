"""Attention written out query by query: what every backend is held against.

Nothing here comes from kernels.attention: which keys are seen is decided by a Python loop, and the
random bits of dropout are computed with Python's integers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def is_global(t: int, length_k: int, global_tokens: int, marked: list[bool] | None) -> bool:
    if not 0 <= t < length_k:
        return False
    return t < global_tokens or (marked is not None and marked[t])


def sees(i, j, length_q, length_k, causal, lower_right, window, global_tokens, marked) -> bool:
    """Whether query i sees key j."""
    position = i + (length_k - length_q if lower_right else 0)
    left, right = window or (None, None)
    near = (left is None or j >= position - left) and (right is None or j <= position + right)
    near = near or is_global(j, length_k, global_tokens, marked)
    near = near or is_global(position, length_k, global_tokens, marked)
    return near and not (causal and j > position)


@functools.lru_cache(maxsize=512)
def _seen_by_one(length_q, length_k, *rest) -> Tensor:
    rows = [
        [sees(i, j, length_q, length_k, *rest) for j in range(length_k)] for i in range(length_q)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(length_q, length_k)


def seen(length_q, length_k, causal, alignment, window, global_tokens, global_mask) -> Tensor:
    """bool [Tq, Tk], or [B, 1, Tq, Tk] with a global_mask."""
    call = (length_q, length_k, causal, alignment == "lower_right", window, global_tokens)
    if global_mask is None:
        return _seen_by_one(*call, None)
    marks = [tuple(row) for row in global_mask.tolist()]
    return torch.stack([_seen_by_one(*call, row)[None] for row in marks])


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox4x32-10 of Salmon et al. (2011)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & 0xFFFFFFFF
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=64)
def kept(seed: int, numbers: tuple[int, ...], length_q: int, length_k: int, p: float) -> Tensor:
    """float64 [len(numbers), Tq, Tk]: 1 where a weight stays; `numbers` are b * H + h."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    least = round(p * 65536)
    stay = torch.empty(len(numbers), length_q, length_k, dtype=torch.float64)
    for n, number in enumerate(numbers):
        for i in range(length_q):
            words: dict[int, tuple[int, ...]] = {}
            for j in range(length_k):
                call = (j >> 5) * 4 + ((j >> 1) & 3)
                if call not in words:
                    words[call] = philox(key, (i, call, number, 0))
                word = words[call][(j >> 3) & 3]
                stay[n, i, j] = ((word >> 16 if j % 2 else word) & 0xFFFF) >= least
    return stay


def weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window=None,
    global_tokens: int = 0,
    global_mask: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "upper_left",
    from_lse: bool = False,
    **_,
) -> Tensor:
    """softmax [B, H, Tq, Tk] before dropout, and the lse in one more column.

    `from_lse` rounds elsewhere: the weights are exp(score - lse), as in every fused backward, and
    queries and keys are scaled before their product, as in PyTorch's unfused path.
    """
    batch, heads, length_q, size = query.shape
    length_k = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scale = size**-0.5 if scale is None else scale
    if from_lse:
        root = abs(scale) ** 0.5
        scores = (query * root) @ (key * (root if scale > 0 else -root)).transpose(-2, -1)
    else:
        scores = query @ key.transpose(-2, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        offset = length_k - length_q if causal_alignment == "lower_right" else 0
        place = torch.arange(length_q)[:, None] + offset
        distance = (torch.arange(length_k) - place).abs()
        scores = (
            scores - alibi_slopes.to(scores.dtype).expand(batch, heads)[..., None, None] * distance
        )
    places = seen(
        length_q, length_k, is_causal, causal_alignment, window, global_tokens, global_mask
    )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        places = places & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    scores = scores.masked_fill(~places, -torch.inf)
    sink = torch.full((heads,), -torch.inf, dtype=scores.dtype) if sinks is None else sinks
    sink = sink[:, None, None].expand(batch, heads, length_q, 1)
    scores = torch.cat((scores, sink.to(scores.dtype)), -1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    p = (scores - lse.masked_fill(empty, 0.0)).exp() if from_lse else scores.softmax(-1)
    return torch.cat((p.masked_fill(empty, 0.0)[..., :length_k], lse), -1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int = 0,
    first_number: int = 0,
    **rest,
) -> tuple[Tensor, Tensor]:
    """out and lse of [B, H, Tq, D], [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv], in query's dtype.

    16-bit inputs are computed in float32 and rounded at the end, as PyTorch's unfused path does.
    Dropout's first head has the number `first_number`.
    """
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    query, key, value = (x.to(wide) for x in (query, key, value))
    batch, heads, length_q, _ = query.shape
    found = weights(query, key, attn_mask, **rest)
    p, lse = found[..., :-1], found[..., -1]
    if dropout_p:
        numbers = tuple(range(first_number, first_number + batch * heads))
        stay = kept(seed, numbers, length_q, key.shape[2], dropout_p).view(p.shape).to(wide)
        p = p * stay * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return (p @ value.repeat_interleave(heads // value.shape[1], 1)).to(dtype), lse
