"""The functions of all ops in one namespace, like torch.nn.functional."""

from kernels.attention import decode_attention, scaled_dot_product_attention, varlen_attention
from kernels.layer_norm import layer_norm

__all__ = [
    "decode_attention",
    "layer_norm",
    "scaled_dot_product_attention",
    "varlen_attention",
]
