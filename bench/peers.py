"""The same calls by Liger's kernels and by torch.compile's generated Triton, counted beside ours.

Everything runs on the executor; times are the model's (ptx/model.py), under its heading. Output and
gradients of each are compared with float64 first. Liger is optional: pip install --no-deps
liger-kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tqdm import tqdm

import ptx
from bench import cases
from bench.compiled import cuda_code
from kernels import _accuracy, dispatch
from kernels.cross_entropy import cross_entropy
from kernels.layer_norm import layer_norm
from ptx import counters, gpu, inductor, model

ARCHITECTURES = ("sm_80", "sm_90a")
EPS = 1e-5
WRONG = 0.1  # relative error; bfloat16 sums of a peer may err by percents

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """A call with its inputs, and everyone's function of the leaves."""

    leaves: list[torch.Tensor]
    dout: torch.Tensor
    eager: Function  # PyTorch's own
    ours: Function
    liger: Callable[[ptx.Session], AbstractContextManager[Function]]
    # What is counted by itself; Liger's cross-entropy makes the gradient in its forward.
    parts: tuple[str, ...] = ("forward", "backward")


# ---- the ops -------------------------------------------------------------------------------------
def _layer_norm(call: cases.Call) -> Problem:
    generator = torch.Generator().manual_seed(call.rows * 31 + call.cols)
    parameters = torch.float32 if call.mixed else call.dtype
    x, dy = (torch.randn(call.rows, call.cols, generator=generator).to(call.dtype) for _ in "xy")
    weight, bias = (torch.randn(call.cols, generator=generator).to(parameters) for _ in "wb")
    return Problem(
        leaves=[tensor.requires_grad_() for tensor in (x, weight, bias)],
        dout=dy,
        eager=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS),
        ours=lambda x, weight, bias: layer_norm(x, weight.shape, weight, bias, EPS),
        liger=_liger_layer_norm,
    )


@contextlib.contextmanager
def _liger_layer_norm(session: ptx.Session) -> Iterator[Function]:
    liger = importlib.import_module("liger_kernel.ops.layer_norm")
    # On CPU tensors it starts one program; a GPU's number makes the grid what it would be there.
    source = inspect.getsource(liger.layer_norm_backward)
    if "sm_count = 1" not in source:
        raise RuntimeError("this Liger-Kernel no longer sets sm_count = 1: bench/peers.py is old")
    names = dict(vars(liger))
    source = source.replace("sm_count = 1", f"sm_count = {session.multiprocessors}")
    exec(compile(source, str(liger.__file__), "exec"), names)
    with patch.object(liger, "layer_norm_backward", names["layer_norm_backward"]):
        yield lambda x, weight, bias: liger.LigerLayerNormFunction.apply(x, weight, bias, EPS)


def _cross_entropy(call: cases.Call) -> Problem:
    generator = torch.Generator().manual_seed(call.rows * 31 + call.cols)
    logits = torch.randn(call.rows, call.cols, generator=generator).to(call.dtype)
    target = torch.randint(0, call.cols, (call.rows,), generator=generator)

    @contextlib.contextmanager
    def liger(session: ptx.Session) -> Iterator[Function]:
        function = importlib.import_module("liger_kernel.ops.cross_entropy")
        # It writes the gradient over the logits.
        yield lambda x: function.LigerCrossEntropyFunction.apply(x.clone(), target, None)[0]

    return Problem(
        leaves=[logits.requires_grad_()],
        dout=torch.ones((), dtype=call.dtype),
        eager=lambda x: F.cross_entropy(x, target),
        ours=lambda x: cross_entropy(x, target),
        liger=liger,
        parts=("forward + backward",),
    )


OPS = {"layer_norm": _layer_norm, "cross_entropy": _cross_entropy}


# ---- who computes them ---------------------------------------------------------------------------
@contextlib.contextmanager
def _ours(backend: str, problem: Problem) -> Iterator[Function]:
    with dispatch.use(backend):
        yield problem.ours


