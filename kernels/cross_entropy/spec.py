"""Cross-entropy as tests, bench and the command line see it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._spec import DIRECTIONS, Case, Direction, Inputs, Spec
from kernels.cross_entropy import memory, yardsticks
from kernels.cross_entropy.linear import linear_cross_entropy
from kernels.cross_entropy.op import cross_entropy


def _case(rows: int, classes: int) -> Case:
    return Case(f"{rows}x{classes}", {"rows": rows, "classes": classes})


def _linear_cases(rows: int, features: int, classes: int) -> tuple[Case, ...]:
    """Beside the linear map and the loss one after the other, and torch 2.13's own function."""
    name = f"linear {rows}x{features}x{classes}"
    beside_eager = Case(
        name,
        {"rows": rows, "features": features, "classes": classes},
        directions=("forward+backward",),
        compiled=False,
        quick=False,
    )
    if not hasattr(F, "linear_cross_entropy"):
        return (beside_eager,)
    beside_chunks = replace(
        beside_eager,
        name=f"{name}, torch's",
        torch_function=yardsticks.torch_in_chunks,
        yardstick=yardsticks.linear_then_cross_entropy,
    )
    return beside_eager, beside_chunks


def _run(*arguments: Any) -> Tensor:
    """(input, target), or (input, linear_weight, target)."""
    loss: Tensor = (linear_cross_entropy if len(arguments) == 3 else cross_entropy)(*arguments)
    return loss


def _run_torch(*arguments: Any) -> Tensor:
    if len(arguments) == 3:
        return yardsticks.linear_then_cross_entropy(*arguments)
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


Bars = dict[tuple[str, torch.dtype, Direction], float]
_TIMED = tuple(
    (dtype, direction) for dtype in (torch.float32, torch.bfloat16) for direction in DIRECTIONS
)


def _bars(large: tuple[float, ...], small: tuple[float, ...]) -> Bars:
    """Each of float32 forward, forward+backward, then bfloat16's."""
    return {
        (name, *timed): bar
        for name, values in (("1024x32000", large), ("8192x96", small))
        for timed, bar in zip(_TIMED, values, strict=True)
    }


LINEAR_CASES = _linear_cases(*memory.SIZES)

SPEC = Spec(
    op="cross_entropy",
    function=_run,
    torch_function=_run_torch,
    make_inputs=make_inputs,
    gradient_names=("dinput",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    accuracy_cases=(_case(64, 96), _case(37, 1001), _case(3, 40_000)),
    speed_cases=(_case(1024, 32_000), _case(8192, 96), *LINEAR_CASES),
    least_bytes=least_bytes,
    bars=_bars((12.0, 8.0, 8.0, 7.0), (1.6, 1.5, 1.6, 1.4))
    | {
        (case.name, dtype, "forward+backward"): bar
        for case, bars in zip(LINEAR_CASES, ((1.15, 1.15), (1.0, 2.0)), strict=False)
        for dtype, bar in zip((torch.float32, torch.bfloat16), bars, strict=True)
    },
    compile_bars=_bars((3.0, 4.2, 2.6, 4.3), (1.7, 2.0, 1.5, 1.8)),
    report_more=memory.report,
)
