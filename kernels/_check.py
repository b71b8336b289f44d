"""`python -m kernels check`: every backend's error next to PyTorch's own, then the speed on CPU."""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from kernels import _accuracy, _spec, _timing, dispatch
from kernels._errors import CommandError
from kernels._spec import Case, Direction, Inputs, Spec


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check",
        help="errors of every backend against float64, and the speed beside PyTorch's",
        description=(
            "For each op: the error of every backend that runs here against float64, beside "
            "PyTorch's in the same dtype (rule: at most twice PyTorch's plus one unit in the last "
            "place), then the time of PyTorch's op over ours, taking turns in this process.  Exit "
            "code 1 where an error is too large; a ratio below its bar is shown, never an error."
        ),
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(dispatch.OPS)}; all")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="time for each speed row, in seconds (1)"
    )
    parser.add_argument("--no-speed", action="store_true", help="errors only")
    parser.add_argument(
        "--quick", action="store_true", help="less time: fewer turns and cases, no torch.compile"
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile's column")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if not 0 < options.seconds < math.inf:
        raise CommandError(f"--seconds must be above 0 and finite, got {options.seconds}")
    unknown = [op for op in options.ops if op not in dispatch.OPS]
    if unknown:
        raise CommandError(f"unknown op {unknown[0]!r} (accepted: {', '.join(dispatch.OPS)})")
    asked = options.ops or dispatch.OPS
    # An op's name stands for the ops in its folder, too.
    specs = [_spec.load(op) for op in dispatch.OPS if op in asked or op.split(".")[0] in asked]
    exact = True
    for spec in specs:
        exact &= _report_errors(spec)
    if not options.no_speed:
        for spec in specs:
            rows = speed_rows(spec)
            if options.quick:
                rows = [row for row in rows if row[0].quick]
            seconds = 0.05 if options.quick else options.seconds
            with_compile = not (options.quick or options.no_compile)
            _report_speed(spec, rows, seconds, with_compile)
            if spec.report_more is not None and not options.quick:
                spec.report_more()
    return 0 if exact else 1


def _report_errors(spec: Spec) -> bool:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\n{spec.op}: largest error against float64, relative to the largest value, on {device}")
    rows, refused = [], {}
    exact = True
    calls = [_Checked.of(spec, case, dtype, device) for case, dtype in _accuracy_rows(spec)]
    for backend in (*dispatch.BACKENDS, *dispatch.FORCED_ONLY):
        for call in calls:
            with dispatch.use(backend):
                inputs = call.inputs
                decision = dispatch.explain(spec.op, *inputs.arguments, **inputs.keywords)
                if decision.refusals[backend]:
                    refused[backend] = decision.refusals[backend]
                    continue
                errors = call.errors(spec.function)
            good = call.accepts(errors)
            exact &= good
            cells = [f"{e:.1e} / {t:.1e}" for e, t in zip(errors, call.torch_errors, strict=True)]
            cells += ["-"] * (1 + len(spec.gradient_names) - len(cells))
            name = _spec.dtype_name(call.dtype)
            rows.append([backend, call.case.name, name, *cells, "ok" if good else "TOO LARGE"])
    outputs = [f"{name}: ours / torch" for name in ("y", *spec.gradient_names)]
    print(tabulate(rows, headers=["backend", "case", "dtype", *outputs, ""], tablefmt="simple"))
    for backend, reason in refused.items():
        print(f"{backend} does not run here: {reason}")
    return exact


def _accuracy_rows(spec: Spec) -> list[tuple[Case, torch.dtype]]:
    return [(case, dtype) for case in spec.accuracy_cases for dtype in spec.dtypes]


@dataclass(frozen=True)
class _Checked:
    """One call with its result in float64 and PyTorch's errors, of the output and each gradient."""

    case: Case
    dtype: torch.dtype
    inputs: Inputs
    want: tuple[Tensor, ...]
    torch_errors: list[float]

    @classmethod
    def of(cls, spec: Spec, case: Case, dtype: torch.dtype, device: str) -> _Checked:
        inputs = spec.make_inputs(case, dtype, device)
        yardstick = case.yardstick or spec.yardstick or case.torch_function or spec.torch_function
        want = _spec.run(yardstick, inputs.for_torch().to(torch.float64))
        got = _spec.run(yardstick, inputs.for_torch())
        errors = [_accuracy.error(g, w) for g, w in zip(got, want, strict=True)]
        return cls(case, dtype, inputs, want, errors)

    def errors(self, function: Callable[..., Any]) -> list[float]:
        """Ours, of the same."""
        got = _spec.run(function, self.inputs)
        return [_accuracy.error(g, w) for g, w in zip(got, self.want, strict=True)]

    def accepts(self, errors: list[float]) -> bool:
        return all(
            error <= _accuracy.allowed(torch_error, self.dtype) < math.inf
            for error, torch_error in zip(errors, self.torch_errors, strict=True)
        )


def candidate(
    function: Callable[..., Any], inputs: Inputs, direction: Direction
) -> Callable[[], object]:
    """One timed call: the op without gradients, or forward and backward from fresh gradients."""
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                function(*inputs.arguments, **inputs.keywords)

        return forward
    inputs = inputs.with_gradients()
    leaves = [inputs.arguments[position] for position in inputs.differentiable]

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*inputs.arguments, **inputs.keywords).backward(inputs.output_gradient)

    return both


