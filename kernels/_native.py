"""Loads the compiled modules; keeps the reason where one is missing.

`cpu` and `cuda` are the modules `kernels._cpu` and `kernels._cuda`, or a sentence saying why they
are not there: a backend whose module is missing refuses calls with that reason.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BUILD_INFO = Path(__file__).with_name("_build_info.json")  # written by CMake and setup.py


def build_info() -> dict[str, Any]:
    """What was built, by module name; empty where nothing was ever built here."""
    if not BUILD_INFO.is_file():
        return {}
    info: dict[str, Any] = json.loads(BUILD_INFO.read_text(encoding="utf-8"))
    return info


def _why_missing(name: str) -> str:
    reason = build_info().get(name, {}).get("reason")
    return f"kernels.{name} is not built ({reason or 'run `pip install -e .`'})"


def load(name: str) -> ModuleType | str:
    """The compiled module `kernels.<name>`, or one sentence saying why it cannot be used."""
    try:
        return importlib.import_module(f"kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"kernels.{name}":
            return _why_missing(name)
        return f"kernels.{name} cannot be imported ({error})"
    except ImportError as error:
        return f"kernels.{name} cannot be imported ({error})"


def _force_instruction_set(module: Any) -> None:
    name = os.environ.get("KERNELS_CPU_ISA")
    if not name or isinstance(module, str):
        return
    try:
        module.use_instruction_set(name)
    except ValueError as error:
        raise ValueError(f"KERNELS_CPU_ISA: {error}") from None


# The codes of csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def dtype_refusal(name: str, tensor: torch.Tensor) -> str:
    """Why a native kernel does not take the argument `name`, whose dtype has no code."""
    return f"{name} is {tensor.dtype}; accepted are float32, bfloat16 and float16"


cpu: Any = load("_cpu")
cuda: Any = load("_cuda")
_force_instruction_set(cpu)
