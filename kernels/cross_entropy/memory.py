"""The memory of a training step of linear + cross-entropy, measured in a process of its own.

`python -m kernels.cross_entropy.memory FUNCTION DTYPE ROWS FEATURES CLASSES` prints the bytes a
second step takes at its peak beyond its inputs and the gradients it returns; Linux only.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from kernels.cross_entropy import yardsticks
from kernels.cross_entropy.linear import linear_cross_entropy

SIZES = (2048, 512, 32_000)  # rows, features, classes
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eager": yardsticks.linear_then_cross_entropy,
    "ours": linear_cross_entropy,
}
_STATUS = Path("/proc/self/status")
_MEBI = 2**20


def _resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def of_step(function: Callable[..., Any], dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
    """Bytes at the peak of a second step, without inputs and returned gradients."""
    rows, features, classes = sizes
    x = torch.randn(rows, features).to(dtype).requires_grad_()
    linear_weight = (torch.randn(classes, features) / features**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    # A first step: what the matmul library keeps for good is no part of either function.
    function(x, linear_weight, target).backward()
    x.grad = linear_weight.grad = None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc kept would count for nothing
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = _resident("VmRSS")
    function(x, linear_weight, target).backward()
    assert x.grad is not None
    assert linear_weight.grad is not None
    return _resident("VmHWM") - before - x.grad.nbytes - linear_weight.grad.nbytes


def in_child(function: str, dtype: str, sizes: tuple[int, ...] = SIZES) -> int:
    arguments = [sys.executable, "-m", __name__, function, dtype, *map(str, sizes)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return int(done.stdout)


def report() -> None:
    """The table that `python -m kernels check cross_entropy` ends with."""
    if not _STATUS.exists():
        print("memory of linear + cross-entropy is measured on Linux only")
        return
    rows = []
    for dtype in ("float32", "bfloat16"):
        taken = {name: in_child(name, dtype) for name in FUNCTIONS}
        share = taken["eager"] / max(1, taken["ours"])
        missed = "" if share >= 16 else "  MISSED"
        cells = (f"{taken[name] / _MEBI:.0f}" for name in FUNCTIONS)
        rows.append((dtype, *cells, f"1/{share:.1f}", f"<= 1/16{missed}"))
    print(
        f"\nlinear {'x'.join(map(str, SIZES))}: peak memory of a second step beyond inputs and "
        "returned gradients, MiB"
    )
    headers = ("dtype", *FUNCTIONS, "ours / eager", "bar")
    print(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))


if __name__ == "__main__":
    name, dtype_name, *numbers = sys.argv[1:]
    print(of_step(FUNCTIONS[name], getattr(torch, dtype_name), tuple(map(int, numbers))))
