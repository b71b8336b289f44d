"""Attention's CUDA kernels from the PTX that nvcc makes of them: numbers by the tolerance rule
against float64, nothing for the executor to report, and what they read and how.

By default the features take the dtypes in turn, at the narrowest head dimensions, from Hopper's PTX
alone, so that a cold cache compiles few kernels; the sweep crosses everything. Hopper's own kernel
(test_attention_sm90.py) does not serve 56 columns, nor a softcap.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ptx
from kernels.attention import cuda
from ptx import counters
from tests.ptx.attention_cases import Case, by_backend, case, check, packed
from tests.ptx.conftest import ARCHS, DEFAULT_ARCHS, SCHEDULES

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SETTINGS = tuple(zip(DTYPES, (56, 64, 56), SCHEDULES, strict=True))
(ARCH,) = DEFAULT_ARCHS["attention"]
# Rows of a block: 128 of 16-bit floats, 64 of fp32. Rows of a tile: 64, 32, 16 or 8.
QUERIES, KEYS = 150, 170
FAR_LENGTHS = [(5, 7), (0, 3), (65, 65), (64, 1), (3, 0), (90, 100)]


def few(*shape: int) -> Tensor:
    """Global positions: about one in 25, and the last one."""
    mask = torch.rand(shape) < 0.04
    mask[..., -1] = True
    return mask


def weights(*shape: int, share: float) -> Tensor:
    return torch.rand(shape) < share


# Makes of a head dimension and a dtype the case of that name.
FEATURES: dict[str, Callable[[int, torch.dtype], Case]] = {
    "grouped heads, [B, T, H, D] in memory": lambda d, t: case(
        QUERIES, KEYS, d, t, shape=(2, 4, 2), layout="bthd", causal=True
    ),
    "padded rows": lambda d, t: case(
        QUERIES, KEYS, d - 3, t, layout="padded", causal=True, value_dim=d - 9
    ),
    "rows off 16-byte boundaries": lambda d, t: case(QUERIES, KEYS, d - 3, t, layout="odd"),
    "one column": lambda d, t: case(QUERIES, KEYS, 1, t, value_dim=17, scale=0.3),
    "lower right": lambda d, t: case(QUERIES, KEYS, d, t, causal=True, lower_right=True),
    "window": lambda d, t: case(QUERIES, KEYS, d, t, window=(20, 10)),
    "causal window": lambda d, t: case(
        QUERIES, KEYS, d, t, causal=True, lower_right=True, window=(40, -1)
    ),
    "half window": lambda d, t: case(QUERIES, KEYS, d, t, window=(-1, 30)),
    "global tokens": lambda d, t: case(QUERIES, KEYS, d, t, window=(20, 10), global_tokens=5),
    "many global tokens, causal": lambda d, t: case(
        QUERIES, KEYS, d, t, causal=True, window=(20, 0), global_tokens=70, lower_right=True
    ),
    "global mask": lambda d, t: case(
        QUERIES, KEYS, d, t, shape=(2, 2, 1), window=(20, 10), global_mask=few(2, KEYS)
    ),
    "global mask and tokens, causal": lambda d, t: case(
        QUERIES,
        KEYS,
        d,
        t,
        shape=(2, 2, 1),
        causal=True,
        lower_right=True,
        window=(9, -1),
        global_tokens=2,
        global_mask=few(2, KEYS),
    ),
    "global mask, more queries than keys": lambda d, t: case(
        KEYS, QUERIES, d, t, lower_right=True, window=(9, 3), global_mask=few(1, QUERIES)
    ),
    "softcap": lambda d, t: case(QUERIES, KEYS, d, t, softcap=2.0, causal=True),
    "negative scale": lambda d, t: case(QUERIES, KEYS, d, t, scale=-0.2),
    "scale 0": lambda d, t: case(QUERIES, KEYS, d, t, scale=0.0, causal=True),
    "alibi": lambda d, t: case(
        QUERIES, KEYS, d, t, shape=(1, 2, 2), alibi_slopes=torch.rand(2, 1).t(), lower_right=True
    ),
    "sinks and dlse": lambda d, t: case(
        QUERIES, KEYS, d, t, shape=(2, 2, 1), sinks=torch.randn(2), dlse=torch.randn(2, 2, QUERIES)
    ),
    "rows that see only a sink": lambda d, t: case(
        KEYS, 50, d, t, shape=(1, 2, 1), sinks=torch.randn(2), causal=True, lower_right=True
    ),
    "rows that see nothing": lambda d, t: case(
        KEYS, 50, d, t, causal=True, lower_right=True, dlse=torch.randn(1, 1, KEYS)
    ),
    "mask of keys": lambda d, t: case(
        QUERIES, KEYS, d, t, mask=weights(1, 1, 1, KEYS, share=0.8).expand(1, 1, QUERIES, KEYS)
    ),
    "mask of few": lambda d, t: case(
        QUERIES, KEYS, d, t, mask=weights(1, 1, QUERIES, KEYS, share=0.02)
    ),
    "float mask": lambda d, t: case(
        QUERIES, KEYS, d, t, shape=(1, 2, 1), mask=torch.randn(1, 2, QUERIES, KEYS)
    ),
    "float mask of the inputs' dtype": lambda d, t: case(
        QUERIES, KEYS, d, t, mask=torch.randn(1, 1, QUERIES, 1).to(t).expand(-1, -1, -1, KEYS)
    ),
    "dropout": lambda d, t: case(QUERIES, KEYS, d, t, shape=(1, 2, 1), dropout_p=0.3, causal=True),
    "dropout with globals": lambda d, t: case(
        QUERIES, KEYS, d, t, dropout_p=0.3, window=(20, 10), global_mask=few(1, KEYS)
    ),
    "everything dropped": lambda d, t: case(QUERIES, KEYS, d, t, dropout_p=1.0),
    "packed": lambda d, t: packed(FAR_LENGTHS, d, t, shape=(1, 2, 1), causal=True),
    "packed with everything": lambda d, t: packed(
        FAR_LENGTHS,
        d,
        t,
        shape=(1, 2, 1),
        causal=True,
        lower_right=True,
        window=(10, -1),
        global_tokens=3,
        dropout_p=0.2,
        softcap=3.0,
        alibi_slopes=torch.rand(len(FAR_LENGTHS), 2),
        sinks=torch.randn(2),
    ),
    "no keys": lambda d, t: case(5, 0, d, t),
    "no keys but sinks": lambda d, t: case(5, 0, d, t, sinks=torch.randn(1)),
    "one key": lambda d, t: case(1, 1, d, t),
    "one query": lambda d, t: case(1, 300, d, t, shape=(1, 2, 1), causal=True, lower_right=True),
}
# Lengths around the ends of tiles and blocks.
EDGES = [(1, 64), (63, 65), (64, 31), (65, 128), (127, 33), (128, 129), (129, 63), (33, 127)]


def run(each: Case, arch: str, schedule: str, seed: int = 0) -> ptx.Session:
    with ptx.run(arch, schedule=schedule, seed=seed) as session:
        check(cuda, each)
    return session


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature):
    dtype, head_dim, schedule = SETTINGS[list(FEATURES).index(feature) % len(SETTINGS)]
    run(FEATURES[feature](head_dim, dtype), ARCH, schedule)


@pytest.mark.parametrize(("dtype", "schedule"), [*zip(DTYPES, SCHEDULES, strict=True)], ids=str)
def test_lengths_around_tiles(dtype, schedule):
    for number, (queries, keys) in enumerate(EDGES):
        run(case(queries, keys, 40, dtype, causal=number % 2 == 1), ARCH, schedule, number)


@pytest.mark.sweep
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_everything_on_everything(arch, dtype, head_dim):
    for (name, make), schedule in itertools.product(FEATURES.items(), SCHEDULES):
        with ptx.run(arch, schedule=schedule):
            check(cuda, make(head_dim, dtype), f"{name}, {schedule}")
    for (queries, keys), columns in itertools.product(EDGES, (head_dim - 24, head_dim)):
        run(case(queries, keys, columns, dtype, causal=keys < 65), arch, "random", queries)


def test_no_bit_depends_on_the_scheduler():
    """Sums are added in one order, whichever thread comes first and however often it gives way."""
    made = case(70, 140, 64, torch.bfloat16, shape=(1, 2, 1), dropout_p=0.1, sinks=torch.randn(2))
    found = []
    for schedule in ({"schedule": name} for name in SCHEDULES):
        with ptx.run(ARCH, **schedule):
            found.append(by_backend(cuda, made))
    with ptx.run(ARCH, schedule="random", preempt=20, async_early=True):
        found.append(by_backend(cuda, made))
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            assert first is None or torch.equal(first, second)


def test_there_is_room_for_the_rounding_of_a_gpu():
    """Tensor cores truncate their sums, and ex2.approx is another function than the executor's."""
    for dtype in (torch.float32, torch.bfloat16):
        with ptx.run(ARCH, mma_rounding="truncating", jitter=True):
            check(cuda, case(100, 170, 56, dtype, causal=True, lower_right=True))


