"""Runs a kernel of tests/ptx/planted/ straight on the executor, without a CUDA runtime between."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Collection
from pathlib import Path

import torch

from ptx import build
from ptx.executor import Executor, Launch
from tests.ptx.assembly import DEFAULTS

FOLDER = Path(__file__).parent / "planted"
SCHEDULES = {"round robin": 0, "reverse": 1, "random": 2}


def marked_lines(file: str, bug: str) -> set[str]:
    """ "gemm.cu:57" of every line whose `// BUG` comment names the bug."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    return {
        f"{file}:{number}"
        for number, line in enumerate(text.splitlines(), 1)
        for names in re.findall(r"// BUG ([\w, ]+)", line)
        if bug in names.split(", ")
    }


def _pack(executor: Executor, kernel: int, values: list[bytes]) -> bytes:
    places = executor.parameters(kernel)
    assert [size for _, size in places] == [len(value) for value in values]
    end = max(offset + size for offset, size in places)
    space = bytearray(end)
    for (offset, size), value in zip(places, values, strict=True):
        space[offset : offset + size] = value
    return bytes(space)


def launch(
    file: str,
    arch: str,
    kernel: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    *arguments: torch.Tensor | int | float,
    shared: int = 0,
    unwritten: tuple[torch.Tensor, ...] = (),
    **options: int,
) -> Launch:
    """Tensors are copied in and back; those in `unwritten` hold nothing before the launch."""
    executor = Executor.instance()
    with executor.lock:
        library = build.kernel_library(build.kernel_ptx(FOLDER / file, arch, kernel))
        number = executor.load(library)[kernel]
        values, copies = [], []
        for at, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                size = argument.numel() * argument.element_size()
                new = any(argument is other for other in unwritten)
                address = executor.alloc(size, f"argument {at}", written=not new)
                if not new:
                    ctypes.memmove(address, argument.data_ptr(), size)
                copies.append((argument, address, size))
                values.append(struct.pack("<Q", address))
            else:
                values.append(struct.pack("<f" if isinstance(argument, float) else "<i", argument))
        executor.options(**DEFAULTS | options)
        try:
            done = executor.launch(number, grid, block, shared, _pack(executor, number, values))
            for tensor, address, size in copies:
                ctypes.memmove(tensor.data_ptr(), address, size)
        finally:
            executor.options(**DEFAULTS)
            executor.free_all()
    return done


def reported(launched: Launch, kinds: Collection[str]) -> set[str]:
    """ "gemm.cu:57" of both accesses of the reports of these kinds, and where they were inlined."""
    return {
        frame
        for report in launched.reports
        if report.kind in kinds
        for frame in re.findall(r"[\w.]+:\d+", f"{report.source} {report.other_source or ''}")
    }