@contextlib.contextmanager
def _compiled(problem: Problem, session: ptx.Session) -> Iterator[Function]:
    with inductor.installed(session):
        yield torch.compile(problem.eager, dynamic=False)


PEERS: dict[str, Callable[[Problem, ptx.Session], AbstractContextManager[Function]]] = {
    "cuda": lambda problem, session: _ours("cuda", problem),
    "triton": lambda problem, session: _ours("triton", problem),
    "liger": lambda problem, session: problem.liger(session),
    "torch.compile": _compiled,
}


# ---- the tables ----------------------------------------------------------------------------------
def _microseconds(launches: list[Any], session: ptx.Session) -> str:
    total, spills = 0.0, False
    for launch in launches:
        code = getattr(launch, "code", None) or cuda_code(launch.kernel, session.arch)
        estimate = model.estimate(launch, session.gpu, code)
        total += estimate.microseconds
        spills |= estimate.spills
    return "spills, not modelled" if spills else f"{total:.1f}"


def _check(got: list[torch.Tensor], problem: Problem) -> float:
    """The largest error of the output and the gradients, relative to each's largest value."""
    exact = [leaf.detach().double().requires_grad_() for leaf in problem.leaves]
    out = problem.eager(*exact)
    want = [out, *torch.autograd.grad(out, exact, problem.dout.double())]
    worst = max(_accuracy.error(g, w.detach()) for g, w in zip(got, want, strict=True))
    if not worst <= WRONG:
        raise ArithmeticError(f"error {worst:.1e}: what is wrong is not counted")
    return worst


def _rows(arch: str, call: cases.Call, peer: str) -> list[list[str]]:
    problem = OPS[call.op](call)
    with ptx.run(arch, on_report="record", machine_code=True) as session:
        with PEERS[peer](problem, session) as function:
            out = function(*problem.leaves)
            forward = len(session.launches)
            gradients = torch.autograd.grad(out, problem.leaves, problem.dout)
        error = _check([out, *gradients], problem)
        launches = session.launches
        parts = [launches[:forward], launches[forward:]]
        if len(problem.parts) == 1:
            parts = [launches]
        return [
            _row(f"{call.op} {name} {call.shape}", peer, part, _least(call, name), error, session)
            for name, part in zip(problem.parts, parts, strict=True)
        ]


def _least(call: cases.Call, part: str) -> int:
    return sum(call.least_bytes(direction) for direction in part.split(" + "))


def _row(
    name: str, peer: str, launches: list[Any], least: int, error: float, session: ptx.Session
) -> list[str]:
    moved = counters.SECTOR * sum(launch.sectors_moved for launch in launches)
    return [
        name,
        peer,
        str(len(launches)),
        f"{moved / 1e6:.2f}",
        f"{moved / least:.2f}",
        f"{counters.wavefronts_over_ideal(launches):.2f}",
        f"{error:.1e}",
        _microseconds(launches, session),
    ]


def show() -> int:
    """Prints a table per architecture; every time in it is modelled."""
    peers = [
        name
        for name in PEERS
        if name != "liger" or importlib.util.find_spec("liger_kernel") is not None
    ]
    if "liger" not in peers:
        print("Liger is not installed: pip install --no-deps liger-kernel")
    headers = ["call", "by", "kernels", "MB moved", "over least", "wavefronts", "error"]
    headers.append("modelled µs")
    for arch in ARCHITECTURES:
        rows = []
        calls = [call for call in cases.COUNTED if isinstance(call, cases.Call)]
        for call in tqdm(calls, f"counting for {arch}", leave=False):
            rows += [row for peer in peers for row in _rows(arch, call, peer)]
        rows.sort(key=lambda row: row[0])
        print(f"\n{gpu.gpu_of(arch).name} ({arch})")
        print(model.table(rows, headers))
    return 0