def loaded(launch: ptx.executor.Launch) -> int:
    """Bytes read from global memory by asynchronous copies: the rows of tiles."""
    copies = (site for site in launch.sites if site["opcode"].startswith("cp.async"))
    return sum(site["bytes"] for site in copies if site["space"] == "global")


def test_tiles_are_read_once_and_without_bank_conflicts():
    queries, keys, row = 300, 200, 2 * 64  # row: bytes
    with ptx.run(ARCH) as session:
        by_backend(cuda, case(queries, keys, 64, torch.bfloat16, softcap=3.0))
    assert counters.wavefronts_over_ideal(session.launches) == 1.0
    forward, _, dkey_dvalue, dquery = session.launches
    blocks = -(-queries // 128)
    assert loaded(forward) == row * (queries + blocks * 2 * keys)
    assert loaded(dquery) == row * (2 * queries + blocks * 2 * keys)
    assert loaded(dkey_dvalue) == row * (2 * keys + -(-keys // 128) * 2 * queries)


def test_what_a_window_hides_is_not_read():
    """Twice the length costs twice as much, not four times, with global positions, too."""
    read = []
    for length in (1024, 2048):
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[:, [17, 700]] = True
        made = case(
            length, length, 16, torch.bfloat16, causal=True, window=(50, 0), global_mask=mask
        )
        with ptx.run(ARCH, sample=0) as session:
            by_backend(cuda, made)
        read.append([loaded(launch) for launch in session.launches if "kernel<" in launch.name])
    for short, long in zip(*read, strict=True):
        assert long <= 2.2 * short
