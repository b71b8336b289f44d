"""Softmax cross-entropy, drop-ins for torch's functions and modules of these names."""

from kernels.cross_entropy.op import CrossEntropyLoss, cross_entropy, shift_labels

__all__ = ["CrossEntropyLoss", "cross_entropy", "shift_labels"]
