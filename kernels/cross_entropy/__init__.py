"""Softmax cross-entropy, drop-ins for torch's functions and modules of these names."""

from kernels.cross_entropy.linear import LinearCrossEntropyLoss, linear_cross_entropy
from kernels.cross_entropy.op import CrossEntropyLoss, cross_entropy, shift_labels

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "cross_entropy",
    "linear_cross_entropy",
    "shift_labels",
]
