"""Int8 matmul's Triton kernels on the executor: every element, and no report at all.

A kernel is compiled anew for what divides K and N (its vectors), the weight's layout, dtypes, the
activation and which arguments there are; M, N, K, strides and parts are numbers to it.  So each
group below has one product kernel and many sizes.  Its tiles are small, which keeps compiling and
running cheap; those that are shipped run under `-m sweep`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

import ptx
from ptx import counters
from tests.ptx.conftest import SCHEDULES
from tests.ptx.int8_cases import (
    ACTIVATIONS,
    FLOATS,
    Options,
    check,
    check_call,
    check_rows,
    check_rows_of_bias,
    check_rows_of_equal_numbers,
)

pytest.importorskip("triton")
from kernels.int8_matmul import triton as backend
from kernels.int8_matmul import triton_plan as plan
from kernels.int8_matmul import triton_rows
from kernels.int8_matmul.rows import triton as rows_backend

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

FP32, BF16, FP16 = FLOATS
ARCHS = ("sm_80", "sm_90a")
Size = tuple[int, int, int]
# Of tensor cores: for sm_80 the least they take; for sm_90 the least of a whole warp group.
SMALL_TILES = {"sm_80": (16, 16, 32, 2, 3), "sm_90a": (64, 32, 64, 4, 3)}


@pytest.fixture
def small_tiles(monkeypatch):
    tiles = {"sm_80": SMALL_TILES["sm_80"], "sm_90": SMALL_TILES["sm_90a"]}
    for arch, tile in tiles.items():
        monkeypatch.setitem(plan.TILES, arch, dict.fromkeys((1, 2, 4), ((0, *tile),)))
    monkeypatch.setattr(plan, "NARROW_TILE", (16, 16, 32, 2, 2))
    monkeypatch.setattr(plan, "SMALLEST_M", 64)


def run(arch: str, sizes: Iterable[Size], options: Options, multiprocessors: int = 1) -> set[str]:
    """Checks the calls, schedules by turns; the names of the kernels they launched."""
    names = set()
    for turn, (m, n, k) in enumerate(sizes):
        schedule = SCHEDULES[turn % len(SCHEDULES)]
        with ptx.run(
            arch, schedule=schedule, seed=turn, multiprocessors=multiprocessors
        ) as session:
            check(backend, m, n, k, options)
        assert not any(launch.reports for launch in session.launches)
        names |= {launch.name for launch in session.launches}
    return names


# ---- rows and columns past the tiles' ends, K past its blocks and past all stages; ten tiles down
# and five across; rows that fill their tiles, of which several lie side by side

RAGGED = [(1, 1, 36), (150, 65, 36), (16, 17, 44), (31, 15, 52), (33, 63, 204)]
VECTORS = [(64, 72, 48), (65, 40, 400), (130, 24, 112), (1, 8, 16)]
BY_COLUMNS = [(17, 20, 36), (33, 12, 44), (16, 4, 4), (1, 36, 204)]
RAW = [(17, 40, 36), (64, 72, 396), (16, 8, 4), (130, 24, 60)]
GROUPS = {
    "vectors of 4": ("sm_80", RAGGED, Options("int8", bias=FP32)),
    "vectors of 16": ("sm_90a", VECTORS, Options("int8", bias=BF16, out_dtype=BF16,
                                                 activation="gelu_tanh", gap=16)),
    "by columns, raw": ("sm_90a", RAW, Options("raw", n_contiguous=True)),
    "by columns": ("sm_80", BY_COLUMNS, Options("int8", bias=FP16, out_dtype=FP16,
                                                activation="relu", n_contiguous=True, gap=4)),
    "weight only": ("sm_90a", VECTORS, Options("weight_only", BF16, BF16, activation="gelu")),
    "weight only, by columns": ("sm_80", BY_COLUMNS, Options("weight_only", FP16, FP16,
                                                             n_contiguous=True)),
    "weight only, float32": ("sm_80", RAGGED, Options("weight_only", FP32, FP32, bias=FP32)),
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_products(small_tiles, group):
    arch, sizes, options = GROUPS[group]
    assert run(arch, sizes, options) == {"product_kernel"}


def test_rows_are_quantised_first(small_tiles):
    """The product's kernel is that of "vectors of 4"."""
    for mode in ("dynamic", "static"):
        names = run("sm_80", RAGGED[1:3], Options(mode, BF16, bias=FP32))
        assert names == {"_rows_kernel", "product_kernel"}
    scalar = Options("int8", bias=FP32, per_tensor=True)
    assert run("sm_80", RAGGED[:2], scalar) == {"product_kernel"}


