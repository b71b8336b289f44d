"""What crosses into the executor's memory and out again, and which bytes count as written."""

from __future__ import annotations

import ctypes

import pytest
import torch

import ptx
from kernels import _gpu, _native
from tests.ptx.conftest import TWO

# ---- storages in and out


def test_results_come_back_whatever_the_tensor(library, executor_session):
    leaf = torch.randn(100, requires_grad=True)
    y = torch.zeros(2, 100)
    assert library.scale(leaf, y[1], 100, TWO) == 0
    assert torch.equal(y[1], 2 * leaf)
    assert not y[0].any()
    assert library.own_memory(leaf, y[0], 100, TWO) == 0
    assert torch.equal(y[0], 2 * leaf)


def test_views_of_a_storage_are_one_allocation(library, executor_session):
    data = torch.arange(64.0)
    front, back = data[:32], data[32:]
    apart = executor_session.address(front) - executor_session.address(back)
    assert apart == front.data_ptr() - back.data_ptr()
    library.scale(front, back, 32, TWO)
    assert torch.equal(back, 2 * torch.arange(32.0))
    assert list(executor_session.launches[-1].footprint) == ["front"]  # its first view's name


def test_only_the_views_that_are_passed_may_be_touched(library):
    x, y = torch.randn(200), torch.zeros(200)
    with ptx.run(bounds="storage"):
        library.scale(x[:100], y[:100], 200, TWO)
    assert torch.equal(y, 2 * x)
    with pytest.raises(ptx.KernelError) as caught, ptx.run(bounds="view"):
        library.scale(x[:100], y, 200, TWO)
    assert {report.kind for report in caught.value.reports} == {"out-of-bounds"}


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_addresses_keep_their_alignment(executor_session, offset):
    view = torch.zeros(64)[offset:]
    assert executor_session.address(view) % 16 == view.data_ptr() % 16
    whole = torch.zeros(64)
    assert executor_session.address(whole) % 512 == whole.data_ptr() % 16


def test_a_tensor_without_elements_has_no_address(library, executor_session):
    empty = torch.empty(0, 5)
    assert executor_session.address(empty) == 0
    assert _gpu.address(None) == 0
    with pytest.raises(ptx.KernelError, match=r"bad-launch.*gridDim\.x is 0"):
        library.scale(empty, empty, 0, TWO)


def test_storages_that_overlap_are_refused(executor_session):
    data = torch.zeros(64)
    shifted = torch.frombuffer(memoryview(data.numpy())[4:], dtype=torch.float32)
    executor_session.address(data)
    with pytest.raises(ptx.Refused, match=r"shifted.*overlaps that of data"):
        executor_session.address(shifted)


def test_what_is_only_read_is_not_written_back(library, executor_session, monkeypatch):
    x, y = torch.randn(100), torch.zeros(100)
    moved = []
    original = ctypes.memmove
    monkeypatch.setattr(
        ctypes, "memmove", lambda to, *rest: moved.append(to) or original(to, *rest)
    )
    library.scale(x, y, 100, TWO)
    assert y.data_ptr() in moved
    assert x.data_ptr() not in moved


def test_a_helper_between_addresses_and_launch_does_not_end_the_call(executor_session):
    """The plan of a backward may be asked for while its arguments are being gathered."""
    x = torch.randn(4, 8)
    address = executor_session.address(x)
    assert _native.cuda.layer_norm_backward_partials(4, 8, True, 1) >= 1
    assert executor_session.memory.holds(address)


# ---- what was never written


def test_reading_torch_empty_is_reported(library, executor_session):
    x, y = torch.empty(40), torch.zeros(40)
    assert x.isnan().all()
    with pytest.raises(ptx.KernelError, match=r"uninitialised-read.*'x'"):
        library.scale(x, y, 40, TWO)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.empty_like(x),
        lambda x: torch.empty_strided(x.shape, x.stride()),
        lambda x: x.new_empty(x.shape),
        lambda x: torch.empty_permuted(x.shape, (0,)),
    ],
)
def test_every_relative_of_torch_empty_is_watched(library, executor_session, make):
    with pytest.raises(ptx.KernelError, match="uninitialised-read"):
        library.scale(make(torch.zeros(40)), torch.zeros(40), 40, TWO)


@pytest.mark.parametrize(
    "fill",
    [
        lambda x: x.copy_(torch.ones(40)),
        lambda x: torch.ones(40, out=x),
        lambda x: x.numpy().fill(1),
        lambda x: x.view(4, 10).t().fill_(1),
    ],
)
def test_whoever_writes_it_it_may_be_read(library, executor_session, fill):
    x, y = torch.empty(40), torch.empty(40)
    fill(x)
    library.scale(x, y, 40, TWO)
    library.scale(y, x, 40, TWO)  # y was written by a kernel
    assert torch.equal(x, torch.full((40,), 4.0))


def test_a_part_that_no_kernel_wrote_is_remembered(library, executor_session):
    x, y = torch.ones(40), torch.empty(40)
    library.scale(x, y, 39, TWO)
    with pytest.raises(ptx.KernelError) as caught:
        library.scale(y, x, 40, TWO)
    (report,) = caught.value.reports
    assert report.kind == "uninitialised-read"
    assert (report.count, report.thread) == (1, 39)
