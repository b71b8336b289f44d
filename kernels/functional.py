"""The functions of all ops in one namespace, like torch.nn.functional."""

from kernels.layer_norm import layer_norm

__all__ = ["layer_norm"]
