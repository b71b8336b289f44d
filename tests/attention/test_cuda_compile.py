"""Attention's CUDA kernels through the real compiler, no GPU needed: no spills and no local
memory. That tiles fit into the shared memory of every target is asserted in the sources.

The PTX is the executor's, from its cache. By default one target; the others in the sweep.
"""

from __future__ import annotations

import pytest

from tests.machine_code import Usage, targets, usages

CLASSES = {64, 128, 256}  # head dimensions
KERNELS = {"forward_kernel", "dquery_kernel", "dkey_dvalue_kernel", "decode_kernel"}
ROW_KERNELS = {"delta_kernel", "combine_kernel", "dsinks_kernel", "globals_kernel"}
# Blocks that the registers of a multiprocessor must hold: two of 128 threads, four of 64.
REGISTERS_PER_THREAD = 255


@pytest.fixture(scope="module", params=targets(default=("90a",)))
def compiled(request: pytest.FixtureRequest, tmp_path_factory) -> list[Usage]:
    return usages("attention", request.param, tmp_path_factory.mktemp("cuda"))


def test_every_kernel_is_compiled(compiled: list[Usage]) -> None:
    assert {u.kernel for u in compiled} == KERNELS | ROW_KERNELS
    # three dtypes of every class, of delta and of combine
    assert len(compiled) == 3 * len(CLASSES) * len(KERNELS) + 3 * 2 + 2
    assert {u.integers for u in compiled if u.kernel in KERNELS} == {(c,) for c in CLASSES}


def test_no_spills_and_no_local_memory(compiled: list[Usage]) -> None:
    assert [u for u in compiled if u.local] == []
    assert max(u.registers for u in compiled) <= REGISTERS_PER_THREAD
