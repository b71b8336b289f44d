"""Cross-entropy as tests, bench and the command line see it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._spec import Case, Direction, Inputs, Spec
from kernels.cross_entropy.linear import linear_cross_entropy
from kernels.cross_entropy.op import cross_entropy


def _case(rows: int, classes: int) -> Case:
    return Case(f"{rows}x{classes}", {"rows": rows, "classes": classes})


def _linear_case(rows: int, features: int, classes: int) -> Case:
    sizes = {"rows": rows, "features": features, "classes": classes}
    return Case(f"linear {rows}x{features}x{classes}", sizes, quick=False)


def _run(*arguments: Any) -> Tensor:
    """(input, target), or (input, linear_weight, target)."""
    loss: Tensor = (linear_cross_entropy if len(arguments) == 3 else cross_entropy)(*arguments)
    return loss


def _run_torch(*arguments: Any) -> Tensor:
    if len(arguments) == 3:
        return F.cross_entropy(F.linear(arguments[0], arguments[1]), arguments[2])
    return F.cross_entropy(*arguments)


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Rows of unlike logits (or features and a linear map to them), and random classes."""
    rows, classes = case.sizes["rows"], case.sizes["classes"]
    generator = torch.Generator().manual_seed(rows * 1_000_003 + classes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = torch.randint(0, classes, (rows,), generator=generator).to(device)
    features = case.sizes.get("features")
    if features is None:
        tensors: list[Tensor] = [
            normal(rows, classes) * (1 + torch.rand(rows, 1, generator=generator))
        ]
    else:
        tensors = [normal(rows, features), normal(classes, features) / features**0.5]
    tensors = [tensor.to(device=device, dtype=dtype) for tensor in tensors]
    gradient = torch.ones((), device=device, dtype=dtype)
    return Inputs((*tensors, target), tuple(range(len(tensors))), gradient)


def least_bytes(case: Case, dtype: torch.dtype, direction: Direction) -> int:
    """Forward reads the logits; backward reads them again and writes their gradient.

    A linear map and its loss read input and linear_weight, and write their gradients.
    """
    sizes = case.sizes
    if "features" in sizes:
        elements = (sizes["rows"] + sizes["classes"]) * sizes["features"]
        return (1 if direction == "forward" else 3) * elements * dtype.itemsize
    sweeps = 1 if direction == "forward" else 3
    return sweeps * sizes["rows"] * sizes["classes"] * dtype.itemsize


def _bars() -> dict[tuple[str, torch.dtype, Direction], float]:
    bars: dict[tuple[str, torch.dtype, Direction], float] = {}
    for dtype, large, small in (
        (torch.float32, (12.0, 8.0), (1.6, 1.5)),
        (torch.bfloat16, (8.0, 7.0), (1.6, 1.4)),
    ):
        for name, (forward, both) in (("1024x32000", large), ("8192x96", small)):
            bars[name, dtype, "forward"], bars[name, dtype, "forward+backward"] = forward, both
        bars["linear 2048x512x32000", dtype, "forward+backward"] = 1.15
    return bars


SPEC = Spec(
    op="cross_entropy",
    function=_run,
    torch_function=_run_torch,
    make_inputs=make_inputs,
    gradient_names=("dinput",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    accuracy_cases=(_case(64, 96), _case(37, 1001), _case(3, 40_000)),
    speed_cases=(_case(1024, 32_000), _case(8192, 96), _linear_case(2048, 512, 32_000)),
    least_bytes=least_bytes,
    bars=_bars(),
)
