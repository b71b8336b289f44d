"""Layer normalisation, a drop-in for torch.nn.functional.layer_norm and torch.nn.LayerNorm."""

from kernels.layer_norm.op import LayerNorm, layer_norm

__all__ = ["LayerNorm", "layer_norm"]
