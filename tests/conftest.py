"""Fixtures of all tests: which implementation runs, and uninitialised memory made visible."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from kernels import _native, dispatch

# pytest-xdist's workers share the cores: threads that wait for each other's core by spinning make
# tests several times as slow.  What depends on the number of threads sets it.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws when it is imported is the same in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes half a minute starts first: at the end the other workers would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Thousands of test items live to the end: the garbage collector need not walk them again."""
    gc.freeze()


def implementations() -> list[str]:
    """What can run on this CPU: the backends, the C++ one once for each instruction set."""
    sets = [] if isinstance(_native.cpu, str) else _native.cpu.instruction_sets()
    return ["reference", "eager", *(f"cpu-{name}" for name in sets)]


@pytest.fixture(params=implementations())
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each implementation forced."""
    backend, _, instruction_set = request.param.partition("-")
    before = None
    if instruction_set:
        before = _native.cpu.instruction_set()
        _native.cpu.use_instruction_set(instruction_set)
    try:
        with dispatch.use(backend):
            yield request.param
    finally:
        if before is not None:
            _native.cpu.use_instruction_set(before)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """torch.empty gives NaN, so an output that a kernel forgets to write is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
