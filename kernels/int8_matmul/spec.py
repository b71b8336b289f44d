"""Int8 linear layers as tests, bench and the command line see them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._spec import Case, Direction, Inputs, Spec
from kernels.int8_matmul import yardsticks
from kernels.int8_matmul.op import int8_linear
from kernels.int8_matmul.quantized import Quantized
from kernels.int8_matmul.quantizing import quantize
from kernels.int8_matmul.rows.reference import quantize_rows


def torch_linear(
    x: Tensor, quantized: Quantized, bias: Tensor, *, mode: str, weight: Tensor
) -> Tensor:
    """F.linear with the weight before it was quantised."""
    return F.linear(x, weight, bias)


def torch_quantized(
    x: Tensor, quantized: Quantized, bias: Tensor, *, mode: str, weight: Tensor
) -> Tensor:
    """The formula of README.md in PyTorch's ops, in float32 or wider, rounded to x's dtype once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values, scale = x.to(wide), quantized.scale[:, 0].to(wide)
    if mode == "dynamic":
        rounded, x_scale = quantize_rows(x)
        values, scale = rounded.to(wide), scale * x_scale.to(wide)[:, None]
    y = (values @ quantized.values.to(wide).t()) * scale + bias.to(wide)
    return y.to(x.dtype)


def _case(mode: str, m: int, n: int = 2048, k: int = 2048) -> Case:
    return Case(
        f"{mode} {m}x{n}x{k}",
        {"M": m, "N": n, "K": k},
        {"mode": mode},
        directions=("forward",),
        compiled=False,
        quick=m < 1024,
    )


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Normal activations and weights, a bias."""
    m, n, k = case.sizes.values()
    generator = torch.Generator().manual_seed(m * 1_000_003 + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = normal(m, k), normal(n, k) / k**0.5, normal(n)
    x, weight, bias = (tensor.to(device=device, dtype=dtype) for tensor in tensors)
    mode = case.options["mode"]
    return Inputs(
        (x, quantize(weight), bias), (), x, {"mode": mode}, {"mode": mode, "weight": weight}
    )


def flops(case: Case, direction: Direction) -> int:
    m, n, k = case.sizes.values()
    return 2 * m * n * k


# The least PyTorch's time over ours may be, beside nn.Linear in float32 and in bfloat16.
BARS = {1: (12.0, 8.0), 16: (10.0, 2.9), 256: (4.6, 2.1), 1024: (4.4, 2.1)}
SPEED_CASES = (_case("weight_only", 1), *(_case("dynamic", m) for m in BARS))

SPEC = Spec(
    op="int8_matmul",
    function=int8_linear,
    torch_function=torch_linear,
    yardstick=torch_quantized,
    make_inputs=make_inputs,
    gradient_names=(),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    accuracy_cases=(
        *(_case(mode, 100, 1001, 777) for mode in ("dynamic", "weight_only")),
        *(_case(mode, 1, 768, 3072) for mode in ("dynamic", "weight_only")),
    ),
    speed_cases=(*SPEED_CASES, _case("dynamic", 100, 1001, 777)),
    flops=flops,
    bars={
        (case.name, dtype, "forward"): bar
        for case in SPEED_CASES
        for dtype, bar in zip((torch.float32, torch.bfloat16), BARS[case.sizes["M"]], strict=True)
    },
    report_more=yardsticks.report,
)
