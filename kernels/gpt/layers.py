"""The pieces of the GPT that exist both in PyTorch and fused, and the two sets of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.attention import CausalSelfAttention, KeyValueCache
from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.layer_norm import LayerNorm


class TorchSelfAttention(CausalSelfAttention):
    """The same module on F.scaled_dot_product_attention, for causal attention without a window."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)

    def attend_cache(self, q: Tensor, cache: KeyValueCache) -> Tensor:
        length, new = cache.length, q.shape[2]
        seen = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
        key, value = cache.key[:, :, :length], cache.value[:, :, :length]
        return F.scaled_dot_product_attention(q, key, value, seen)


def _linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """F.linear_cross_entropy, which torch has from 2.13 on."""
    return F.cross_entropy(F.linear(input, linear_weight), target)


@dataclass(frozen=True)
class Layers:
    """What ``GPT(config, layers)`` is built from."""

    layer_norm: type[nn.LayerNorm]
    self_attention: type[CausalSelfAttention]
    cross_entropy: Callable[..., Tensor]  # F.cross_entropy
    linear_cross_entropy: Callable[..., Tensor]  # F.linear_cross_entropy


TORCH = Layers(
    layer_norm=nn.LayerNorm,
    self_attention=TorchSelfAttention,
    cross_entropy=F.cross_entropy,
    linear_cross_entropy=_linear_cross_entropy,
)

FUSED = Layers(
    layer_norm=LayerNorm,
    self_attention=CausalSelfAttention,
    cross_entropy=cross_entropy,
    linear_cross_entropy=linear_cross_entropy,
)

LAYERS = {"torch": TORCH, "fused": FUSED}  # by the name used on the command line
