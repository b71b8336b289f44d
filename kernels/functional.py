"""The functions of all ops in one namespace, like torch.nn.functional."""

from kernels.attention import decode_attention, scaled_dot_product_attention, varlen_attention
from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.int8_matmul import int8_linear, int8_matmul, layer_norm_quantize
from kernels.layer_norm import layer_norm

__all__ = [
    "cross_entropy",
    "decode_attention",
    "int8_linear",
    "int8_matmul",
    "layer_norm",
    "layer_norm_quantize",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
    "varlen_attention",
]