# ---- parts of K, which a second kernel adds

PARTED = [(1, 17, 516), (16, 33, 132), (3, 1, 1028)]
PARTED_VECTORS = [(1, 20, 516), (16, 36, 132), (3, 4, 1028)]
# Columns that end in each of the eight that a thread adds, and in a second block.
ENDS = [(2, 128 * i + 24 * i % 128 + 1, 260) for i in range(9)]
ENDS_VECTORS = [(2, 128 * i + 24 * i % 120 + 4, 260) for i in range(9)]


@pytest.mark.parametrize(
    ("sizes", "ends", "options"),
    [
        (PARTED, [], Options("raw")),
        (PARTED, ENDS, Options("int8", bias=BF16, out_dtype=FP16, activation="gelu")),
        (PARTED_VECTORS, ENDS_VECTORS, Options("weight_only", FP16, activation="relu")),
    ],
    ids=["raw", "int8", "weight_only"],
)
def test_parts_of_the_sum(small_tiles, sizes, ends, options):
    names = run("sm_80", sizes, options, multiprocessors=9)
    names |= run("sm_80", ends, options, multiprocessors=200)
    assert names == {"product_kernel", "combine_kernel"}


def test_parts_are_no_more_than_there_is_work(small_tiles):
    def parts(rows: int, cols: int, depth: int) -> int:
        a, weight = (torch.zeros(n, depth, dtype=torch.int8) for n in (rows, cols))
        with ptx.run("sm_80", multiprocessors=100):
            found = plan.plan(a, weight, plan.layout(a, weight), "none")
        assert (found.parts - 1) * found.part_blocks * 32 < depth
        return found.parts

    assert parts(16, 16, 100) == 1
    assert parts(16, 16, 32 * plan.PART_BLOCKS * 3) == 3
    assert parts(16, 16, 2**17) == plan.MAX_PARTS
    assert parts(16, 16 * 50, 2**17) == 2
    assert parts(16, 16 * 51, 2**17) == 1


# ---- rows of no whole vectors: few are read as they lie, many are copied

ODD = [(1, 5, 7), (16, 17, 33), (3, 33, 101)]


@pytest.mark.parametrize("n_contiguous", [False, True])
def test_narrow_rows(small_tiles, n_contiguous):
    options = Options("int8", n_contiguous=n_contiguous, gap=3)
    assert run("sm_80", ODD, options) == {"product_kernel"}


