"""What int8_linear is measured beside: PyTorch's other int8 paths, in one more table."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

from kernels import _timing
from kernels.int8_matmul.op import int8_linear
from kernels.int8_matmul.quantized import Quantized
from kernels.int8_matmul.quantizing import quantize
from kernels.int8_matmul.rows.op import layer_norm_quantize
from kernels.int8_matmul.rows.reference import quantize_rows
from kernels.layer_norm import layer_norm

SIZE = 2048  # N and K
SECONDS = 1.0  # of each row
# The least time of theirs over ours: torch.ao's dynamic linear, torch._int_mm alone.
BARS = {1: (1.8, 1.2), 16: (1.2, 3.0), 256: (1.15, 1.1), 1024: (1.12, 1.0)}
EAGER_ROWS, EAGER_BAR = 256, 1.15
LAYER_NORM_BAR = 1.15
RAGGED, ALIGNED = (100, 1001, 777), (96, 1024, 768)  # M, N, K
RAGGED_BAR = 0.75  # of the aligned size's rate


def eager_linear(x: Tensor, weight: Quantized, bias: Tensor) -> Tensor:
    """Quantise, torch._int_mm, dequantise and bias: one op after the other."""
    values, scale = quantize_rows(x)
    sums = torch._int_mm(values, weight.values.t())
    return sums.float() * (weight.scale[:, 0] * scale[:, None]) + bias


def torch_ao_linear(linear: nn.Linear) -> nn.Module:
    """torch.ao's dynamically quantised linear: uint8 activations with one scale for all rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.ao about itself
        converted = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8
        )
    module: nn.Module = converted[0]
    return module


def _inputs(m: int, n: int, k: int) -> tuple[Tensor, nn.Linear, Quantized, Tensor]:
    linear = nn.Linear(k, n)
    return torch.randn(m, k), linear, quantize(linear.weight), linear.bias.detach()


def _ratio(theirs: _timing.Timing, ours: _timing.Timing, bar: float) -> str:
    ratio = theirs.median / ours.median
    return f"{ratio:.2f} (>= {bar:.2f})" + ("" if ratio >= bar else "  MISSED")


def _beside_torch(m: int, seconds: float) -> list[str]:
    """One row: ours in microseconds, and the ratios."""
    x, linear, weight, bias = _inputs(m, SIZE, SIZE)
    values, _ = quantize_rows(x)
    torch_ao = torch_ao_linear(linear)
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: int8_linear(x, weight, bias),
        "torch.ao": lambda: torch_ao(x),
        "_int_mm": lambda: torch._int_mm(values, weight.values.t()),
    }
    if m == EAGER_ROWS:
        candidates["eager"] = lambda: eager_linear(x, weight, bias)
    times = _timing.interleaved(candidates, seconds)
    ours = times["ours"]
    cells = [
        _ratio(times[name], ours, bar)
        for name, bar in zip(("torch.ao", "_int_mm"), BARS[m], strict=True)
    ]
    cells.append(_ratio(times["eager"], ours, EAGER_BAR) if "eager" in times else "-")
    return [f"{m}x{SIZE}x{SIZE}", f"{ours.median * 1e6:.1f}", *cells]


def _after_layer_norm(seconds: float) -> str:
    """layer_norm, then int8_linear, beside layer_norm_quantize and int8_linear."""
    x, _, weight, bias = _inputs(EAGER_ROWS, SIZE, SIZE)
    gain, shift = torch.randn(SIZE), torch.randn(SIZE)
    times = _timing.interleaved(
        {
            "two": lambda: int8_linear(layer_norm(x, (SIZE,), gain, shift), weight, bias),
            "ours": lambda: int8_linear(layer_norm_quantize(x, SIZE, gain, shift), weight, bias),
        },
        seconds,
    )
    return _ratio(times["two"], times["ours"], LAYER_NORM_BAR)


def _ragged(seconds: float) -> str:
    """The rate of an odd size over that of the nearest even one."""
    calls: dict[str, Callable[[], object]] = {}
    for name, sizes in (("ragged", RAGGED), ("aligned", ALIGNED)):
        x, _, weight, bias = _inputs(*sizes)
        calls[name] = functools.partial(int8_linear, x, weight, bias)
    times = _timing.interleaved(calls, seconds)
    operations = {name: m * n * k for name, (m, n, k) in (("ragged", RAGGED), ("aligned", ALIGNED))}
    rates = {name: operations[name] / times[name].median for name in times}
    share = rates["ragged"] / rates["aligned"]
    missed = "" if share >= RAGGED_BAR else "  MISSED"
    return f"{share:.2f} (>= {RAGGED_BAR:.2f}){missed}"


@torch.no_grad()
def report(seconds: float = SECONDS) -> None:
    """The table that `python -m kernels check int8_matmul` ends with."""
    rows = [_beside_torch(m, seconds) for m in BARS]
    print(
        "\nint8_linear, mode dynamic, float32 x, with bias: PyTorch's time over ours.\n"
        "_int_mm is the product alone; eager is quantise, _int_mm, dequantise, bias."
    )
    headers = ("M x N x K", "ours µs", "torch.ao dynamic", "_int_mm alone", "eager int8")
    print(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))
    print(
        f"layer_norm + int8_linear over layer_norm_quantize + int8_linear, {EAGER_ROWS}x{SIZE}: "
        f"{_after_layer_norm(seconds)}\n"
        f"operations per second at {'x'.join(map(str, RAGGED))} over "
        f"{'x'.join(map(str, ALIGNED))}: {_ragged(seconds)}"
    )
