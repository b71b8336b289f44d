"""Int8 matmul and linear layers, with quantisation, scales and activation in the kernels."""

from kernels.int8_matmul.calibration import Smoothing, calibrate, smooth_
from kernels.int8_matmul.linear import Int8Embedding, Int8Linear
from kernels.int8_matmul.model import quantize_model_
from kernels.int8_matmul.op import int8_linear, int8_matmul
from kernels.int8_matmul.quantized import Quantized, dequantize
from kernels.int8_matmul.quantizing import quantize
from kernels.int8_matmul.rows import layer_norm_quantize
from kernels.int8_matmul.training import Int8TrainingLinear

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "Int8TrainingLinear",
    "Quantized",
    "Smoothing",
    "calibrate",
    "dequantize",
    "int8_linear",
    "int8_matmul",
    "layer_norm_quantize",
    "quantize",
    "quantize_model_",
    "smooth_",
]
