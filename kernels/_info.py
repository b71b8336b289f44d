"""`python -m kernels info`: what is here, what works, and why the rest does not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
from typing import Any

import torch
from tabulate import tabulate

from kernels import _namesake, _native, _spec, dispatch


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info", help="ops x backends with the reason for every no; versions; CPU; what was built"
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Backends for a float32 tensor on {device}, in the order they are asked\n")
    print(tabulate(_backend_rows(device), headers=("op", "backend", "runs"), tablefmt="simple"))
    print()
    print(tabulate([*_version_rows(), *_machine_rows(), *_build_rows()], tablefmt="plain"))
    return 0


def _backend_rows(device: str) -> list[tuple[str, str, str]]:
    rows = []
    for op in dispatch.OPS:
        spec = _spec.load(op)
        inputs = spec.make_inputs(spec.accuracy_cases[0], torch.float32, device)
        for backend in dispatch.BACKENDS:
            with dispatch.use(backend):
                reason = dispatch.explain(op, *inputs.arguments).refusals[backend]
            rows.append((op, backend, reason or "yes"))
    return rows


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _version_rows() -> list[tuple[str, str]]:
    rows = [("gpt-kernels", _version("gpt-kernels")), ("Python", platform.python_version())]
    rows.append(("torch", torch.__version__))
    rows.extend((name, _version(name)) for name in ("triton", "numpy"))
    clash = _namesake.clash()
    if clash:
        rows.append(("clash", clash))
    return rows


def _machine_rows() -> list[tuple[str, str]]:
    rows = [("threads", f"{torch.get_num_threads()} (torch.set_num_threads)")]
    if isinstance(_native.cpu, str):
        rows.append(("instruction sets", _native.cpu))
    else:
        available = ", ".join(_native.cpu.instruction_sets())
        used = _native.cpu.instruction_set()
        rows.append(("instruction sets", f"{available}; in use: {used} (KERNELS_CPU_ISA)"))
    for index in range(torch.cuda.device_count()):
        rows.append((f"GPU {index}", torch.cuda.get_device_name(index)))
    if not torch.cuda.device_count():
        rows.append(("GPU", "none that this torch can use"))
    rows.append(("KERNELS_BACKEND", os.environ.get("KERNELS_BACKEND", "not set")))
    return rows


def _build_rows() -> list[tuple[str, str]]:
    rows = []
    for module, build in _native.build_info().items():
        if build["built"]:
            targets = ", ".join(build["targets"])
            rows.append((f"built {module}", f"{build['compiler']}; {targets}; {build['flags']}"))
        else:
            rows.append((f"not built {module}", str(build["reason"])))
    return rows or [("built", f"no record ({_native.BUILD_INFO.name} is missing)")]
