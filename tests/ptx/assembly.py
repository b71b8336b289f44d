"""Small PTX kernels written in the tests: their frame, and running them on numpy arrays."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx import build
from ptx.executor import Executor, Launch

Array = np.ndarray[Any, Any]

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"


def kernel(name: str, body: str, pointers: int = 0, maps: int = 0, shared: int = 0) -> str:
    """An entry with `maps` tensor maps, then `pointers` arrays as parameters.

    The pointers are loaded into %rd1 … and the addresses of the maps into %rd31 …; %r1 is the
    thread's number, %r2 its lane, %r3 the address of `shared` bytes of shared memory.  Registers
    are %p0-63, %h0-63, %r0-511 and %rd0-63.
    """
    parameters = [f".param .align 64 .b8 map{i}[128]" for i in range(maps)]
    parameters += [f".param .u64 pointer{i}" for i in range(pointers)]
    lines = [f"mov.b64 %rd{40 + i}, map{i};" for i in range(maps)]
    lines += [f"cvta.param.u64 %rd{31 + i}, %rd{40 + i};" for i in range(maps)]
    lines += [f"ld.param.u64 %rd{1 + i}, [pointer{i}];" for i in range(pointers)]
    lines += ["mov.u32 %r1, %tid.x;", "and.b32 %r2, %r1, 31;"]
    if shared:
        lines.append("mov.b32 %r3, memory;")
    window = f".shared .align 1024 .b8 memory[{shared}];" if shared else ""
    return (
        f".visible .entry {name}({', '.join(parameters)})\n{{\n"
        ".reg .pred %p<64>; .reg .b16 %h<64>; .reg .b32 %r<512>; .reg .b64 %rd<64>;\n"
        f"{window}\n" + "\n".join(lines) + f"\n{body}\nret;\n}}\n"
    )


class Program:
    """A module of kernels, translated and compiled once."""

    def __init__(self, *kernels: str) -> None:
        self._executor = Executor.instance()
        self._kernels = self._executor.load(build.kernel_library(HEADER + "\n".join(kernels)))

    def run(
        self,
        name: str,
        *arrays: Array,
        maps: Sequence[bytes] = (),
        threads: int = 32,
        addresses: Sequence[int] = (),
        **options: int,
    ) -> Launch:
        """Launches one block; arrays are copied in and out.  `addresses` are passed as they are."""
        placed = [self.place(array, f"array{i}") for i, array in enumerate(arrays)]
        try:
            self._executor.options(**DEFAULTS | options)
            pointers = [*placed, *addresses]
            parameters = b"".join(maps) + struct.pack(f"{len(pointers)}Q", *pointers)
            launch = self._executor.launch(
                self._kernels[name], (1, 1, 1), (threads, 1, 1), 0, parameters
            )
            for array, address in zip(arrays, placed, strict=True):
                ctypes.memmove(array.ctypes.data, address, array.nbytes)
        finally:
            self._executor.options(**DEFAULTS)
            for address in placed:
                self._executor.free(address)
        return launch

    def place(self, array: Array, name: str) -> int:
        """A copy in the executor's global memory; the caller frees it."""
        assert array.flags.c_contiguous
        address = self._executor.alloc(array.nbytes, name)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def fetch(self, address: int, array: Array) -> None:
        """Copies the executor's memory into `array` and frees it."""
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        self._executor.free(address)


# Of a launch without a session: an earlier session may have left others.
DEFAULTS = {
    "race": 1,
    "init": 1,
    "count": 1,
    "schedule": 0,
    "seed": 1,
    "preempt": 0,
    "shared_limit": 232448,
    "max_reports": 20,
    "sample": 0,
    "poison_races": 0,
    "spin_limit": 1 << 30,
    "jitter": 0,
    "async_early": 0,
    "mma_rounding": 0,
}


def kinds(launch: Launch) -> set[str]:
    return {report.kind for report in launch.reports}


def clean(launch: Launch) -> None:
    assert not launch.reports, "\n".join(map(str, launch.reports))
