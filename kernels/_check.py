"""`python -m kernels check`: every backend's error next to PyTorch's own, then the speed on CPU."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
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
        "--quick", action="store_true", help="a fraction of the time: fewer turns, no torch.compile"
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile's column")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.seconds <= 0:
        raise CommandError(f"--seconds must be above 0, got {options.seconds}")
    unknown = [op for op in options.ops if op not in dispatch.OPS]
    if unknown:
        raise CommandError(f"unknown op {unknown[0]!r} (accepted: {', '.join(dispatch.OPS)})")
    specs = [_spec.load(op) for op in options.ops or dispatch.OPS]
    exact = True
    for spec in specs:
        exact &= _report_errors(spec)
    if not options.no_speed:
        for spec in specs:
            seconds = 0.05 if options.quick else options.seconds
            _report_speed(spec, seconds, with_compile=not (options.quick or options.no_compile))
    return 0 if exact else 1


def _report_errors(spec: Spec) -> bool:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\n{spec.op}: largest error against float64, relative to the largest value, on {device}")
    rows, refused = [], {}
    exact = True
    for backend in (*dispatch.BACKENDS, *dispatch.FORCED_ONLY):
        for case in spec.accuracy_cases:
            for dtype in spec.dtypes:
                inputs = spec.make_inputs(case, dtype, device)
                with dispatch.use(backend):
                    reason = dispatch.explain(spec.op, *inputs.arguments).refusals[backend]
                    if reason:
                        refused[backend] = reason
                        continue
                    errors = output_errors(spec, spec.function, inputs)
                torch_errors = output_errors(spec, spec.torch_function, inputs)
                good = all(
                    error <= _accuracy.allowed(torch_error, dtype)
                    for error, torch_error in zip(errors, torch_errors, strict=True)
                )
                exact &= good
                cells = [f"{e:.1e} / {t:.1e}" for e, t in zip(errors, torch_errors, strict=True)]
                name = _spec.dtype_name(dtype)
                rows.append([backend, case.name, name, *cells, "ok" if good else "TOO LARGE"])
    outputs = [f"{name}: ours / torch" for name in ("y", *spec.gradient_names)]
    print(tabulate(rows, headers=["backend", "case", "dtype", *outputs, ""], tablefmt="simple"))
    for backend, reason in refused.items():
        print(f"{backend} does not run here: {reason}")
    return exact


def output_errors(spec: Spec, function: Callable[..., Any], inputs: Inputs) -> list[float]:
    """Errors of the output and of every gradient against PyTorch's op in float64."""
    want = _spec.run(spec.torch_function, inputs.to(torch.float64))
    got = _spec.run(function, inputs)
    return [_accuracy.error(g, w) for g, w in zip(got, want, strict=True)]


def candidate(
    function: Callable[..., Any], inputs: Inputs, direction: Direction
) -> Callable[[], object]:
    """One timed call: the op without gradients, or forward and backward from fresh gradients."""
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                function(*inputs.arguments)

        return forward
    inputs = inputs.with_gradients()
    leaves = [inputs.arguments[position] for position in inputs.differentiable]

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*inputs.arguments).backward(inputs.output_gradient)

    return both


def measure(
    spec: Spec,
    case: Case,
    dtype: torch.dtype,
    direction: Direction,
    seconds: float,
    with_compile: bool,
) -> dict[str, _timing.Timing]:
    """Times of torch, torch.compile, ours and a copy of the same traffic, taking turns.

    Both sides' outputs are checked against float64 first: what is wrong is not timed.
    """
    inputs = spec.make_inputs(case, dtype, "cpu")
    errors = output_errors(spec, spec.function, inputs)
    torch_errors = output_errors(spec, spec.torch_function, inputs)
    for error, torch_error in zip(errors, torch_errors, strict=True):
        if not error <= _accuracy.allowed(torch_error, dtype) < math.inf:
            raise ArithmeticError(
                f"{spec.op} {case.name} {dtype}: error {error:.1e}, torch's {torch_error:.1e}"
            )
    candidates = {
        "torch": candidate(spec.torch_function, inputs, direction),
        "ours": candidate(spec.function, inputs, direction),
        "copy": _timing.copying(
            spec.least_bytes(case, dtype, "forward") // (2 * dtype.itemsize), dtype
        ),
    }
    if with_compile:
        torch._dynamo.reset()  # one shape's code at a time, or the recompilation limit is reached
        compiled = torch.compile(spec.torch_function, fullgraph=True, dynamic=False)
        candidates["compile"] = candidate(compiled, inputs, direction)
    return _timing.interleaved(candidates, seconds)


def speed_rows(spec: Spec) -> list[tuple[Case, torch.dtype, Direction]]:
    return [
        (case, dtype, direction)
        for case in spec.speed_cases
        for dtype in (torch.float32, torch.bfloat16)
        for direction in _spec.DIRECTIONS
    ]


SPEED_COLUMNS = (
    "case",
    "dtype",
    "direction",
    "torch µs",
    "compile µs",
    "ours µs",
    "p20-p80",
    "torch/ours",
    "bar",
    "GB/s",
    "copy GB/s",
    "of copy",
)


def speed_row(
    spec: Spec,
    case: Case,
    dtype: torch.dtype,
    direction: Direction,
    times: dict[str, _timing.Timing],
) -> list[Any]:
    """One line of the speed table, in SPEED_COLUMNS."""
    ours = times["ours"]
    ratio = times["torch"].median / ours.median
    bar = spec.bars.get((case.name, dtype, direction))
    least = spec.least_bytes(case, dtype, direction) / ours.median / 1e9
    limit = spec.least_bytes(case, dtype, "forward") / times["copy"].median / 1e9
    microseconds = functools.partial("{:.1f}".format)
    return [
        case.name,
        _spec.dtype_name(dtype),
        direction,
        microseconds(times["torch"].median * 1e6),
        microseconds(times["compile"].median * 1e6) if "compile" in times else "-",
        microseconds(ours.median * 1e6),
        f"{ours.p20 * 1e6:.1f}-{ours.p80 * 1e6:.1f}",
        f"{ratio:.2f}",
        "-" if bar is None else f">= {bar:.2f}{'' if ratio >= bar else '  MISSED'}",
        f"{least:.1f}",
        f"{limit:.1f}",
        f"{least / limit:.0%}",
    ]


def _report_speed(spec: Spec, seconds: float, with_compile: bool) -> None:
    print(
        f"\n{spec.op}: speed on this CPU, {torch.get_num_threads()} threads; medians of turns "
        "taken in one process.\nOnly the ratios carry over to another run.  GB/s count the least "
        "bytes the op must move; `copy` is tensor.copy_() of the same size.\nFreed memory is kept "
        "(mallopt), so that neither side pays page faults."
    )
    rows = []
    for case, dtype, direction in tqdm(
        speed_rows(spec), desc=f"timing {spec.op}", leave=False, disable=None
    ):
        times = measure(spec, case, dtype, direction, seconds, with_compile)
        rows.append(speed_row(spec, case, dtype, direction, times))
    print(tabulate(rows, headers=SPEED_COLUMNS, tablefmt="simple", disable_numparse=True))
