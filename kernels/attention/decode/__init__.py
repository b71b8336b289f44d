"""Attention of the newest queries against a cache of keys and values."""

from kernels.attention.decode.op import decode_attention

__all__ = ["decode_attention"]
