"""Int8 matmul and linear layers, with quantisation, scales and activation in the kernels."""

from kernels.int8_matmul.op import int8_linear, int8_matmul
from kernels.int8_matmul.quantized import Quantized, dequantize
from kernels.int8_matmul.quantizing import quantize
from kernels.int8_matmul.rows import layer_norm_quantize

__all__ = [
    "Quantized",
    "dequantize",
    "int8_linear",
    "int8_matmul",
    "layer_norm_quantize",
    "quantize",
]
