"""Attention's CUDA kernels through the real compiler, no GPU needed: no spills, no local memory,
and on Hopper products that run while weights are made. That tiles fit into the shared memory of
every target is asserted in the sources.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from bench import sass
from ptx import build
from ptx.machine_code import cuobjdump
from tests.machine_code import assemble, in_dtypes, targets, usages

SOURCE = build.op_sources()["attention"]
CLASSES = {64, 128, 256}  # head dimensions
KERNELS = {"forward_kernel", "dquery_kernel", "dkey_dvalue_kernel", "decode_kernel"}
ROW_KERNELS = {"delta_kernel", "combine_kernel", "dsinks_kernel", "globals_kernel"}
HOPPER = "forward_sm90_kernel"  # of two dtypes; for other targets than 90a it is empty
HOPPER_CLASSES = (64, 128)
HOPPER_KEYS = 128  # of a tile
# Blocks that the registers of a multiprocessor must hold: two of 128 threads, four of 64.
REGISTERS_PER_THREAD = 255


@in_dtypes
@pytest.mark.parametrize("target", targets("attention"))
def test_machine_code(target: str, dtypes: Sequence[str]) -> None:
    compiled = usages("attention", target, dtypes)
    assert {u.kernel for u in compiled} == KERNELS | ROW_KERNELS | {HOPPER}
    # every class in each dtype, of delta and of combine one; Hopper has no kernel of float32
    hopper = len({*dtypes} - {"float"}) * len(HOPPER_CLASSES)
    assert len(compiled) == len(dtypes) * (len(CLASSES) * len(KERNELS) + 2) + 2 + hopper
    assert {u.integers for u in compiled if u.kernel in KERNELS} == {(c,) for c in CLASSES}
    assert {u.integers for u in compiled if u.kernel == HOPPER} == {(c,) for c in HOPPER_CLASSES}
    assert [u for u in compiled if u.local] == []
    assert max(u.registers for u in compiled) <= REGISTERS_PER_THREAD


def hopper_ptx(head_dim: int) -> str:
    pattern = re.compile(rf"{HOPPER}I\d+__nv_bfloat16Li{head_dim}E")
    (name,) = filter(pattern.search, build.kernel_names(SOURCE, "sm_90a"))
    return build.kernel_ptx(SOURCE, "sm_90a", name)


# What the executor would not miss: it has the accumulators before they are waited for.
@pytest.mark.parametrize("head_dim", HOPPER_CLASSES)
def test_hopper_fences_commits_and_waits(head_dim: int) -> None:
    """In front of the loop, in it and behind it; products with keys, with values; releases."""
    words = {
        "wgmma.fence": "fence",
        "wgmma.mma_async": "product",
        "wgmma.commit_group": "commit",
        "wgmma.wait_group": "wait",
        "mbarrier.arrive.shared": "release",
    }
    instruction = re.compile(rf"^[^/\n]*({'|'.join(map(re.escape, words))})[^\s;]*([^;]*);", re.M)
    found = ""
    for match in instruction.finditer(hopper_ptx(head_dim)):
        number = match[2].strip() if match[1].endswith("wait_group") else ""
        found += f"{words[match[1]]}{number} "
    keys = "fence " + "product " * (head_dim // 16) + "commit "
    values = "fence " + "product " * (HOPPER_KEYS // 16) + "commit "
    before, after = keys + "wait0 release ", values + "wait0 "
    assert found == before + keys + values + "wait1 release wait0 release " + after


@pytest.mark.parametrize("head_dim", HOPPER_CLASSES)
def test_hopper_makes_weights_while_products_run(head_dim: int) -> None:
    """Between the waits for the product with the keys and for the one with the values."""
    # Without source lines: they refer to what was split off.
    text = re.sub(r"^\s*\.loc\b.*$", "", hopper_ptx(head_dim), flags=re.M)
    cubin, said = assemble(text, "90a")
    assert "serialized" not in said  # what ptxas says where products cannot run behind
    (code,) = sass.functions(cuobjdump("-sass", cubin)).values()
    steps = " ".join(f"{i.opcode} {i.operands}" for i in code)
    overlap = re.search(r"DEPBAR.LE gsb0, 0x1 (.*?)DEPBAR.LE gsb0, 0x0", steps)
    assert overlap is not None
    # 64 rows of a tile by 128 threads, and what two rows have shrunk by
    assert overlap[1].count("MUFU.EX2") == HOPPER_KEYS // 2 + 2
