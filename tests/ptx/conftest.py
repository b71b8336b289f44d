"""The executor as a fixture. Where nvcc or g++ is missing, what needs them fails and says so."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptx

ARCHS = ("sm_80", "sm_90a", "sm_100a")
# Whose PTX of an op runs by default. Elsewhere it is the same kernels in other registers, and nvcc
# takes up to 20 seconds for each: that is left to the sweep. Each architecture has an op here, and
# Hopper the one that has a kernel for it.
DEFAULT_ARCHS = {
    "attention": ("sm_90a",),
    "cross_entropy": ("sm_80",),
    "int8_matmul": ("sm_80",),
    "layer_norm": ("sm_100a",),
}
SCHEDULES = ("round_robin", "reverse", "random")
KERNELS = Path(__file__).with_name("session_kernels.cu")
TWO = ctypes.c_float(2.0)


def spread(matrix: Tensor, gap: int, offset: int, around: float = 99) -> Tensor:
    """The same numbers, rows `gap` elements apart, from element `offset` on; `around` between."""
    rows, columns = matrix.shape
    room = torch.full((offset + rows * (columns + gap),), around, dtype=matrix.dtype)
    view = room[offset:].view(rows, columns + gap)[:, :columns]
    return view.copy_(matrix)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads would only wait for each other: tensors are small, workers use all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library() -> ptx.Library:
    """The functions of session_kernels.cu."""
    return ptx.load(KERNELS)


@pytest.fixture
def executor_session(request: pytest.FixtureRequest) -> Iterator[ptx.Session]:
    """A session of `ptx.run`, for sm_90a or with the keywords given by indirect parametrisation."""
    with ptx.run(**getattr(request, "param", {})) as session:
        yield session
