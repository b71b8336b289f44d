"""The reference GPT: a small language model built from this package's layers or from PyTorch's."""

from kernels.gpt.config import PRESETS, GPTConfig, Preset
from kernels.gpt.layers import FUSED, TORCH, Layers
from kernels.gpt.model import GPT

__all__ = ["FUSED", "GPT", "PRESETS", "TORCH", "GPTConfig", "Layers", "Preset"]
