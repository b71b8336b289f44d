"""Launches of hand-written PTX kernels for the tests of the runtime: arrays in, launch out."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from ptx import build
from ptx.executor import Executor, Footprint, Launch, Report
from tests.ptx.assembly import DEFAULTS, HEADER, kernel


def access(name: str, operation: str, stride: int, offset: int = 0, setup: str = "") -> str:
    """Every thread accesses the buffer at thread * stride + offset."""
    where = f"{setup} mul.wide.u32 %rd10, %r1, {stride}; add.u64 %rd2, %rd1, %rd10;"
    return kernel(name, where + operation.replace("HERE", f"[%rd2+{offset}]"), pointers=1)


def shared(name: str, operation: str, stride: int, prepare: str = "") -> str:
    """Every thread accesses shared memory at thread * stride."""
    where = f"mul.lo.u32 %r10, %r1, {stride}; add.u32 %r4, %r3, %r10; {prepare}"
    return kernel(name, where + operation.replace("HERE", "[%r4]"), shared=8192)


@dataclass
class Buffer:
    """Global memory for one launch."""

    size: int
    name: str = "x"
    written: bool = True  # False: its bytes count as never written
    contents: bytes = b""  # before the launch (zero where written and not given), then after it


@dataclass
class Outcome:
    launch: Launch
    buffers: list[Buffer]
    footprints: list[Footprint] = field(default_factory=list)

    @property
    def reports(self) -> list[Report]:
        return self.launch.reports

    @property
    def kinds(self) -> list[str]:
        return sorted({report.kind for report in self.reports})

    def words(self, buffer: int = 0) -> list[int]:
        contents = self.buffers[buffer].contents
        return list(struct.unpack(f"{len(contents) // 4}I", contents))


class Kernels:
    """A module of hand-written entries, compiled when the first one runs."""

    def __init__(self, ptx: str) -> None:
        self.ptx = HEADER + ptx
        self.numbers: dict[str, int] = {}

    def run(
        self,
        name: str,
        *buffers: Buffer,
        grid: Sequence[int] = (1, 1, 1),
        threads: Sequence[int] | int = 32,
        dynamic: int = 0,
        **options: int,
    ) -> Outcome:
        """One launch with the buffers' addresses as parameters; buffers are freed afterwards."""
        executor = Executor.instance()
        if not self.numbers:
            self.numbers = executor.load(build.kernel_library(self.ptx))
        addresses = [executor.alloc(each.size, each.name, written=each.written) for each in buffers]
        for address, each in zip(addresses, buffers, strict=True):
            ctypes.memmove(address, each.contents, len(each.contents))
        block = (threads, 1, 1) if isinstance(threads, int) else threads
        try:
            executor.options(**DEFAULTS | options)
            parameters = struct.pack(f"{len(addresses)}Q", *addresses)
            launch = executor.launch(self.numbers[name], grid, block, dynamic, parameters)
            outcome = Outcome(launch, list(buffers))
            for address, each in zip(addresses, buffers, strict=True):
                outcome.footprints.append(executor.footprint(address, each.size))
                each.contents = ctypes.string_at(address, each.size)
        finally:
            executor.options(**DEFAULTS)
            for address in addresses:
                executor.free(address)
        return outcome
