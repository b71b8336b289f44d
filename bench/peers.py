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
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tqdm import tqdm

import ptx
from bench import cases
from bench.compiled import cuda_code
from kernels import _accuracy, dispatch
from kernels.layer_norm import layer_norm
from ptx import counters, gpu, inductor, model

ARCHITECTURES = ("sm_80", "sm_90a")
EPS = 1e-5
WRONG = 0.1  # relative error; bfloat16 sums of a peer may err by percents


def _ours(backend: str, session: ptx.Session) -> Iterator[Callable[..., torch.Tensor]]:
    with dispatch.use(backend):
        yield lambda x, weight, bias: layer_norm(x, weight.shape, weight, bias, EPS)


def _liger(session: ptx.Session) -> Iterator[Callable[..., torch.Tensor]]:
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


def _compiled(session: ptx.Session) -> Iterator[Callable[..., torch.Tensor]]:
    with inductor.installed(session):
        yield torch.compile(_torch, dynamic=False)


def _torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


PEERS: dict[str, Callable[[ptx.Session], Iterator[Callable[..., torch.Tensor]]]] = {
    "cuda": lambda session: _ours("cuda", session),
    "triton": lambda session: _ours("triton", session),
    "liger": _liger,
    "torch.compile": _compiled,
}


def _microseconds(launches: list[Any], session: ptx.Session) -> str:
    total, spills = 0.0, False
    for launch in launches:
        code = getattr(launch, "code", None) or cuda_code(launch.kernel, session.arch)
        estimate = model.estimate(launch, session.gpu, code)
        total += estimate.microseconds
        spills |= estimate.spills
    return "spills, not modelled" if spills else f"{total:.1f}"


def _check(got: list[torch.Tensor], leaves: list[torch.Tensor], dy: torch.Tensor) -> float:
    """The largest error of y and the gradients, relative to each's largest value."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = _torch(*exact)
    want = [y, *torch.autograd.grad(y, exact, dy.double())]
    worst = max(_accuracy.error(g, w.detach()) for g, w in zip(got, want, strict=True))
    if not worst <= WRONG:
        raise ArithmeticError(f"error {worst:.1e}: what is wrong is not counted")
    return worst


def _rows(arch: str, call: cases.Call, peer: str) -> list[list[str]]:
    generator = torch.Generator().manual_seed(call.rows * 31 + call.cols)
    parameters = torch.float32 if call.mixed else call.dtype
    x, dy = (torch.randn(call.rows, call.cols, generator=generator).to(call.dtype) for _ in "xy")
    weight, bias = (torch.randn(call.cols, generator=generator).to(parameters) for _ in "wb")
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    rows = []
    with ptx.run(arch, on_report="record") as session:
        with contextlib.contextmanager(PEERS[peer])(session) as function:
            y = function(*leaves)
            forward = len(session.launches)
            gradients = torch.autograd.grad(y, leaves, dy)
        error = _check([y, *gradients], leaves, dy)
        parts = {"forward": session.launches[:forward], "backward": session.launches[forward:]}
        for direction, launches in parts.items():
            least = call.least_bytes(direction)
            moved = counters.SECTOR * sum(launch.sectors_moved for launch in launches)
            rows.append(
                [
                    f"{call.op} {direction} {call.shape}",
                    peer,
                    str(len(launches)),
                    f"{moved / 1e6:.2f}",
                    f"{moved / least:.2f}",
                    f"{counters.wavefronts_over_ideal(launches):.2f}",
                    f"{error:.1e}",
                    _microseconds(launches, session),
                ]
            )
    return rows


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
        for call in tqdm(cases.COUNTED, f"counting for {arch}", leave=False):
            rows += [row for peer in peers for row in _rows(arch, call, peer)]
        rows.sort(key=lambda row: row[0])
        print(f"\n{gpu.gpu_of(arch).name} ({arch})")
        print(model.table(rows, headers))
    return 0
