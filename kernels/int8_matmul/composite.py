"""Int8 calls of PyTorch's differentiable ops: for torch.func, and for weights no kernel takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8_matmul import reference
from kernels.int8_matmul.calls import Call
from kernels.int8_matmul.quantized import Quantized, dequantize
from kernels.int8_matmul.rows.reference import quantize_rows


def straight_through(call: Call) -> Tensor:
    """The call, with x + constant in the place of rounded x: differentiable in x and bias."""
    if call.mode in ("raw", "int8"):
        return reference.forward(*call)[0]
    assert call.weight_scale is not None
    wide = torch.float64 if torch.float64 in (call.x.dtype, call.out_dtype) else torch.float32
    x = call.x.to(wide)
    if call.mode != "weight_only":
        if call.x_scale is None:
            values, scale = quantize_rows(call.x.detach())
        else:
            values, scale = reference.quantize_by(call.x.detach(), call.x_scale)
        x = x + (values.to(wide) * scale[:, None] - x).detach()
    sums = x @ call.weight.to(wide).t()
    rest = call.weight_scale, call.bias, call.activation, call.out_dtype
    return reference.epilogue(sums, None, *rest)


def linear(
    x: Tensor,
    weight: Quantized,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """F.linear with the dequantised weight: any Quantized will do."""
    wide = torch.float64 if torch.float64 in (x.dtype, out_dtype) else torch.float32
    y = F.linear(x.to(wide), dequantize(weight, wide), None if bias is None else bias.to(wide))
    return reference.activate(y, activation).to(out_dtype)


def activation_gradient(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z where y = activation(z); differentiable."""
    if activation == "relu":
        return torch.where(z <= 0, 0.0, dy)  # a NaN lets it through, as in PyTorch
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, z, approximate=approximate)
