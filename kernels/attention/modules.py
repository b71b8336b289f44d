"""Modules around the op: PyTorch's MultiheadAttention, and a GPT's self-attention with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.attention.decode import decode_attention
from kernels.attention.op import scaled_dot_product_attention


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``, fused: same arguments, parameters and state_dict.

    With need_weights=False the attention is this package's, and masks stay as they are given: a
    padding mask is never expanded to all heads and queries.  Where the weights are asked for (the
    default, as PyTorch's) and for whatever PyTorch refuses, PyTorch's own forward runs.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights or not self._takes(
            query, key, value, key_padding_mask, attn_mask, is_causal
        ):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        unbatched = query.dim() == 2
        time_first = not self.batch_first and not unbatched
        # [..., L, E] -> three of [N, H, L, D]
        q, k, v = (self._heads(x, time_first) for x in self._project(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
        if self.add_zero_attn:
            zero = k.new_zeros((1, 1, self.embed_dim))
            k, v = self._append(k, zero), self._append(v, zero)
        is_causal = is_causal and key_padding_mask is None
        mask = None if is_causal else self._mask(attn_mask, key_padding_mask, q, k)
        dropout_p = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        if unbatched:
            out = out[0].transpose(0, 1)
        elif time_first:
            out = out.permute(2, 0, 1, 3)
        else:
            out = out.transpose(1, 2)
        return self.out_proj(out.flatten(-2)), None

    def _takes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether PyTorch's forward would take these shapes and dtypes."""
        rank = query.dim()
        if query.is_nested or rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
            return False
        time = 0 if rank == 2 or not self.batch_first else 1
        batch = query.shape[1 - time] if rank == 3 else 1
        if (
            query.shape[-1] != self.embed_dim
            or key.shape[-1] != self.kdim
            or value.shape[-1] != self.vdim
            or key.shape[:-1] != value.shape[:-1]
            or (rank == 3 and key.shape[1 - time] != batch)
        ):
            return False
        length_q, length_k = query.shape[time], key.shape[time]
        if attn_mask is None:
            if is_causal:
                return False
        elif not _is_mask(
            attn_mask, ((length_q, length_k), (batch * self.num_heads, length_q, length_k))
        ):
            return False
        padding = (length_k,) if rank == 2 else (batch, length_k)
        return key_padding_mask is None or _is_mask(key_padding_mask, (padding,))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The input projections; one matrix product for equal inputs."""
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            inputs = query, key, value
            return tuple(F.linear(*call) for call in zip(inputs, weights, biases, strict=True))
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        sizes = (self.embed_dim, 2 * self.embed_dim)
        first, rest = weight.split(sizes)
        first_bias, rest_bias = (None, None) if bias is None else bias.split(sizes)
        q = F.linear(query, first, first_bias)
        if key is value:
            return (q, *F.linear(key, rest, rest_bias).chunk(2, -1))
        k_bias, v_bias = (None, None) if rest_bias is None else rest_bias.chunk(2)
        k_weight, v_weight = rest.chunk(2)
        return q, F.linear(key, k_weight, k_bias), F.linear(value, v_weight, v_bias)

    def _heads(self, x: Tensor, time_first: bool) -> Tensor:
        """[L, E], [L, N, E] or [N, L, E] -> [N, H, L, D], a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.permute(1, 2, 0, 3) if time_first else x.transpose(1, 2)

    def _append(self, x: Tensor, last: Tensor) -> Tensor:
        """One more key or value, [1, 1, E], after [N, H, S, D]."""
        last = last.to(x.dtype).view(1, self.num_heads, 1, self.head_dim)
        return torch.cat((x, last.expand(x.shape[0], -1, -1, -1)), 2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Both masks in one for scaled_dot_product_attention, where True takes part."""
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(q.shape[0], 1, 1, -1)
        masks = [m for m in (attn_mask, key_padding_mask) if m is not None]
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            mask = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        else:
            mask = sum(_additive(m, q.dtype) for m in masks)  # type: ignore[assignment]
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # appended keys are always seen
        return ~mask if mask.dtype == torch.bool else mask


def _is_mask(mask: Tensor, shapes: tuple[tuple[int, ...], ...]) -> bool:
    return tuple(mask.shape) in shapes and (mask.dtype == torch.bool or mask.is_floating_point())


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


class KeyValueCache:
    """The keys and values of the tokens one layer has seen, in memory for `capacity` of them."""

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, heads, capacity, head_dim)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self.length = 0
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Adds [B, Hkv, T, D] of the next T tokens.  Raises ValueError where they do not fit."""
        end = self.length + key.shape[2]
        if end > self.key.shape[2]:
            raise ValueError(
                f"KeyValueCache: holds {self.length} of {self.key.shape[2]} tokens, "
                f"{key.shape[2]} more do not fit"
            )
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end
        self.lengths.fill_(end)


class CausalSelfAttention(nn.Module):
    """A GPT's self-attention: one projection to queries, keys and values, and one back.

    forward(x [B, T, C]) returns [B, T, C]; with a cache, x is what follows the cached tokens.

    Args:
        embed_dim: C; num_heads: H, which divides it; D = C / H.
        num_kv_heads: Hkv, which divides H; default H.
        qkv_bias, bias: whether the projections have one.
        dropout: probability of dropping a weight while training.
        window, global_tokens, softcap: as for scaled_dot_product_attention.
    """

    DECODE_TOKENS = 16  # the most new tokens that decode_attention's kernels take

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qkv_bias: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        window: tuple[int | None, int | None] | None = None,
        global_tokens: int = 0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={kv_heads}")
        self.heads = (num_heads, kv_heads, kv_heads)  # of queries, keys and values
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.pattern: dict[str, Any] = {
            "window": window,
            "global_tokens": global_tokens,
            "softcap": softcap,
        }
        self.qkv = nn.Linear(embed_dim, sum(self.heads) * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype | None = None
    ) -> KeyValueCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens.

        `dtype` is that of the keys: qkv.weight's where it is None.
        """
        weight = self.qkv.weight
        heads, size = self.heads[1], self.head_dim
        return KeyValueCache(batch, heads, capacity, size, dtype or weight.dtype, weight.device)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        # [B, T, (H + 2 Hkv) D] -> [B, H, T, D] and two of [B, Hkv, T, D]
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.heads, 1)
        if cache is None:
            y = self.attend(q, k, v)
        else:
            if torch.is_grad_enabled():
                raise RuntimeError("a cache has no gradient: call under torch.no_grad()")
            cache.append(k, v)
            y = self.attend_cache(q, cache)
        return self.proj(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, T, D], every token seeing those before it."""
        dropout_p = self.dropout if self.training else 0.0
        return scaled_dot_product_attention(
            q, k, v, None, dropout_p, True, enable_gqa=True, **self.pattern
        )

    def attend_cache(self, q: Tensor, cache: KeyValueCache) -> Tensor:
        """The same for the last T of the cached tokens."""
        if q.shape[2] <= self.DECODE_TOKENS:
            return decode_attention(q, cache.key, cache.value, cache.lengths, **self.pattern)
        return scaled_dot_product_attention(
            q,
            cache.key[:, :, : cache.length],
            cache.value[:, :, : cache.length],
            is_causal=True,
            enable_gqa=True,
            causal_alignment="lower_right",
            **self.pattern,
        )
