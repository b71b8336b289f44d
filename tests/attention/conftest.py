"""Fixtures of the attention tests: the implementations that run on this CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels import _native, dispatch
from tests.conftest import implementations


def available(op: str) -> list[str]:
    """Backends that run on this CPU, the C++ one once for each instruction set."""
    names = implementations()
    return [name for name in names if not isinstance(dispatch.load(op, name.split("-")[0]), str)]


@pytest.fixture(params=available("attention"))
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each implementation forced."""
    yield from forced(request.param)


def forced(name: str) -> Iterator[str]:
    backend, _, instruction_set = name.partition("-")
    before = _native.cpu.instruction_set() if instruction_set else None
    if instruction_set:
        _native.cpu.use_instruction_set(instruction_set)
    try:
        with dispatch.use(backend):
            yield name
    finally:
        if before is not None:
            _native.cpu.use_instruction_set(before)


@pytest.fixture(params=available("attention.decode"))
def decode_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for decode_attention."""
    yield from forced(request.param)
