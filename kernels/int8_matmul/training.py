"""Training with int8 products: `Int8TrainingLinear`, whose parameters stay in full precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.int8_matmul import checks
from kernels.int8_matmul.op import int8_linear, int8_matmul
from kernels.int8_matmul.quantized import Quantized
from kernels.int8_matmul.quantizing import quantize
from kernels.int8_matmul.rows.reference import LIMIT, TINY


def quantize_stochastically(x: Tensor) -> Quantized:
    """`quantize(x)`, rounded up or down by chance, so that the expected value is x.

    The chances are of PyTorch's generator of x's device (torch.manual_seed).
    """
    wide = x.float()
    absmax = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    finite, used = absmax < torch.inf, absmax >= TINY
    scale = torch.where(used, absmax / LIMIT, torch.ones_like(absmax))
    scale = scale.masked_fill(~finite, torch.nan)
    values = (wide / scale + torch.rand_like(wide)).floor().clamp(-LIMIT, LIMIT)
    return Quantized(torch.where(used & finite, values, 0.0).to(torch.int8), scale)


class _Int8TrainingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stochastic_rounding: bool
    ) -> Tensor:
        quantized = quantize(weight)
        ctx.save_for_backward(x, weight, bias, *quantized[:2])
        ctx.stochastic_rounding = stochastic_rounding
        y: Tensor = int8_linear(x, quantized, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, values, scale = ctx.saved_tensors
        dx = dweight = dbias = None
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            # With create_graph a derivative is needed, which int8 products have none of.
            if torch.is_grad_enabled() or weight.shape[0] > checks.MOST_TERMS:
                dx = (dy.to(weight.dtype) @ weight).to(x.dtype)
            else:
                # The scales of the weight's rows are along the sum, so they go to dy.
                scaled = rows.float() * scale[:, 0]
                quantizer = quantize_stochastically if ctx.stochastic_rounding else quantize
                left = quantizer(scaled)
                one = torch.ones((), device=x.device)
                dx = int8_matmul(left.values, values, left.scale, one, out_dtype=x.dtype)
                dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            columns = x.reshape(-1, x.shape[-1])
            dweight = (rows.to(weight.dtype).t() @ columns.to(weight.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0).to(bias.dtype)
        return dx, dweight, dbias, None


class Int8TrainingLinear(nn.Linear):
    """``torch.nn.Linear`` whose output and input gradient are int8 products; same parameters.

    In every forward weight and x are quantised by row.  The gradient of x is the product of dy,
    quantised by row, with the same int8 weight; those of weight and bias are computed in weight's
    dtype.  Rounding counts as the identity (straight-through estimator, arXiv:1308.3432).  Second
    derivatives are those of the float weight.  float64, meta tensors and torch.func transforms run
    nn.Linear's forward.

    Args:
        stochastic_rounding: dy is rounded up or down by chance, so that the gradient of x is
            right on average (Gupta et al., arXiv:1502.02551); reproducible by torch.manual_seed.
        All others: nn.Linear's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.stochastic_rounding = stochastic_rounding

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, stochastic_rounding: bool = False
    ) -> Int8TrainingLinear:
        """The same layer with the same Parameters, which are shared and not copied."""
        if type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                "Int8TrainingLinear.from_linear: linear must be an nn.Linear, not "
                f"{type(linear).__name__}"
            )
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            "meta",
            stochastic_rounding=stochastic_rounding,
        )
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        checks.check_float("Int8TrainingLinear", "input", input)
        if (
            torch.float64 in (input.dtype, self.weight.dtype)
            or input.is_meta
            or torch._C._are_functorch_transforms_active()
        ):
            return super().forward(input)
        y: Tensor = _Int8TrainingFunction.apply(
            input, self.weight, self.bias, self.stochastic_rounding
        )
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stochastic_rounding={self.stochastic_rounding}"
