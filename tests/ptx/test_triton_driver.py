"""Ordinary Triton launches on the executor: every kind of argument, planted errors, their lines.

Where a kernel is wrong on purpose, its line in driver_kernels.py is marked BUG.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ptx

triton = pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from tests.ptx import driver_kernels as kernels  # noqa: E402

ARCHS = ("sm_80", "sm_90a", "sm_100a")


def line_of(mark: str) -> str:
    """file:line of the comment `BUG mark`."""
    lines = Path(kernels.__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if f"# BUG {mark}" in line)
    return f"driver_kernels.py:{number}"


def raises(kind: str, mark: str | None = None):
    """Expects a report of `kind` whose message shows the line marked `BUG mark`."""
    at = f".*{re.escape(line_of(mark))}\\b" if mark else ""
    return pytest.raises(ptx.KernelError, match=re.escape(f"[{kind} ") + at)


# ---- what runs


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("n", [1, 255, 1000, 1024])
def test_add(arch, n):
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    with ptx.run(arch) as session:
        kernels.add[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)
    (launch,) = session.launches
    assert launch.name == "add"
    assert launch.grid == (triton.cdiv(n, 256), 1, 1)
    assert launch.block == (128, 1, 1)
    assert (
        launch.footprint["x_ptr"].bytes_read == launch.footprint["out_ptr"].bytes_written == 4 * n
    )
    assert launch.least_bytes == 12 * n


def test_architectures_take_turns_in_one_process():
    """Triton keeps what it compiled by device, so each architecture must look like its own."""
    x = torch.randn(512)
    for arch in ("sm_80", "sm_90a", "sm_80"):
        out = torch.empty(512)
        with ptx.run(arch) as session:
            kernels.add[(2,)](x, x, out, 512, BLOCK=256)
            assert triton.runtime.driver.active.get_current_target().arch == session.gpu.arch
        assert torch.equal(out, x + x)
        assert session.launches[0].ptx.read_text().count(f".target sm_{session.gpu.arch}") == 1


def test_the_former_driver_comes_back():
    before = triton.runtime.driver._active
    with pytest.raises(RuntimeError, match="out of the body"), ptx.run("sm_80"):
        raise RuntimeError("out of the body")
    assert triton.runtime.driver._active is before


def test_integers_none_and_flags():
    for n, stride, y, negate in [
        (256, 1, True, False),
        (256, 2, False, True),
        (250, 3, True, True),
    ]:
        x = torch.randn(n * stride)
        other = torch.randn(n * stride) if y else None
        out = torch.empty(n)
        with ptx.run("sm_80"):
            kernels.axpy[(triton.cdiv(n, 64),)](x, other, out, n, stride, 2.5, negate, BLOCK=64)
        want = 2.5 * x[::stride]
        want = want + other[::stride] if y else want
        torch.testing.assert_close(out, -want if negate else want)


def test_scalars_of_every_type():
    out = torch.empty(7, dtype=torch.float64)
    with ptx.run("sm_80"):
        kernels.scalars[(1,)](out, 2**40 + 3, -7, 0.5, 1.25, 1 / 3, 200, -100)
        assert out.tolist() == [2**40 + 3, -7, 0.5, 1.25, 1 / 3, 200, -100]
        kernels.scalars[(1,)](out, 2**63 + 2**40, 2.5, -2.0, -4.0, 1e300, 0, 127)
        assert out.tolist() == [2**63 + 2**40, 2.5, -2.0, -4.0, 1e300, 0, 127]


def test_tuples():
    x, y, out = torch.randn(64), torch.randn(64), torch.empty(64)
    with ptx.run("sm_80"):
        kernels.from_a_tuple[(1,)]((x, 3.0, (y,)), out, BLOCK=64)
    torch.testing.assert_close(out, x * 3 + y)


def test_views_of_one_storage_stay_one_allocation():
    storage = torch.randn(300)
    x, out = storage[:200], storage[100:]
    with ptx.run("sm_80") as session:
        kernels.add[(1,)](x[:100], x[100:], out[100:], 100, BLOCK=128)
    assert torch.equal(storage[200:], storage[:100] + storage[100:200])
    assert len(session.launches[0].footprint) == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_descriptors(arch):
    for rows, cols in [(64, 64), (40, 52)]:
        x = torch.randn(rows, cols)
        by_device, by_host = torch.empty_like(x), torch.empty_like(x)
        grid = (triton.cdiv(rows, 16),)
        with ptx.run(arch):
            kernels.copy_by_descriptors[grid](x, by_device, rows, cols, M=16, N=64)
            tensors = [TensorDescriptor.from_tensor(t, [16, 64]) for t in (x, by_host)]
            kernels.copy_of_descriptors[grid](*tensors, M=16)
        assert torch.equal(by_device, x)
        assert torch.equal(by_host, x)


def test_descriptor_of_a_shifted_view():
    x = torch.randn(40, 64)
    out = torch.empty(24, 32)
    source = TensorDescriptor.from_tensor(x[16:, 32:], [8, 32])
    with ptx.run("sm_90a"):
        kernels.copy_of_descriptors[(3,)](source, TensorDescriptor.from_tensor(out, [8, 32]), M=8)
    assert torch.equal(out, x[16:, 32:])


def test_functions_that_are_not_inlined():
    x, out = torch.randn(128), torch.empty(128)
    with ptx.run("sm_80"):
        kernels.calls_a_function[(1,)](x, out, BLOCK=128)
    torch.testing.assert_close(out, x + (x[0] * 2 + 1))


def test_print_is_ignored_and_assert_holds():
    x = torch.rand(128)
    with ptx.run("sm_80"):
        for kernel in (kernels.printed, kernels.checked):
            out = torch.empty(128)
            kernel[(1,)](x, out, BLOCK=128, debug=True)
            assert torch.equal(out, x)


def test_atomics():
    x, out = torch.randint(-9, 9, (1024,), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with ptx.run("sm_80") as session:
        kernels.sum_by_atomics[(4,)](x, out, BLOCK=256)
    assert out == x.sum()
    assert session.launches[0].counts["global_atomic_requests"] == 4


def test_machine_code_is_made_where_it_is_asked_for():
    """A kernel that was compiled without it is compiled again, in the same process too."""
    for machine_code in (False, True, False):
        with ptx.run("sm_80", machine_code=machine_code) as session:
            kernels.add[(1,)](torch.ones(64), torch.ones(64), torch.empty(64), 64, BLOCK=64)
        (launch,) = session.launches
        if machine_code:
            assert launch.code.registers > 0
        else:
            with pytest.raises(RuntimeError, match="machine_code=True"):
                _ = launch.code


def test_autotuned_kernels_take_the_first_configuration():
    x, out = torch.randn(1000), torch.empty(1000)
    with ptx.run("sm_80") as session:
        kernels.tuned_copy[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](x, out, 1000)
    assert torch.equal(out, x)
    assert [launch.grid for launch in session.launches] == [(16, 1, 1)]


def test_autotuned_kernels_by_the_model():
    x, out = torch.randn(1001), torch.empty(1001)
    with ptx.run("sm_80", machine_code=True) as session:
        triton.runtime.driver.active.autotune = "model"
        kernels.tuned_copy[lambda meta: (triton.cdiv(1001, meta["BLOCK"]),)](x, out, 1001)
    assert torch.equal(out, x)
    tried = {launch.grid[0] for launch in session.launches[:-1]}
    assert tried == {16, 8, 4}
    assert session.launches[-1].grid[0] in tried


def test_an_empty_grid_is_no_launch():
    x = torch.zeros(4)
    with ptx.run("sm_80") as session:
        kernels.add[(0,)](x, x, x, 0, BLOCK=64)
    assert session.launches == []


# ---- what is refused


def test_clusters_and_cooperative_grids_are_refused():
    x = torch.zeros(256)
    with ptx.run("sm_90a"):
        with pytest.raises(ptx.Refused, match="num_ctas=2"):
            kernels.add[(2,)](x, x, x, 256, BLOCK=128, num_ctas=2)
        with pytest.raises(ptx.Refused, match="cooperative"):
            kernels.add[(2,)](x, x, x, 256, BLOCK=128, launch_cooperative_grid=True)


def test_memory_that_is_not_the_cpus_is_refused():
    x = torch.zeros(256, device="meta")
    with ptx.run("sm_80"), pytest.raises(ptx.Refused, match="x_ptr is on meta"):
        kernels.add[(1,)](x, x, x, 256, BLOCK=256)


# ---- planted errors


@pytest.mark.parametrize("arch", ARCHS)
def test_missing_mask(arch):
    x, out = torch.randn(1000), torch.empty(1000)
    with raises("out-of-bounds", "unmasked"), ptx.run(arch):
        kernels.add_without_mask[(4,)](x, out, 1000, BLOCK=256)


def test_reading_past_a_view():
    x = torch.randn(8, 128)[:, :100]
    with ptx.run("sm_80", bounds="storage"):
        kernels.row_sums[(8,)](x, torch.empty(8), x.stride(0), 104, BLOCK=128)
    with pytest.raises(ptx.KernelError, match="out-of-bounds"), ptx.run("sm_80", bounds="view"):
        kernels.row_sums[(8,)](x, torch.empty(8), x.stride(0), 104, BLOCK=128)
    with ptx.run("sm_80", bounds="view"):
        kernels.row_sums[(8,)](x, torch.empty(8), x.stride(0), 100, BLOCK=128)


def test_never_written_input():
    with ptx.run("sm_80"):
        x, out = torch.empty(1000), torch.empty(1000)
        x[:999] = 1.0
        kernels.add[(4,)](x[:999], x[:999], out, 999, BLOCK=256)
        with pytest.raises(ptx.KernelError, match="uninitialised-read"):
            kernels.add[(4,)](x, x, out, 1000, BLOCK=256)


def test_output_of_one_kernel_is_written_for_the_next():
    with ptx.run("sm_80"):
        x, half, out = torch.ones(512), torch.empty(512), torch.empty(512)
        kernels.add[(1,)](x, x, half, 256, BLOCK=256)
        kernels.add[(1,)](half, half, out, 256, BLOCK=256)
        assert torch.equal(out[:256], torch.full((256,), 4.0))
        with pytest.raises(ptx.KernelError, match="uninitialised-read"):
            kernels.add[(2,)](half, half, out, 512, BLOCK=256)


def test_race_between_programs():
    x, out = torch.randn(1024), torch.zeros(1)
    with raises("race-RAW-blocks", "race"), ptx.run("sm_80"):
        kernels.sum_in_one_place[(4,)](x, out, BLOCK=256)


def test_race_within_a_program():
    scratch, out = torch.zeros(1024), torch.empty(1024)
    with raises("race-RAW", "no barrier"), ptx.run("sm_80"):
        kernels.reverse_through_memory[(1,)](torch.randn(1024), scratch, out, BLOCK=1024)


def test_replicated_lanes_are_no_race():
    """With fewer elements than threads, several lanes load and store the same element."""
    for schedule in ("round_robin", "reverse", "random"):
        x = torch.randn(16)
        want = 2 * x
        with ptx.run("sm_80", schedule=schedule):
            kernels.double_in_place[(1,)](x, 16, BLOCK=16)
        assert torch.equal(x, want)


def test_wild_pointer():
    for address in (0, 0x10, 0x7FFF_0000_0000):
        with raises("wild-access", "wild"), ptx.run("sm_80"):
            kernels.through_a_wild_pointer[(1,)](torch.tensor([address]), torch.empty(1))


def test_failed_assertion():
    x = torch.rand(128)
    x[77] = -1.0
    with raises("device-assert", "assert"), ptx.run("sm_80"):
        kernels.checked[(1,)](x, torch.empty(128), BLOCK=128, debug=True)


def test_recorded_reports_are_raised_by_nobody():
    with ptx.run("sm_80", on_report="record") as session:
        kernels.add_without_mask[(4,)](torch.randn(1000), torch.empty(1000), 1000, BLOCK=256)
    assert [report.kind for report in session.reports] == ["out-of-bounds"]
    assert line_of("unmasked") in session.reports[0].source
