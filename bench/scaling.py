"""How attention's time and memory grow with the length: `python -m bench scaling`.

Causal attention computes T² / 2 scores a head, a window T times its width: time over T², and time
over T, should not depend on T.  Nothing of size T² is kept, so memory should grow with T.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from kernels import _check, _timing
from kernels._spec import DIRECTIONS, Direction, Inputs
from kernels.attention.op import scaled_dot_product_attention

HEADS, HEAD_DIM, WINDOW = 8, 64, 256
LENGTHS = tuple(256 << n for n in range(7))  # 256 ... 16384
PATTERNS: dict[str, dict[str, Any]] = {
    "causal": {},
    f"window {WINDOW}": {"window": (WINDOW - 1, 0)},
}
_LEAST_SECONDS = 0.3  # of repeated calls behind a median


def _inputs(pattern: str, length: int, dtype: torch.dtype) -> Inputs:
    query, key, value, dout = (torch.randn(1, HEADS, length, HEAD_DIM).to(dtype) for _ in range(4))
    return Inputs((query, key, value), (0, 1, 2), dout, {"is_causal": True, **PATTERNS[pattern]})


def seconds(pattern: str, direction: Direction, length: int, dtype: torch.dtype) -> float:
    """Median time of a call."""
    call = _check.candidate(
        scaled_dot_product_attention, _inputs(pattern, length, dtype), direction
    )
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _LEAST_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {name}")


def _extra_bytes(pattern: str, direction: Direction, length: int, dtype: torch.dtype) -> int:
    small = _inputs(pattern, 256, dtype)
    _check.candidate(scaled_dot_product_attention, small, direction)()  # threads, libraries
    inputs = _inputs(pattern, length, dtype)
    call = _check.candidate(scaled_dot_product_attention, inputs, direction)
    results = 1 if direction == "forward" else 4  # out; dquery, dkey, dvalue
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before - results * inputs.arguments[0].nbytes


def extra_bytes(pattern: str, direction: Direction, length: int, dtype: torch.dtype) -> int:
    """The peak of memory during a call beyond inputs and results, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: int = pool.apply(_extra_bytes, (pattern, direction, length, dtype))
    return found


def _plot(times: dict[tuple[str, str], list[float]], path: Path) -> None:
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    for axes, pattern, power in zip(figure.subplots(1, 2), PATTERNS, (2, 1), strict=True):
        for direction in DIRECTIONS:
            scaled = [
                t / length**power / HEADS * 1e9
                for t, length in zip(times[pattern, direction], LENGTHS, strict=False)
            ]
            axes.plot(LENGTHS[: len(scaled)], scaled, "o-", markersize=3, label=direction)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="T", ylabel=f"ns / T{'²' if power == 2 else ''} and head", title=pattern)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def show(dtype: torch.dtype, longest: int, png: Path | None) -> None:
    """Prints the tables, and draws the first where a path is given."""
    _timing.keep_freed_memory()
    lengths = [length for length in LENGTHS if length <= longest]
    times: dict[tuple[str, str], list[float]] = {}
    rows: list[list[str]] = [[str(length)] for length in lengths]
    headers = ["T"]
    for pattern, power in zip(PATTERNS, (2, 1), strict=True):
        for direction in DIRECTIONS:
            headers += [f"{pattern} {direction}, ms", f"ns / T{'²' if power == 2 else ''}"]
            times[pattern, direction] = found = []
            for row, length in zip(rows, lengths, strict=True):
                found.append(seconds(pattern, direction, length, dtype))
                row += [f"{found[-1] * 1e3:.2f}", f"{found[-1] / length**power / HEADS * 1e9:.4g}"]
    print(
        f"attention of {HEADS} heads, D = {HEAD_DIM}, {dtype}, {torch.get_num_threads()} threads;"
        " time over T² or T is for one head"
    )
    print(tabulate(rows, headers, tablefmt="simple", disable_numparse=True))
    if png:
        _plot(times, png)
    print(f"\npeak memory beyond inputs and results at T = {lengths[-1]}")
    memory = []
    for pattern in PATTERNS:
        for direction in DIRECTIONS:
            extra = extra_bytes(pattern, direction, lengths[-1], dtype)
            scores = HEADS * lengths[-1] ** 2 * dtype.itemsize
            per_row = f"{extra / HEADS / lengths[-1]:.1f}"
            memory.append(
                [pattern, direction, f"{extra / 2**20:.1f}", per_row, f"{scores / 2**20:.0f}"]
            )
    columns = ["", "", "MiB", "bytes / (B H T)", "scores would be, MiB"]
    print(tabulate(memory, columns, tablefmt="simple", disable_numparse=True))