@pytest.mark.parametrize(("mode", "k"), [("int8", 1), ("int8", 17), ("dynamic", 33)])
def test_narrow_rows_are_copied(mode, k):
    """Into the kernel of rows of whole vectors: K becomes 16, 32 and 48."""
    options = Options(mode, BF16, n_contiguous=k == 17, gap=1)
    with ptx.run("sm_80", multiprocessors=1) as session:
        x = check(backend, 20, 9, k, options)
    assert plan.padded_width(*x.shape) == -(-k // 16) * 16
    sites = [s for s in session.launches[-1].sites if s["space"] == "global"]
    assert max(site["bytes_per_lane"] for site in sites if site["access"] == "read") == 16


def test_a_weight_by_columns_is_transposed_for_many_rows(small_tiles, monkeypatch):
    monkeypatch.setattr(plan, "TRANSPOSED_ROWS", 40)
    options = Options("int8", bias=FP32, n_contiguous=True)
    for rows in (39, 40):
        weight = torch.zeros(64, 48, dtype=torch.int8).t()
        a = torch.zeros(rows, 64, dtype=torch.int8)
        assert (plan.prepared(a, weight)[1] is weight) == (rows == 39)
    run("sm_80", [(40, 36, 48)], options)


def test_views_that_start_anywhere(small_tiles):
    for offset in (1, 4):
        run("sm_80", [(5, 17, 36)], Options("int8", offset=offset))


# ---- extremes


@pytest.mark.parametrize("parts", [1, 4])
def test_largest_sums(small_tiles, parts):
    """127 * 127 * 2^17 is 2^31 - 2^25 + 2^17, and int32 holds it; scaled it is rounded once."""
    depth = 2**17
    a = torch.full((2, depth), 127, dtype=torch.int8)
    weight = torch.full((3, depth), 127, dtype=torch.int8)
    a[1], weight[2] = -127, -128
    with ptx.run("sm_80", multiprocessors=parts):
        check_call(backend, (a, weight, None, None, None, "none", "raw", torch.int32))
        scales = torch.tensor([0.7, 1.3]), torch.tensor([0.9, 1.1, 0.8])
        check_call(backend, (a, weight, *scales, None, "none", "int8", FP32))


def test_what_is_not_finite_stays_in_its_row(small_tiles):
    x = torch.randn(6, 36)
    x[1, 3], x[2, 35], x[3, 0] = torch.nan, torch.inf, -torch.inf
    x[4] = 0
    weight = torch.randint(-128, 128, (17, 36), dtype=torch.int8)
    scale, bias = torch.rand(17) + 0.5, torch.randn(17)
    for mode, x_scale in (("dynamic", None), ("static", torch.tensor([0.02]))):
        given = x.bfloat16(), weight, x_scale, scale, bias, "relu", mode, FP32
        with ptx.run("sm_80", multiprocessors=1):
            y = check_call(backend, given)
        assert y.isnan().all(1).tolist() == [False, True, True, True, False, False]


def test_float32_infinities_are_what_torch_makes_of_them(small_tiles):
    """Taken apart in pieces of bfloat16, an infinity has no rest, and a NaN stays one."""
    x = torch.randn(4, 36)
    x[0, 2], x[1, 5] = torch.inf, -torch.inf
    x[2, 7] = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)[0]
    x[3] *= 1e36
    weight = torch.randint(1, 9, (17, 36), dtype=torch.int8)
    given = x, weight, None, torch.ones(17), torch.randn(17), "none", "weight_only", FP32
    with ptx.run("sm_80", multiprocessors=1):
        check_call(backend, given)


# ---- rows as int8


