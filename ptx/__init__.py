"""Runs GPU kernels on the CPU, from the PTX their compilers make; checks and counts what they do.

>>> with ptx.run("sm_90a") as session, dispatch.use("cuda"):
...     y = layer_norm(x, (1024,), weight, bias)  # on CPU tensors
>>> print(session.table())
"""

import platform
import sys

if sys.platform != "linux" or platform.machine() != "x86_64":
    raise ImportError(
        "ptx runs on Linux on x86-64 only (its threads switch stacks in assembly), not on "
        f"{sys.platform} on {platform.machine()}"
    )

from ptx.executor import KernelError, Launch, Refused, Report
from ptx.host import Library
from ptx.session import Session, load, run

__all__ = [
    "KernelError",
    "Launch",
    "Library",
    "Refused",
    "Report",
    "Session",
    "load",
    "run",
]
