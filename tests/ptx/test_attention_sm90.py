"""Attention's Hopper kernel (TMA, mbarriers, wgmma) on the executor: numbers by the tolerance rule
against float64, nothing to report, what it reads, and which calls it leaves to the general kernel.

By default bfloat16 runs at head dimension 64 and float16 at 128, so that a cold cache compiles two
kernels; the sweep crosses everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import ptx
from kernels.attention import cuda
from tests.ptx.attention_cases import NAMES, Case, by_torch, case, packed
from tests.ptx.conftest import SCHEDULES
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

ARCH = "sm_90a"
SETTINGS = ((torch.bfloat16, 64), (torch.float16, 128))
# Rows of a block and keys of a tile: 128. A warpgroup has 64 rows, a ring two tiles.
ROWS = TILE = 128
QUERIES, KEYS = 150, 300


def steep(each: Case) -> Case:
    """Scores that grow from tile to tile, so that every tile rescales what was summed before."""
    each.key *= torch.linspace(0.1, 8, each.key.shape[2])[:, None]
    return each


def shared_head(each: Case) -> Case:
    """Keys and values of one head, expanded: their stride of heads is 0."""
    each.key, each.value = (x[:, :1].expand(-1, each.query.shape[1], -1, -1) for x in
                            (each.key, each.value))  # fmt: skip
    return each


# Makes of a head dimension and a dtype the case of that name.
FEATURES: dict[str, Callable[[int, torch.dtype], Case]] = {
    "whole tiles": lambda d, t: case(ROWS, 2 * TILE, d, t),
    "every place of a ring twice and more": lambda d, t: steep(case(70, 700, d, t)),
    "causal": lambda d, t: case(KEYS, KEYS, d, t, causal=True),
    "causal, more keys": lambda d, t: case(QUERIES, KEYS, d, t, causal=True),
    "lower right": lambda d, t: case(QUERIES, KEYS, d, t, causal=True, lower_right=True),
    "rows that see nothing": lambda d, t: case(KEYS, 50, d, t, causal=True, lower_right=True),
    "rows that see only a sink": lambda d, t: case(
        KEYS, 50, d, t, shape=(1, 2, 1), sinks=torch.randn(2), causal=True, lower_right=True
    ),
    "sinks": lambda d, t: case(QUERIES, KEYS, d, t, shape=(1, 2, 2), sinks=torch.randn(2) * 4),
    "grouped heads, [B, T, H, D] in memory": lambda d, t: case(
        QUERIES, 140, d, t, shape=(2, 4, 2), layout="bthd", causal=True
    ),
    "expanded heads": lambda d, t: shared_head(case(QUERIES, 140, d, t, shape=(2, 2, 2))),
    "padded rows": lambda d, t: case(QUERIES, 140, d, t, shape=(2, 1, 1), layout="padded"),
    "window": lambda d, t: case(KEYS, KEYS, d, t, window=(20, 10)),
    "causal window": lambda d, t: case(
        QUERIES, 420, d, t, causal=True, lower_right=True, window=(140, -1)
    ),
    "half window": lambda d, t: case(QUERIES, KEYS, d, t, window=(-1, 30)),
    "window past the keys": lambda d, t: case(KEYS, 40, d, t, window=(5, 5)),
    "one query": lambda d, t: case(1, KEYS, d, t, shape=(1, 2, 1), causal=True, lower_right=True),
    "one key": lambda d, t: case(1, 1, d, t),
    "one row, all strides 0": lambda d, t: case(1, 1, d, t, shape=(1, 1, 1), layout="bthd"),
}
# What the general kernel serves, one for each reason.
OTHERS: dict[str, Callable[[int, torch.dtype], Case]] = {
    "softcap": lambda d, t: case(5, 7, d, t, softcap=2.0),
    "alibi": lambda d, t: case(5, 7, d, t, alibi_slopes=torch.rand(1, 1)),
    "mask": lambda d, t: case(5, 7, d, t, mask=torch.rand(1, 1, 5, 7) < 0.7),
    "negative scale": lambda d, t: case(5, 7, d, t, scale=-0.2),
    "scale 0": lambda d, t: case(5, 7, d, t, scale=0.0),
    "dropout": lambda d, t: case(5, 7, d, t, dropout_p=0.4),
    "global tokens": lambda d, t: case(5, 7, d, t, window=(1, 1), global_tokens=2),
    "packed": lambda d, t: packed([(3, 4), (2, 3)], d, t, causal=True),
    "no keys": lambda d, t: case(5, 0, d, t),
    "other head dimension": lambda d, t: case(5, 7, d - 8, t),
    "other head dimension of values": lambda d, t: case(5, 7, d, t, value_dim=d - 8),
    "rows off 16-byte boundaries": lambda d, t: case(5, 7, d, t, layout="odd"),
}
# Lengths around the ends of warps' rows, warpgroups, blocks and tiles.
EDGES = [(1, 128), (15, 129), (17, 127), (63, 64), (64, 65), (65, 255), (127, 257), (129, 1)]


def check(each: Case, schedule: str, label: str = "", kernel: str = "forward_sm90_kernel") -> None:
    with ptx.run(ARCH, schedule=schedule) as session:
        got = cuda.forward(*each.arguments())
    assert [launch.name.split("<")[0].split("::")[-1] for launch in session.launches] == [kernel]
    yardstick, exact = by_torch(each, each.query.dtype)[:2], by_torch(each, torch.float64)[:2]
    assert_as_exact_as_torch(got, yardstick, exact, [f"{name} {label}" for name in NAMES[:2]])


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature):
    number = list(FEATURES).index(feature)
    dtype, head_dim = SETTINGS[number % 2]
    check(FEATURES[feature](head_dim, dtype), SCHEDULES[number % 3])


@pytest.mark.parametrize(("dtype", "head_dim"), SETTINGS, ids=str)
def test_lengths_around_tiles(dtype, head_dim):
    for number, (queries, keys) in enumerate(EDGES[head_dim == 128 :: 2]):
        made = case(queries, keys, head_dim, dtype, causal=number % 2 == 1)
        check(made, SCHEDULES[number % 3], f"{queries} queries, {keys} keys")


def test_the_rest_is_left_to_the_general_kernel():
    for name, make in OTHERS.items():
        check(make(64, torch.bfloat16), "round_robin", name, "forward_kernel")


@pytest.mark.sweep
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_everything_on_everything(dtype, head_dim):
    for (name, make), schedule in itertools.product(FEATURES.items(), SCHEDULES):
        check(make(head_dim, dtype), schedule, f"{name}, {schedule}")
    for queries, keys in itertools.product((1, 16, 63, 64, 65, 128, 129), (1, 127, 128, 129, 257)):
        for causal in (False, True):
            made = case(queries, keys, head_dim, dtype, causal=causal, lower_right=keys % 2 == 1)
            check(made, "random", f"{queries} queries, {keys} keys, causal {causal}")
    for name, make in OTHERS.items():
        check(make(head_dim, dtype), "random", name, "forward_kernel")


def test_no_bit_depends_on_the_scheduler():
    made = case(140, 400, 64, torch.bfloat16, shape=(1, 2, 1), sinks=torch.randn(2))
    found = []
    options: list[dict[str, object]] = [{"schedule": name} for name in SCHEDULES]
    options += [{"schedule": "random", "preempt": 20, "async_early": True}]
    for each in options:
        with ptx.run(ARCH, **each):
            found.append(cuda.forward(*made.arguments()))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_there_is_room_for_the_rounding_of_a_gpu():
    """Tensor cores truncate their sums, and ex2.approx is another function than the executor's."""
    each = steep(case(100, 300, 64, torch.bfloat16, causal=True, lower_right=True))
    with ptx.run(ARCH, mma_rounding="truncating", jitter=True):
        got = cuda.forward(*each.arguments())
    yardstick, exact = by_torch(each, each.query.dtype)[:2], by_torch(each, torch.float64)[:2]
    assert_as_exact_as_torch(got, yardstick, exact, NAMES[:2])


def loaded(launch: ptx.executor.Launch) -> int:
    """Bytes that tensor copies read from global memory."""
    copies = (site for site in launch.sites if site["opcode"].startswith("cp.async.bulk.tensor"))
    return sum(site["bytes"] for site in copies if site["space"] == "global")


def test_what_is_visible_is_read_once_per_block_and_nothing_else():
    length, row = 1000, 2 * 64  # row: bytes
    blocks = range(0, length, ROWS)
    for options, tiles in (
        ({}, lambda _: range(8)),
        ({"causal": True}, lambda first: range(first // TILE + 1)),
        ({"window": (100, 0)}, lambda first: range(max(first - 100, 0) // TILE, first // TILE + 1)),
    ):
        made = case(length, length, 64, torch.bfloat16, **options)
        with ptx.run(ARCH, sample=0) as session:
            cuda.forward(*made.arguments())
        keys = sum(min(TILE, length - tile * TILE) for first in blocks for tile in tiles(first))
        assert loaded(session.launches[0]) == row * (length + 2 * keys)
