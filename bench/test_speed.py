"""pytest bench --benchmark-only: every op's speed cases, against PyTorch eager and compiled.

Each test first times the candidates in turns (that is what ratios are read from; they are in the
table at the end and in the JSON's extra_info), then lets pytest-benchmark time ours.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from kernels import _check, _spec, dispatch

ROWS = [
    pytest.param(spec, *row, id=f"{spec.op}-{row[0].name}-{_spec.dtype_name(row[1])}-{row[2]}")
    for spec in map(_spec.load, dispatch.OPS)
    for row in _check.speed_rows(spec)
]


@pytest.mark.parametrize(("spec", "case", "dtype", "direction"), ROWS)
def test_speed(
    benchmark: Any,
    comparison: dict[str, list[list[Any]]],
    spec: _spec.Spec,
    case: _spec.Case,
    dtype: torch.dtype,
    direction: _spec.Direction,
) -> None:
    times = _check.measure(spec, case, dtype, direction, seconds=1.0, with_compile=True)
    comparison.setdefault(spec.op, []).append(_check.speed_row(spec, case, dtype, direction, times))
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["interleaved_seconds"] = {k: asdict(t) for k, t in times.items()}
    benchmark.extra_info["torch_over_ours"] = times["torch"].median / times["ours"].median
    inputs = spec.make_inputs(case, dtype, "cpu")
    benchmark(_check.candidate(spec.timed_function or spec.function, inputs, direction))
