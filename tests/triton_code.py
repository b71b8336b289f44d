"""What the Triton tests of every op share: spills, loads and stores."""

from __future__ import annotations

import re
from collections.abc import Iterable

from kernels import _triton

# Tiles are chosen for the Triton of constraints.txt and for the newest that PyTorch brings.  Others
# allocate registers a little differently: they may spill a few, which costs time and nothing else.
CHOSEN_FOR = {(3, 7), (3, 8)}
TOLERATED = 64  # bytes, with the others


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
