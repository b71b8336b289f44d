"""Bugs planted into kernels of every sort: each is caught, by the report or the number named here,
and a report names the line that carries the `// BUG` comment; without the bug the same kernel is
clean and right.

Three schedulers take turns. What a scheduler happens to run does not decide whether a race is
found, so one run of each bug is enough.
"""

from __future__ import annotations

import pytest
import torch

import ptx
from tests.ptx.planted_bugs import FOLDER, SCHEDULES, marked_lines, reported
from tests.ptx.planted_families import FAMILIES, PAIRS, Result

INVALID_CONFIGURATION = 9  # of cudaError_t
RACES = {"race-RAW", "race-WAR", "race-WAW"}

# (family, bug, the kinds of report of which one names the marked line, further kinds in its wake).
# Which access of a race comes first, and so its kind, is the scheduler's choice.
REPORTED: list[tuple[str, str, str, set[str]]] = [
    ("layer_norm", "no_barrier", "race-RAW race-WAR", {"uninitialised-read"}),
    ("layer_norm", "reused_scratch", "race-WAR", {"race-RAW"}),
    ("layer_norm", "column_bound", "out-of-bounds", set()),
    ("layer_norm", "misaligned_load", "misaligned", set()),
    ("layer_norm", "divergent_barrier", "divergent-barrier", set()),
    ("layer_norm", "shared_row", "race-WAW-blocks", set()),
    (
        "gemm",
        "no_barrier_after_wait",
        "race-RAW",
        {"cp.async-hazard", "race-WAR", "uninitialised-read"},
    ),
    ("gemm", "wait_too_many", "cp.async-hazard", set()),
    ("gemm", "no_barrier_at_end", "race-WAR", {"race-RAW", "cp.async-hazard"}),
    ("gemm", "row_bound", "out-of-bounds", set()),
    ("gemm", "epilogue_bound", "race-WAW out-of-bounds", set()),
    ("gemm", "misaligned_copy", "misaligned", set()),
    ("attention", "no_barrier_at_end", "race-WAR", set()),
    ("pairs", "named_barrier_of_other_warps", "race-RAW race-WAR", {"uninitialised-read"}),
    ("pairs", "implicit_warp_synchrony", "race-RAW race-WAR", {"uninitialised-read"}),
    ("pairs", "barrier_for_ever", "deadlock", set()),
    ("pairs", "mask_too_wide", "bad-mask", set()),
    ("pairs", "inactive_lane", "shfl-inactive", set()),
    ("pairs", "atomic_and_plain", "race-RAW", {"race-WAR", "race-WAW"}),
    ("pairs", "reads_other_block", "race-RAW-blocks race-WAR-blocks", set()),
    ("pairs", "adds_to_other_row", "race-RAW-blocks race-WAR-blocks", set()),
    ("pairs", "shared_overrun", "out-of-bounds", set()),
    ("pairs", "uninitialised_read", "uninitialised-read", set()),
    ("pairs", "local_overrun", "out-of-bounds", set()),
    ("pairs", "read_only_load_of_written", "nc-load-of-written-data", set()),
    ("asynchronous", "mbarrier_without_wait", "race-RAW race-WAR", {"uninitialised-read"}),
    (
        "asynchronous",
        "bulk_copy_without_wait",
        "bulk-copy-hazard",
        RACES | {"uninitialised-read"},
    ),
    ("asynchronous", "bulk_copy_expects_more", "deadlock", set()),
    ("asynchronous", "bulk_store_without_fence", "missing-proxy-fence", set()),
    ("asynchronous", "bulk_store_reused_too_early", "bulk-copy-hazard", set()),
    ("asynchronous", "wgmma_without_wait", "wgmma-hazard", set()),
    ("asynchronous", "wgmma_without_fence", "missing-proxy-fence", set()),
]
ONLY_WRONG = [
    ("gemm", "wrong_fragment"),
    ("gemm", "swapped_registers"),
    ("attention", "stale_maximum"),
    ("attention", "mask_bound"),
]
GOOD = [("layer_norm", "layer_norm"), ("gemm", "gemm_bf16"), ("gemm", "gemm_s8")]
GOOD += [("attention", "attention"), ("asynchronous", "mbarrier_with_wait")]
GOOD += [("asynchronous", "bulk_copy"), ("asynchronous", "wgmma")]
GOOD += [("pairs", name) for name in PAIRS if name not in {bug for _, bug, *_ in REPORTED}]


def run(family: str, kernel: str, turn: int, **shape: int) -> Result:
    schedule = list(SCHEDULES.values())[turn % len(SCHEDULES)]
    return FAMILIES[family](kernel, schedule, **shape)


def name_of(family: str, bug: str) -> str:
    prefix = {"layer_norm": "layer_norm_", "gemm": "gemm_bf16_", "attention": "attention_"}
    return prefix.get(family, "") + bug


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("family", "kernel"), GOOD)
def test_without_a_bug_everything_is_clean_and_right(family, kernel, schedule):
    result = FAMILIES[family](kernel, SCHEDULES[schedule])
    assert result.launched.reports == []
    assert result.error <= result.tolerance


@pytest.mark.parametrize("turn", range(len(REPORTED)), ids=[f"{r[0]}-{r[1]}" for r in REPORTED])
def test_a_report_names_the_bug_and_its_line(turn):
    family, bug, kinds, wake = REPORTED[turn]
    result = run(family, name_of(family, bug), turn)
    marked = marked_lines(f"{family}.cu", bug)
    assert len(marked) == 1
    assert marked <= reported(result.launched, kinds.split()), result.launched.reports
    assert {report.kind for report in result.launched.reports} <= {*kinds.split()} | wake


@pytest.mark.parametrize(("family", "bug"), ONLY_WRONG)
def test_only_the_numbers_tell(family, bug):
    result = run(family, name_of(family, bug), 0)
    assert result.launched.reports == []
    assert result.error > 10 * result.tolerance


def test_only_the_counters_tell():
    """Without the swizzle the numbers are right and ldmatrix meets its banks several times."""
    counts = {}
    for bug in ("", "_no_swizzle"):
        result = run("gemm", f"gemm_bf16{bug}", 0, M=64, N=64)
        assert result.launched.reports == []
        assert result.right
        counts[bug] = result.launched.counts
    assert counts[""]["shared_wavefronts"] == counts[""]["shared_ideal_wavefronts"]
    assert counts["_no_swizzle"]["shared_wavefronts"] > 2 * counts[""]["shared_wavefronts"]


def test_a_multiple_of_the_tile_hides_a_bound():
    """Why the sizes above are ragged: 512 columns leave nothing for <= to reach."""
    result = run("layer_norm", "layer_norm_column_bound", 0, cols=512)
    assert result.launched.reports == []
    assert result.right


def test_a_launch_must_ask_for_much_shared_memory():
    """Host code of CUDA: 60 KB work after cudaFuncSetAttribute, and are refused without it."""
    y = torch.zeros(128)
    with ptx.run("sm_80", on_report="record") as session:
        library = ptx.load(FOLDER / "host.cu")
        assert library.launch(y, False) == INVALID_CONFIGURATION
        assert [report.kind for report in session.reports] == ["bad-launch"]
        assert library.launch(y, True) == 0
        assert torch.equal(y, torch.arange(128.0))
        assert len(session.reports) == 1
