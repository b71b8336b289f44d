"""Rows of a matrix, or of its layer norm, as int8 with a scale each."""

from kernels.int8_matmul.rows.op import layer_norm_quantize

__all__ = ["layer_norm_quantize"]
