"""Tests of kernels.int8_matmul."""