def measure(
    spec: Spec,
    case: Case,
    dtype: torch.dtype,
    direction: Direction,
    seconds: float,
    with_compile: bool,
) -> dict[str, _timing.Timing]:
    """Times of torch, torch.compile, ours and the machine's limit (see `_limit`), taking turns.

    Our outputs are checked against float64 first: what is wrong is not timed.
    """
    call = _Checked.of(spec, case, dtype, "cpu")
    errors = call.errors(spec.function)
    if not call.accepts(errors):
        raise ArithmeticError(
            f"{spec.op} {case.name} {dtype}: errors {errors}, torch's {call.torch_errors}"
        )
    inputs, torch_function = call.inputs, case.torch_function or spec.torch_function
    candidates = {
        "torch": _with_threads(
            candidate(torch_function, inputs.for_torch(), direction), case.torch_threads
        ),
        "ours": candidate(spec.timed_function or spec.function, inputs, direction),
        "limit": _limit(spec, case, dtype),
    }
    if with_compile and case.compiled:
        torch._dynamo.reset()  # one shape's code at a time, or the recompilation limit is reached
        compiled = torch.compile(torch_function, fullgraph=True, dynamic=False)
        candidates["compile"] = candidate(compiled, inputs.for_torch(), direction)
    return _timing.interleaved(candidates, seconds)


def _with_threads(function: Callable[[], object], threads: int | None) -> Callable[[], object]:
    if threads is None:
        return function

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            function()
        finally:
            torch.set_num_threads(before)

    return run


_GEMM = 1024  # rows and columns of the matrices whose product shows what arithmetic allows


def _limit(spec: Spec, case: Case, dtype: torch.dtype) -> Callable[[], object]:
    """A copy of the same traffic, or a large matrix product for an op bound by arithmetic."""
    if spec.least_bytes is None:
        return _timing.multiplying(_GEMM, dtype)
    return _timing.copying(spec.least_bytes(case, dtype, "forward") // (2 * dtype.itemsize), dtype)


def _work(spec: Spec, case: Case, dtype: torch.dtype, direction: Direction) -> tuple[int, int]:
    """What a call has to do and what the limit does, in bytes or operations."""
    if spec.least_bytes is None:
        assert spec.flops is not None
        return spec.flops(case, direction), 2 * _GEMM**3
    return spec.least_bytes(case, dtype, direction), spec.least_bytes(case, dtype, "forward")


SpeedRow = tuple[Case, torch.dtype, Direction]


def speed_rows(spec: Spec) -> list[SpeedRow]:
    return [
        (case, dtype, direction)
        for case in spec.speed_cases
        for dtype in (torch.float32, torch.bfloat16)
        for direction in case.directions
    ]


def speed_columns(spec: Spec) -> tuple[str, ...]:
    limit = (
        ("GFLOP/s", "GEMM GFLOP/s", "of GEMM") if spec.flops else ("GB/s", "copy GB/s", "of copy")
    )
    timed = ("torch µs", "compile µs", "ours µs", "p20-p80", "torch/ours", "bar")
    beside_compile = ("compile/ours", "bar") if spec.compile_bars else ()
    return ("case", "dtype", "direction", *timed, *beside_compile, *limit)


def _ratio_and_bar(
    theirs: _timing.Timing | None, ours: _timing.Timing, bar: float | None
) -> tuple[str, str]:
    if theirs is None:
        return "-", "-"
    ratio = theirs.median / ours.median
    missed = "" if bar is None or ratio >= bar else "  MISSED"
    return f"{ratio:.2f}", "-" if bar is None else f">= {bar:.2f}{missed}"


def speed_row(
    spec: Spec,
    case: Case,
    dtype: torch.dtype,
    direction: Direction,
    times: dict[str, _timing.Timing],
) -> list[Any]:
    """One line of the speed table, in speed_columns."""
    ours = times["ours"]
    key = case.name, dtype, direction
    ratios = list(_ratio_and_bar(times["torch"], ours, spec.bars.get(key)))
    if spec.compile_bars:
        ratios += _ratio_and_bar(times.get("compile"), ours, spec.compile_bars.get(key))
    work, limit_work = _work(spec, case, dtype, direction)
    least, limit = work / ours.median / 1e9, limit_work / times["limit"].median / 1e9
    microseconds = functools.partial("{:.1f}".format)
    return [
        case.name,
        _spec.dtype_name(dtype),
        direction,
        microseconds(times["torch"].median * 1e6),
        microseconds(times["compile"].median * 1e6) if "compile" in times else "-",
        microseconds(ours.median * 1e6),
        f"{ours.p20 * 1e6:.1f}-{ours.p80 * 1e6:.1f}",
        *ratios,
        f"{least:.1f}",
        f"{limit:.1f}",
        f"{least / limit:.0%}",
    ]


def _report_speed(
    spec: Spec, asked: Sequence[SpeedRow], seconds: float, with_compile: bool
) -> None:
    print(
        f"\n{spec.op}: speed on this CPU, {torch.get_num_threads()} threads; medians of turns "
        "taken in one process.\nOnly the ratios carry over to another run.  GB/s count the least "
        "bytes the op must move; `copy` is tensor.copy_() of the same size.\nGFLOP/s count the "
        f"operations it cannot avoid; `GEMM` is a product of {_GEMM}-row matrices.\n"
        "Freed memory is kept (mallopt), so that neither side pays page faults for blocks up to\n"
        f"32 MiB; THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', '0')} "
        "(PyTorch's switch for huge pages under larger ones)."
    )
    rows = []
    for case, dtype, direction in tqdm(asked, desc=f"timing {spec.op}", leave=False, disable=None):
        times = measure(spec, case, dtype, direction, seconds, with_compile)
        rows.append(speed_row(spec, case, dtype, direction, times))
    print(tabulate(rows, headers=speed_columns(spec), tablefmt="simple", disable_numparse=True))
    left_out = len(speed_rows(spec)) - len(asked)
    if left_out:
        print(f"{left_out} more rows without --quick")