def edged(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of zeros, of ties, of what is not finite, and around the smallest that are not zeros."""
    x = (torch.randn(rows, cols) * 3).to(dtype)
    x[0] = 0
    x[1] = torch.arange(cols) % 255 - 127
    x[1, -1] = 254  # scale 2: every odd number is a tie
    x[2, -1], x[3, 0], x[4, cols // 2] = torch.nan, torch.inf, -torch.inf
    if dtype != FP16:
        for row, largest in ((5, 2.0**-120), (6, 2.0**-121)):
            x[row] *= 2.0**-124
            x[row, 0] = largest
    return x


def run_rows(
    arch: str, rows: int, cols: int, dtype: torch.dtype, normalized: bool, turn: int
) -> None:
    """As they are, or normalised with weight and bias."""
    with ptx.run(arch, schedule=SCHEDULES[turn % 3], seed=turn, multiprocessors=1) as session:
        if normalized:
            weight, bias = torch.randn(cols).to(dtype), torch.randn(cols).to(dtype)
            x = torch.randn(rows, cols).to(dtype) * 2 + 3
            check_rows(rows_backend, x, weight, bias, normalized=True)
        else:
            check_rows(rows_backend, edged(rows, cols, dtype))
    assert not any(launch.reports for launch in session.launches)
    long = "_long" if cols > 16384 else ""
    assert {launch.name for launch in session.launches} == {f"{long}_rows_kernel"}


@pytest.mark.parametrize(
    ("arch", "lengths", "dtype", "normalized"),
    [
        ("sm_80", (772, 1020, 516), FP32, False),
        ("sm_90a", (77, 127, 65), FP32, True),
        ("sm_90a", (16400, 17008, 20464), BF16, False),
        ("sm_80", (16400, 17008), FP16, True),
    ],
)
def test_rows(arch, lengths, dtype, normalized):
    """So many that a program walks over several tiles of them."""
    for turn, cols in enumerate(lengths):
        rows = 70 if cols < 300 else 19 if cols < 2000 else 7
        run_rows(arch, rows + turn, cols, dtype, normalized, turn)


def test_the_largest_number_may_be_anywhere():
    """In each lane's first and last, in the kernel of float32 above."""
    x = torch.rand(64, 1020)
    x[torch.arange(64), (torch.arange(64) * 16 + torch.arange(64) % 4).clamp(max=1019)] = -30
    with ptx.run("sm_80", multiprocessors=1):
        check_rows(rows_backend, x)


def test_normalized_rows_that_are_their_bias():
    """In the kernel of float32 above."""
    with ptx.run("sm_90a", multiprocessors=1):
        check_rows_of_bias(rows_backend, torch.randn(9, 77), FP32)
        check_rows_of_equal_numbers(rows_backend, 9, 127)


def test_rows_with_gaps_move_once():
    """In the kernel of float32 above."""
    wide = torch.randn(64, 776)
    with ptx.run("sm_80", bounds="view", multiprocessors=4) as session:
        check_rows(rows_backend, wide[:, :768])
    assert counters.moved_over_least(session.launches) <= 1.01


def test_few_rows_read_the_weight_once():
    x = torch.randint(-128, 128, (4, 1024), dtype=torch.int8)
    weight = torch.randint(-128, 128, (256, 1024), dtype=torch.int8)
    with ptx.run("sm_90a", multiprocessors=16) as session:
        check_call(backend, (x, weight, None, None, None, "none", "raw", torch.int32))
    product = session.launches[0]
    moved = 32 * product.sectors_moved
    own = x.numel() + 16 * 4 * 256  # x, read by each of 8 tiles; parts of y
    assert weight.numel() <= moved <= 1.02 * weight.numel() + 8 * own
    reads = [s for s in product.sites if s["space"] == "global" and s["access"] == "read"]
    assert all(site["bytes_per_lane"] == 16 for site in reads)
    assert product.counts["shared_wavefronts"] == product.counts["shared_ideal_wavefronts"]


# ---- everything, everywhere

SHIPPED = [
    (arch, size, row) for arch in ARCHS for size in (1, 2, 4) for row in plan.TILES[arch[:5]][size]
]


@pytest.mark.sweep
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("arch", "size", "row"), SHIPPED, ids=str)
def test_shipped_tiles(monkeypatch, arch, size, row, schedule):
    monkeypatch.setitem(plan.TILES, arch[:5], {size: (row,)})
    mode, dtype = ("int8", BF16) if size == 1 else ("weight_only", BF16 if size == 2 else FP32)
    options = Options(mode, dtype, bias=FP16, activation="none" if row[0] else "gelu_tanh")
    k = 5 * row[3] + (0 if row[0] else 36)
    for by_columns in (False, True):
        with ptx.run(arch, schedule=schedule, multiprocessors=1) as session:
            check(
                backend, row[1] + 3, 2 * row[2] + 16, k, replace(options, n_contiguous=by_columns)
            )
        assert not any(launch.reports for launch in session.launches)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_everywhere(small_tiles, arch, group):
    _, sizes, options = GROUPS[group]
    for dtype, activation in itertools.product(FLOATS, ACTIVATIONS if options.bias else ["none"]):
        changed = {"activation": activation} if options.mode != "raw" else {}
        run(arch, sizes, replace(options, dtype=dtype, **changed))


@pytest.mark.sweep
@pytest.mark.parametrize("mode", ["dynamic", "static", "int8"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_residue(small_tiles, mode, dtype):
    """Of K mod the block, and of M and N mod the tile, with it."""
    for k in range(1, 65):
        sizes = [(k % 17 + 1, k % 33 + 1, k), (k, 64 - k + 1, 64 + k)]
        run("sm_80", sizes, Options(mode, dtype, dtype, bias=dtype, n_contiguous=k % 3 == 0))


@pytest.mark.sweep
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_around_every_switch(dtype, arch, normalized):
    for turn, (last, *_) in enumerate(triton_rows.TILES):
        for cols in (last, last - 1, last // 2 + 1):
            run_rows(arch, 70 if cols < 300 else 9, cols, dtype, normalized, turn)
