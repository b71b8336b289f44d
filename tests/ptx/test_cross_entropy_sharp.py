"""The sharpest inputs (cross_entropy_sharp_cases.py) for the cuda and triton kernels of rows of
logits, in the sizes where a class is easily lost and, by default, the code that other tests use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import ptx
from kernels import dispatch
from tests.ptx.conftest import DEFAULT_ARCHS, SCHEDULES
from tests.ptx.cross_entropy_cases import DTYPES, EVERYTHING, PLAIN, SOFT, Options
from tests.ptx.cross_entropy_sharp_cases import (
    Problem,
    capped,
    check_sharp,
    even,
    far,
    peaks,
    placed,
    special,
    ties,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

(CUDA_ARCH,) = DEFAULT_ARCHS["cross_entropy"]
PLACES = [(3, 0), (8, 0), (0, 1), (5, 3)]  # gaps between rows, and where the first starts
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Z_LOSS = Options(z_loss=1e-2)


def run(backend: str, arch: str, problems: Iterator[Problem], multiprocessors: int = 1) -> None:
    module: ModuleType = dispatch.load("cross_entropy", backend)
    for turn, problem in enumerate(problems):
        schedule = SCHEDULES[turn % len(SCHEDULES)]
        with ptx.run(arch, schedule=schedule, seed=turn, multiprocessors=multiprocessors):
            check_sharp(module, problem)


def problems(rows: int, classes: int, dtype: torch.dtype, options: Options) -> Iterator[Problem]:
    """All kinds: peaks in each place of a vector and in each row of a tile."""
    yield even(rows, classes, dtype, options, 1.0)
    yield even(rows, classes, dtype, options, -2.0)
    yield peaks(rows, classes, dtype, options, 37)
    yield ties(rows, classes, dtype, options, 1.0)
    yield ties(rows, classes, dtype, options, -1.0)
    yield far(classes, dtype, options)
    yield special(classes, dtype, options)
    if options.softcap:
        yield capped(7, classes, dtype, options)


def views(rows: int, classes: int, dtype: torch.dtype, options: Options) -> Iterator[Problem]:
    """All kinds in all places."""
    for turn, place in enumerate(PLACES):
        for problem in problems(rows, classes, dtype, options):
            yield placed(problem, *place, inplace=turn % 2 == 0)
        many = placed(peaks(96, classes, dtype, options, 37), *place, inplace=turn % 2 == 1)
        yield many  # in each place of a thread's vectors


CUDA = [(300, 7), (70, 65), (40, 256), (24, 1001), (20, 2569), (9, 5003), (7, 9001)]
CUDA_OPTIONS = (Z_LOSS, EVERYTHING, SOFT)


@pytest.mark.parametrize(
    ("rows", "classes", "dtype"),
    [
        pytest.param(*shape, dtype, marks=[pytest.mark.sweep] * (dtype != BF16))
        for shape in CUDA
        for dtype in DTYPES
    ],
    ids=str,
)
def test_cuda(rows, classes, dtype):
    for options in CUDA_OPTIONS:
        if options.probabilities is not None:
            options = replace(options, probabilities=dtype)
        run("cuda", CUDA_ARCH, problems(rows, classes, dtype, options))


@pytest.mark.parametrize("classes", [65, 2600])
def test_cuda_views(classes):
    run("cuda", CUDA_ARCH, views(9, classes, BF16, EVERYTHING))


def test_cuda_rows_that_blocks_share():
    """Also parts that are -inf only, and so many parts that lanes merge several."""
    for rows, options in ((1, EVERYTHING), (5, SOFT), (8, replace(EVERYTHING, stats=False))):
        run("cuda", CUDA_ARCH, problems(rows, 12_301, BF16, options), multiprocessors=16)
    parts = 100
    shared, plain = (even(1, parts * 4096, BF16, o, 1.0) for o in (EVERYTHING, Z_LOSS))
    falls = torch.arange(parts) * 19 % 32 / 4  # of two neighbours now one, now the other is less
    shared.logits[0] -= falls.repeat_interleave(4096).to(BF16)
    plain.logits[0, : 2 * 4096] = -torch.inf
    run("cuda", CUDA_ARCH, iter([shared, plain]), multiprocessors=64)


# What tests/ptx/test_cross_entropy_triton.py compiles by default.
TRITON = [
    ("sm_80", FP32, Z_LOSS, 40, (77, 127)),
    ("sm_80", BF16, SOFT, 13, (1009,)),
    ("sm_90a", BF16, EVERYTHING, 40, (88, 128)),
    ("sm_80", BF16, Z_LOSS, 20, (1042, 2047)),
    ("sm_90a", FP32, EVERYTHING, 20, (1041, 2047)),
    ("sm_90a", FP16, SOFT, 9, (1041,)),
]


@pytest.mark.parametrize(("arch", "dtype", "options", "rows", "lengths"), TRITON, ids=str)
def test_triton(arch, dtype, options, rows, lengths):
    pytest.importorskip("triton")
    for classes in lengths:
        run("triton", arch, problems(rows, classes, dtype, options))


TILES = [("sm_80", FP32, Z_LOSS), ("sm_90a", BF16, EVERYTHING)]


@pytest.mark.parametrize(("arch", "dtype", "options"), TILES, ids=str)
def test_triton_rows_of_many_lengths_of_a_tile(arch, dtype, options):
    pytest.importorskip("triton")
    lengths = (classes for classes in range(65, 128, 3) if classes % 8)
    run("triton", arch, (even(3, classes, dtype, options, 1.0) for classes in lengths))


@pytest.mark.parametrize("classes", [69, 127, 1569])
def test_triton_views(classes):
    pytest.importorskip("triton")
    run("triton", "sm_80", views(13, classes, BF16, PLAIN))


def test_triton_rows_that_programs_share():
    pytest.importorskip("triton")
    for rows in (1, 3):
        run("triton", "sm_90a", problems(rows, 20_481, FP32, PLAIN), multiprocessors=8)
    for place in (1, 700, 1024, 1500):  # two parts of a warp each
        one = peaks(1, 2048, BF16, Z_LOSS, 0, place), ties(1, 2048, BF16, Z_LOSS, 1.0)
        run("triton", "sm_80", iter(one))
