"""What the Triton tests of every op share: the interpreter's process, spills, loads and stores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from kernels import _triton

DEFAULT = "not sweep"  # which cases of a file run in the interpreter: the argument of pytest's -m
SELECTIONS = [DEFAULT, pytest.param("sweep", marks=pytest.mark.sweep)]

# Tiles are chosen for the Triton of constraints.txt and for the newest that PyTorch brings.  Others
# allocate registers a little differently: they may spill a few, which costs time and nothing else.
CHOSEN_FOR = {(3, 7), (3, 8)}
TOLERATED = 64  # bytes, with the others


def run_in_interpreter(cases: Path, selection: str = DEFAULT) -> None:
    """All selected cases of a file pass in Triton's interpreter, and there are some.

    The interpreter must be on before the kernels are decorated, hence in a process of its own.
    """
    if not _triton.INTERPRETER_LOOPS:
        pytest.skip("Triton before 3.7 needs NumPy before 2.4 here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selection]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, cases], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b\d+ passed", done.stdout), done.stdout


def spilled(kernels: Iterable[_triton.Compiled]) -> dict[str, int]:
    """Bytes of one thread by kernel, for those kernels whose registers do not hold everything."""
    tolerated = 0 if _triton.VERSION in CHOSEN_FOR else TOLERATED
    return {
        f"{kernel.name} {kernel.metadata.hash[:8]}": kernel.spills()
        for kernel in kernels
        if kernel.spills() > tolerated
    }


def moves(kernel: _triton.Compiled) -> dict[str, int]:
    """How often each kind of global load and store occurs in the PTX."""
    found = re.findall(
        r"\b(ld|st)\.global(?:\.\w+)*?((?:\.v\d)?)\.[bf](\d+)", kernel.file("ptx").read_text()
    )
    kinds = [f"{move}{int(width) * int(vector[2:] or 1)}" for move, vector, width in found]
    return {kind: kinds.count(kind) for kind in kinds}
