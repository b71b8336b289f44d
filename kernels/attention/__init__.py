"""Attention, a drop-in for torch.nn.functional.scaled_dot_product_attention with more patterns."""

from kernels.attention.decode import decode_attention
from kernels.attention.modules import CausalSelfAttention, KeyValueCache, MultiheadAttention
from kernels.attention.op import scaled_dot_product_attention
from kernels.attention.varlen import varlen_attention

__all__ = [
    "CausalSelfAttention",
    "KeyValueCache",
    "MultiheadAttention",
    "decode_attention",
    "scaled_dot_product_attention",
    "varlen_attention",
]
