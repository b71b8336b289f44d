"""Loads the compiled modules; keeps the reason where one is missing.

`cpu` and `cuda` are the modules `kernels._cpu` and `kernels._cuda`, or a sentence saying why they
are not there: a backend whose module is missing refuses calls with that reason.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

_NOT_BUILT = {
    "_cpu": "kernels._cpu is not built (needs a C++20 compiler; then `pip install -e .` again)",
    "_cuda": "kernels._cuda is not built (needs nvcc; KERNELS_CUDA=1 makes `pip install` insist)",
}


def load(name: str) -> ModuleType | str:
    """The compiled module `kernels.<name>`, or one sentence saying why it cannot be used."""
    try:
        return importlib.import_module(f"kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"kernels.{name}":
            return _NOT_BUILT[name]
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


cpu: Any = load("_cpu")
cuda: Any = load("_cuda")
_force_instruction_set(cpu)
