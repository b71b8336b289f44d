"""Attention, a drop-in for torch.nn.functional.scaled_dot_product_attention with more patterns."""

from kernels.attention.op import scaled_dot_product_attention

__all__ = ["scaled_dot_product_attention"]
