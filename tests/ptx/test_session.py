"""ptx.run: what it replaces and puts back, how reports arrive, and what it counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ptx
from kernels import _gpu, _native, dispatch
from kernels.layer_norm import layer_norm
from ptx import build
from tests.ptx.conftest import KERNELS, TWO

OUT_OF_BOUNDS = 700  # cudaErrorIllegalAddress


def line_of(text: str) -> str:
    """The place of the only line of the CUDA source that holds `text`, as reports give it."""
    lines = KERNELS.read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return f"{KERNELS.name}:{number}"


def hooks() -> list[object]:
    return [
        _gpu.stand_in,
        _native.cuda,
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        Tensor.new_empty,
        "new_empty" in vars(Tensor),
    ]


# ---- the session itself


def test_everything_is_put_back():
    before = hooks()
    with ptx.run() as session:
        assert _gpu.stand_in is session
        assert torch.empty is not before[2]
    assert hooks() == before
    with pytest.raises(ZeroDivisionError), ptx.run():
        raise ZeroDivisionError
    assert hooks() == before


def test_nothing_is_compiled_before_it_is_needed(monkeypatch):
    monkeypatch.setattr(build, "_run", None)
    x = torch.randn(2, 8, dtype=torch.float64)
    with ptx.run(), dispatch.use("cuda"):
        with pytest.raises(NotImplementedError, match="float64"):
            layer_norm(x, (8,))
        assert "accepts" in str(dispatch.explain("layer_norm", x.float(), (8,)))


def test_sessions_do_not_nest():
    with ptx.run("sm_80") as outer:
        with pytest.raises(RuntimeError, match=r"do not nest.*sm_80"), ptx.run():
            pass
        assert _gpu.stand_in is outer
    with ptx.run():
        pass


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"arch": "gfx942"}, "sm_90"),
        ({"schedule": "fair"}, "round_robin, reverse, random, uniform"),
        ({"bounds": "page"}, "view, storage"),
        ({"on_report": "print"}, "raise, record"),
        ({"mma_rounding": "exact"}, "double, sequential, truncating"),
    ],
)
def test_options_are_checked(keywords, message):
    before = hooks()
    with pytest.raises(ValueError, match=message), ptx.run(**keywords):
        pass
    assert hooks() == before


def test_a_library_needs_a_session(library):
    with pytest.raises(RuntimeError, match=r"ptx\.run"):
        library.scale(torch.zeros(4), torch.zeros(4), 4, TWO)


def test_one_process_runs_several_architectures(library):
    found = torch.zeros(1, dtype=torch.int32)
    for arch, number in [("sm_80", 800), ("sm_90a", 900), ("sm_80", 800), ("sm_100a", 1000)]:
        with ptx.run(arch):
            library.architecture(found)
        assert found.item() == number


def test_the_device_is_the_one_of_the_architecture(library):
    facts = torch.zeros(4, dtype=torch.int32)
    with ptx.run("sm_80", multiprocessors=3):
        assert library.device_facts(facts) == 0
    assert facts.tolist() == [3, 80, 1024, 2]
    with ptx.run("sm_90a"):
        library.device_facts(facts)
    assert facts.tolist() == [132, 90, 1024, 2]


# ---- reports


def test_a_report_says_kernel_line_block_and_thread(library, executor_session):
    x, y = torch.zeros(1000), torch.zeros(1000)
    with pytest.raises(ptx.KernelError) as caught:
        library.scale_bug(x, y, 1000, TWO)
    report = caught.value.reports[0]
    assert report.kind == "out-of-bounds"
    assert report.source == line_of("<= for <")
    assert report.block == (1000 // 128, 0, 0)
    assert report.thread == 1000 % 128
    assert report.opcode.startswith("ld.global")
    assert "'x'+4000 of 4000 bytes" in report.message
    for part in ("scale_bug_kernel", "out-of-bounds x1", report.source, "thread 104"):
        assert part in str(caught.value)


def test_a_race_says_both_lines(library, executor_session):
    with pytest.raises(ptx.KernelError) as caught:
        library.reverse_bug(torch.zeros(64), torch.zeros(64))
    races = {report.kind: report for report in caught.value.reports}
    assert races["race-RAW"].source == line_of("= tile[63")
    assert races["race-RAW"].other_source == line_of("tile[threadIdx.x] =")


def test_recorded_reports_raise_nothing(library):
    x, y = torch.ones(1000), torch.zeros(1000)
    with ptx.run(on_report="record") as session:
        # as on a GPU, a bad address is an error of the launch and a race is none
        assert library.scale_bug(x, y, 1000, TWO) == OUT_OF_BOUNDS
        assert library.reverse_bug(x[:64], y[:64]) == 0
        assert library.scale(x, y, 1000, TWO) == 0
    assert torch.equal(y, 2 * x)
    assert [bool(launch.reports) for launch in session.launches] == [True, True, False]
    assert {"out-of-bounds", "race-RAW"} <= {report.kind for report in session.reports}


def test_a_report_that_nothing_raised_is_raised_at_exit():
    with pytest.raises(ptx.Refused, match="kept"), ptx.run() as session:
        session.fail(ptx.Refused("kept"))


# ---- counters


def test_a_copy_moves_the_least_possible(library, executor_session):
    n = 1024
    x, y = torch.zeros(n), torch.zeros(n)
    library.scale(x, y, n, TWO)
    library.scale(x, y, n, TWO)
    launch = executor_session.launches[0]
    assert launch.counts["global_load_requests"] == n / 32
    assert launch.counts["global_load_sectors"] == launch.footprint["x"].sectors_read == n * 4 / 32
    assert launch.footprint["y"].bytes_written == launch.footprint["x"].bytes_read == n * 4
    assert 32 * launch.sectors_moved == launch.least_bytes == 2 * n * 4
    assert launch.instructions["st.global.f32"] == n
    (row,) = executor_session.table().splitlines()[2:]
    assert row.split()[:3] == ["scale_kernel", "2", "16"]
    assert " 1.00 " in row
    assert line_of("// right") in launch.table()


def test_every_sector_of_a_strided_load_is_counted(library, executor_session):
    """128 floats from an address that is 4 bytes past a sector: one sector more than 16."""
    x, y = torch.zeros(129)[1:], torch.zeros(128)
    library.scale(x, y, 128, TWO)
    launch = executor_session.launches[0]
    assert launch.counts["global_load_sectors"] == 4 * (4 + 1)  # of 4 warps
    assert launch.footprint["x"].sectors_read == 17
