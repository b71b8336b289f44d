"""The pieces of the GPT that exist both in PyTorch and fused, and the two sets of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.layer_norm import LayerNorm


def _linear_cross_entropy(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """F.linear_cross_entropy, which torch has from 2.13 on."""
    return F.cross_entropy(F.linear(input, linear_weight), target)


@dataclass(frozen=True)
class Layers:
    """What ``GPT(config, layers)`` calls; every entry has the signature of PyTorch's own."""

    layer_norm: type[nn.LayerNorm]
    attention: Callable[..., torch.Tensor]  # F.scaled_dot_product_attention
    cross_entropy: Callable[..., torch.Tensor]  # F.cross_entropy
    linear_cross_entropy: Callable[..., torch.Tensor]  # F.linear_cross_entropy


TORCH = Layers(
    layer_norm=nn.LayerNorm,
    attention=F.scaled_dot_product_attention,
    cross_entropy=F.cross_entropy,
    linear_cross_entropy=_linear_cross_entropy,
)

# PyTorch's op stands where this package has no fused one.
FUSED = Layers(
    layer_norm=LayerNorm,
    attention=F.scaled_dot_product_attention,
    cross_entropy=cross_entropy,
    linear_cross_entropy=linear_cross_entropy,
)

LAYERS = {"torch": TORCH, "fused": FUSED}  # by the name used on the command line
