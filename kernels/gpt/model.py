"""The GPT: embeddings, blocks of causal attention and a two-layer MLP, and the head.

Follows Radford et al., "Language models are unsupervised multitask learners" (2019), with pre- or
post-norm. Shapes: B sequences, T tokens, C = n_embd, H heads of D = C / H, V = vocab_size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from kernels.attention import KeyValueCache
from kernels.gpt.config import GPTConfig
from kernels.gpt.layers import TORCH, Layers
from kernels.int8_matmul import Int8Embedding
from kernels.int8_matmul.linear import Int8Weight

INIT_STD = 0.02


class MLP(nn.Module):
    """Widens every token to 4C, applies the activation and narrows it again."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = nn.GELU() if config.activation == "gelu" else nn.ReLU()
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.activation(self.fc(x)))


class Block(nn.Module):
    """Attention, then the MLP, each with dropout, a residual and a layer norm."""

    def __init__(self, config: GPTConfig, layers: Layers) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.norm1 = layers.layer_norm(config.n_embd, bias=config.bias)
        self.attention = layers.self_attention(
            config.n_embd,
            config.n_head,
            qkv_bias=config.qkv_bias,
            bias=config.bias,
            dropout=config.dropout,
        )
        self.norm2 = layers.layer_norm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm1(x), cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, cache)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class GPT(nn.Module):
    """A decoder-only transformer over token ids.

    `layers` chooses PyTorch's own pieces (`TORCH`) or this package's (`FUSED`); parameter names do
    not depend on it, so the state_dict of one loads into the other. The same `seed` gives the same
    parameters, bit for bit, whatever the layers.
    """

    def __init__(self, config: GPTConfig, layers: Layers = TORCH, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.cross_entropy = layers.cross_entropy
        self.linear_cross_entropy = layers.linear_cross_entropy
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layers) for _ in range(config.n_layer))
        if config.norm == "pre":
            self.final_norm: nn.Module = layers.layer_norm(config.n_embd, bias=config.bias)
        else:
            self.final_norm = nn.Identity()  # the last block already ends with a norm
        if not config.tie_weights:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """GPT-2's: normal with std 0.02, narrower for what is added to the residual stream."""
        generator = torch.Generator().manual_seed(seed)
        # Each of 2 n_layer sub-layers adds to the stream: this keeps the sum's variance at one's.
        residual_std = INIT_STD / (2 * self.config.n_layer) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith("proj.weight") else INIT_STD
                nn.init.normal_(parameter, std=std, generator=generator)
            elif "norm" not in name:  # a layer norm starts at weight 1, bias 0 by itself
                nn.init.zeros_(parameter)

    def new_cache(self, batch: int) -> list[KeyValueCache]:
        """Empty caches, one a block, for up to block_size tokens of `batch` sequences."""
        attentions = (cast(Block, block).attention for block in self.blocks)
        embedding: nn.Embedding | Int8Embedding = self.token_embedding
        dtype = embedding.dtype if isinstance(embedding, Int8Embedding) else embedding.weight.dtype
        size = self.config.block_size
        return [attention.new_cache(batch, size, dtype) for attention in attentions]

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
        with_logits: bool = True,
    ) -> tuple[Any, torch.Tensor | None]:
        """Logits [B, T, V] of the tokens that follow `idx` [B, T] (int64), and the mean loss.

        The loss is the cross-entropy, in nats per token, against `targets` [B, T]; None without.
        With targets the logits can be done without: then they are None, and the fused layers
        never store them whole.
        With a cache (for inference) `idx` goes on after the tokens in it, and is added to it.
        Raises ValueError where T, together with what is cached, exceeds block_size.
        """
        start = cache[0].length if cache else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"idx ends at {end} tokens, block_size is {self.config.block_size}")
        positions = torch.arange(start, end, device=idx.device)
        x = self.dropout(self.token_embedding(idx) + self.position_embedding(positions))
        for number, block in enumerate(self.blocks):
            x = block(x, cache[number] if cache else None)
        head: nn.Module = self.token_embedding if self.config.tie_weights else self.head
        x = self.final_norm(x)
        if isinstance(head, Int8Weight):
            logits = head.linear(x)
        elif targets is not None and not with_logits:
            weight = cast(torch.Tensor, head.weight)
            return None, self.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())
        else:
            logits = F.linear(x, cast(torch.Tensor, head.weight))
        if targets is None:
            return logits, None
        loss = self.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return (logits if with_logits else None), loss
