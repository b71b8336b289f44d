"""Layer norm as tests, bench and the command line see it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._spec import Case, Direction, Inputs, Spec
from kernels.layer_norm.op import layer_norm


def _case(rows: int, cols: int) -> Case:
    return Case(f"{rows}x{cols}", {"rows": rows, "cols": cols})


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Rows of different means and scales, a weight around 1, a bias, all in `dtype`."""
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    generator = torch.Generator().manual_seed(rows * 1_000_003 + cols)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(rows, cols) * (0.5 + torch.rand(rows, 1, generator=generator)) + normal(rows, 1)
    tensors = (x, 1 + 0.1 * normal(cols), normal(cols), normal(rows, cols))
    x, weight, bias, dy = (tensor.to(device=device, dtype=dtype) for tensor in tensors)
    return Inputs((x, (cols,), weight, bias, 1e-5), (0, 2, 3), dy)


def least_bytes(case: Case, dtype: torch.dtype, direction: Direction) -> int:
    """x in, y out; backward reads x and dy and writes dx.  Weights and statistics stay cached."""
    sweeps = 2 if direction == "forward" else 5
    return sweeps * case.sizes["rows"] * case.sizes["cols"] * dtype.itemsize


def _bars() -> dict[tuple[str, torch.dtype, Direction], float]:
    bars: dict[tuple[str, torch.dtype, Direction], float] = {}
    for name in ("4096x1024", "8192x512"):
        bars[name, torch.float32, "forward"] = 1.45
        bars[name, torch.bfloat16, "forward"] = 1.8
        bars[name, torch.float32, "forward+backward"] = 1.5
        bars[name, torch.bfloat16, "forward+backward"] = 2.1
    for direction in ("forward", "forward+backward"):
        bars["64x768", torch.float32, direction] = 0.95
        bars["64x768", torch.bfloat16, direction] = 1.0
    return bars


SPEC = Spec(
    op="layer_norm",
    function=layer_norm,
    torch_function=F.layer_norm,
    make_inputs=make_inputs,
    gradient_names=("dx", "dweight", "dbias"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    accuracy_cases=(_case(64, 768), _case(37, 1001), _case(3, 40_000)),
    speed_cases=(_case(4096, 1024), _case(8192, 512), _case(64, 768)),
    least_bytes=least_bytes,
    bars=_bars(),
)
