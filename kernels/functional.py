"""The functions of all ops in one namespace, like torch.nn.functional."""

from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.layer_norm import layer_norm

__all__ = ["cross_entropy", "layer_norm", "linear_cross_entropy"]
