"""Which keys a query sees and which of them dropout keeps: the geometry all backends share.

`Pattern` and `Scaling` are what a backend is told in numbers; the formulas below say in torch what
the kernels work out block by block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """The visible part of the scores; with packed sequences the same for each of them."""

    causal: int  # 1: no key past the query's position
    lower_right: int  # 1: the last query stands at the last key; 0: the first at the first
    left: int  # keys the window reaches to the left of the query's position; -1: all
    right: int  # and to the right
    global_tokens: int  # the first positions, which see all and are seen by all despite the window
    max_seqlen_q: int  # no sequence has more queries
    max_seqlen_k: int  # or keys

    @property
    def windowed(self) -> bool:
        return self.left >= 0 or self.right >= 0


class Scaling(NamedTuple):
    """The numbers that scores and weights are multiplied by."""

    scale: float
    softcap: float  # 0: none
    dropout_p: float


class Grid(NamedTuple):
    """Where some queries and some keys stand, all int64, within their sequences.

    Packed sequences lie side by side: `sequence` and `together` tell them apart.  Where each
    sequence of a batch has a length of its own, position is [B, 1, Tq], length_k [B, 1, 1, 1].
    """

    query: Tensor  # i [Tq]
    position: Tensor  # p = i + offset [Tq]: the query's place among the keys
    key: Tensor  # j [Tk]
    length_k: int | Tensor  # keys in the sequence, or in each query's sequence [Tq, 1]
    sequence: Tensor | None = None  # number of each query's sequence [Tq]
    together: Tensor | None = None  # bool [..., Tq, Tk]: query and key are of one sequence


def grid(pattern: Pattern, length_q: int, length_k: int, device: torch.device) -> Grid:
    """Of all queries and all keys of one sequence."""
    query, key = torch.arange(length_q, device=device), torch.arange(length_k, device=device)
    offset = length_k - length_q if pattern.lower_right else 0
    return Grid(query, query + offset, key, length_k)


def packed_grid(pattern: Pattern, total_q: int, total_k: int, cu_q: Tensor, cu_k: Tensor) -> Grid:
    """Of all queries and keys of sequences that lie one after the other."""
    rows, columns = (torch.arange(n, device=cu_q.device) for n in (total_q, total_k))
    cu_q, cu_k = cu_q.long(), cu_k.long()
    sequence = torch.searchsorted(cu_q, rows, right=True) - 1
    key_sequence = torch.searchsorted(cu_k, columns, right=True) - 1
    query, key = rows - cu_q[sequence], columns - cu_k[key_sequence]
    length_q, length_k = cu_q.diff()[sequence], cu_k.diff()[sequence]
    position = query + (length_k - length_q) if pattern.lower_right else query
    together = sequence[:, None] == key_sequence
    return Grid(query, position, key, length_k[:, None], sequence, together)


def visible(pattern: Pattern, grid: Grid, global_mask: Tensor | None) -> Tensor | None:
    """bool [Tq, Tk], or [B, 1, Tq, Tk] with a global_mask; None: every query sees every key."""
    rows, keys = grid.position[..., None], grid.key
    distance = keys - rows
    seen = None if grid.together is None else grid.together
    if pattern.windowed:
        near = torch.ones_like(distance, dtype=torch.bool)
        if pattern.left >= 0:
            near = near & (distance >= -pattern.left)
        if pattern.right >= 0:
            near = near & (distance <= pattern.right)
        if pattern.global_tokens > 0 or global_mask is not None:
            near = near | _is_global(pattern, keys, grid.length_k, global_mask)
            near = near | _is_global(pattern, rows, grid.length_k, global_mask)
        seen = near if seen is None else seen & near
    if pattern.causal:
        past = distance <= 0
        seen = past if seen is None else seen & past
    return seen


def _is_global(
    pattern: Pattern, t: Tensor, length_k: int | Tensor, global_mask: Tensor | None
) -> Tensor:
    """Whether position `t` ([Tq, 1] or [Tk]) is a global one; positions past the keys are none."""
    inside = (t >= 0) & (t < length_k)
    chosen = inside & (t < pattern.global_tokens)
    if global_mask is None or not global_mask.shape[1]:
        return chosen
    marked = global_mask[:, t.clamp(0, global_mask.shape[1] - 1)]  # [B, *t.shape]
    if t.dim() == 1:
        marked = marked[:, None]
    return (chosen | (inside & marked))[:, None]  # [B, 1, Tq or 1, Tk or 1]


def dropout_threshold(dropout_p: float) -> int:
    """A weight is kept where its 16 random bits are at least this."""
    return round(dropout_p * 65536)


def dropout_factor(dropout_p: float) -> float:
    """What a kept weight is multiplied by."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


_WORD = 0xFFFFFFFF


def _philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

    32-bit words in int64 tensors, whose products wrap but keep the 64 bits that matter.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor, grid: Grid, batch: int, heads: int, pattern: Pattern, p: float
) -> Tensor:
    """bool [B, H, Tq, Tk]: the weights that dropout with probability `p` keeps.

    One call of the generator serves eight keys, 32 a + 8 n + 2 t + {0, 1} for n = 0 ... 3: word n
    of counter (i, 4 a + t, b H + h, 0) holds 16 bits for the even key and, above, for the odd one.
    """
    device = seed.device
    head = torch.arange(heads, device=device)[:, None]
    if grid.sequence is None:
        number = torch.arange(batch, device=device)[:, None, None] * heads + head  # [B, H, 1]
    else:
        number = (grid.sequence * heads + head)[None]  # [1, H, Tq]
    calls = torch.arange((pattern.max_seqlen_k + 31) // 32 * 4, device=device)
    counter = (grid.query[:, None], calls, number[..., None], torch.zeros_like(calls))
    words = _philox((seed & _WORD, (seed >> 32) & _WORD), counter)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    # [..., a, t, n, half] -> [..., a, n, t, half], which is the order of the keys
    bits = halves.unflatten(-1, (4, 2)).unflatten(-3, (-1, 4)).transpose(-3, -2).flatten(-4)
    return bits[..., grid.key] >= dropout_threshold(p)


def empty_like_heads(like: Tensor, last_dim: int) -> Tensor:
    """Uninitialised [B, H, T, last_dim], its memory [B, T, H, last_dim] where `like`'s is."""
    batch, heads, length, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, length, heads, last_dim)).transpose(1, 2)
    return like.new_empty((batch, heads, length, last_dim))


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in `like`'s dtype and in the memory that empty_like_heads would give it."""
    tensor = tensor.to(like.dtype)
    if like.stride(1) < like.stride(2):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()
