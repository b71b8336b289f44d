"""Shuffles, votes, redux, match and elect against formulas of the PTX ISA, lane by lane."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from tests.ptx.assembly import Array, Program, clean, kernel, kinds

MODES = ("up", "down", "bfly", "idx")
LANES = np.arange(32)


def warp_kernel(name: str, instruction: str) -> str:
    """Per lane: the words a, b, c, mask of array 1 in %r10 … %r13; %r20 and %p1 to array 2."""
    load = "mad.wide.u32 %rd10, %r1, 16, %rd1; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd10];"
    store = (
        "selp.b32 %r21, 1, 0, %p1; mad.wide.u32 %rd11, %r1, 8, %rd2;"
        "st.global.v2.b32 [%rd11], {%r20, %r21};"
    )
    skip = "shr.u32 %r14, %r13, %r2; and.b32 %r14, %r14, 1; setp.eq.u32 %p9, %r14, 0;"
    body = f"{load} {skip} setp.ne.u32 %p2, %r10, 0; @%p9 bra DONE; {instruction} {store} DONE:"
    return kernel(name, body, pointers=2)


VOTES = {"ballot": "b32 %r20", "all": "pred %p1", "any": "pred %p1", "uni": "pred %p1"}
REDUX = {
    "add_u32": lambda v: v.sum(dtype=np.uint32),
    "min_s32": lambda v: v.view(np.int32).min(),
    "max_s32": lambda v: v.view(np.int32).max(),
    "min_u32": np.min,
    "max_u32": np.max,
    "and_b32": np.bitwise_and.reduce,
    "or_b32": np.bitwise_or.reduce,
    "xor_b32": np.bitwise_xor.reduce,
}


@functools.cache
def program() -> Program:
    kernels = [
        warp_kernel(m, f"shfl.sync.{m}.b32 %r20|%p1, %r10, %r11, %r12, %r13;") for m in MODES
    ]
    kernels += [
        warp_kernel(name, f"vote.sync.{name}.{result}, %p2, %r13;")
        for name, result in VOTES.items()
    ]
    kernels += [
        warp_kernel(name, f"redux.sync.{name.replace('_', '.')} %r20, %r10, %r13;")
        for name in REDUX
    ]
    kernels += [
        warp_kernel("match_any", "match.any.sync.b32 %r20, %r10, %r13;"),
        warp_kernel("match_all", "match.all.sync.b32 %r20|%p1, %r10, %r13;"),
        warp_kernel("elect", "elect.sync %r20|%p1, %r13;"),
        warp_kernel("exchange", EXCHANGE.format(sync="bar.warp.sync %r13;")),
        warp_kernel("exchange_unsynchronised", EXCHANGE.format(sync="")),
    ]
    return Program(*kernels)


# Each lane stores its word at array 2 and reads its neighbour's.
EXCHANGE = (
    "mad.wide.u32 %rd12, %r2, 8, %rd2; st.global.b32 [%rd12+4], %r10; {sync}"
    "xor.b32 %r15, %r2, 1; mad.wide.u32 %rd12, %r15, 8, %rd2; ld.global.b32 %r20, [%rd12+4];"
    "setp.eq.u32 %p1, 0, 0; mad.wide.u32 %rd13, %r1, 16, %rd1; st.global.b32 [%rd13], %r20;"
    "bra DONE;"
)


def run(
    name: str, a: Array, b: int | Array = 0, c: int | Array = 0, mask: int | Array = 2**32 - 1
) -> tuple[Array, Array, set[str]]:
    words = np.zeros((32, 4), np.uint32)
    words[:, 0], words[:, 1], words[:, 2], words[:, 3] = a, b, c, mask
    out = np.zeros((32, 2), np.uint32)
    launch = program().run(name, words, out)
    return out[:, 0], out[:, 1].astype(bool), kinds(launch)


def random_words(seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 2**32, 32).astype(np.uint32)


def shuffle_source(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The pseudo-code of shfl.sync."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    highest = (lane & segment) | (clamp & ~segment)
    source = {
        "up": lane - b,
        "down": lane + b,
        "bfly": lane ^ b,
        "idx": (lane & segment) | (b & ~segment),
    }[mode]
    valid = source >= highest if mode == "up" else source <= highest
    return (source if valid else lane), valid


@pytest.mark.parametrize("width", [32, 16, 4, 1])
@pytest.mark.parametrize("mode", MODES)
def test_shuffle(mode: str, width: int) -> None:
    """The c operand is as __shfl_*_sync makes it from the width."""
    values = random_words(width)
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 3, width - 1, 17, 31, 33):
        got, valid, found = run(mode, values, b, c)
        sources = [shuffle_source(mode, lane, b, c) for lane in LANES]
        assert not found
        assert (got == values[[source for source, _ in sources]]).all()
        assert (valid == [ok for _, ok in sources]).all()


@pytest.mark.parametrize("mode", MODES)
def test_shuffle_with_a_clamp_and_lanes_of_their_own(mode: str) -> None:
    """b and c differ from lane to lane, and c's clamp is not the segment's end."""
    values, b, c = random_words(1), random_words(2) % 32, random_words(3) % 2**13
    got, valid, found = run(mode, values, b, c)
    sources = [shuffle_source(mode, lane, int(b[lane]), int(c[lane])) for lane in LANES]
    assert not found
    assert (got == values[[source for source, _ in sources]]).all()
    assert (valid == [ok for _, ok in sources]).all()


def test_shuffle_from_a_lane_outside_the_mask_is_reported() -> None:
    good = run("bfly", random_words(0), 1, 31, 0xFFFF)[2]
    bad = run("bfly", random_words(0), 16, 31, 0xFFFF)[2]
    assert good == set()
    assert bad == {"shfl-inactive"}


@pytest.mark.parametrize("mask", [2**32 - 1, 0x0F0F0F0F, 1 << 31])
def test_vote(mask: int) -> None:
    members = (mask >> LANES & 1).astype(bool)
    for ones in (0, mask, mask & 0x01010101, 0x80000000):
        p = (ones >> LANES & 1).astype(np.uint32)
        voted = p[members].astype(bool)
        ballot = run("ballot", p, mask=mask)[0][members]
        assert (ballot == (ones & mask)).all()
        assert (run("all", p, mask=mask)[1][members] == voted.all()).all()
        assert (run("any", p, mask=mask)[1][members] == voted.any()).all()
        assert (run("uni", p, mask=mask)[1][members] == (voted.all() or not voted.any())).all()


@pytest.mark.parametrize("name", REDUX)
@pytest.mark.parametrize("mask", [2**32 - 1, 0x80000101])
def test_redux(name: str, mask: int) -> None:
    members = (mask >> LANES & 1).astype(bool)
    values = random_words(5)
    got, _, found = run(name, values, mask=mask)
    reduce: Callable[[Array], np.generic] = REDUX[name]
    expected = np.array(reduce(values[members])).astype(np.int64) % 2**32
    assert not found
    assert (got[members] == expected).all()


@pytest.mark.parametrize("mask", [2**32 - 1, 0xFFFF0001])
def test_match(mask: int) -> None:
    members = (mask >> LANES & 1).astype(bool)
    values = random_words(6) % 5
    got, _, found = run("match_any", values, mask=mask)
    assert not found
    for lane in LANES[members]:
        assert got[lane] == sum(
            1 << other for other in LANES[members] if values[other] == values[lane]
        )
    assert not run("match_all", values, mask=mask)[1].any()
    got, same, _ = run("match_all", np.where(members, 7, 8), mask=mask)
    assert (got[members] == mask).all()
    assert same[members].all()


@pytest.mark.parametrize("mask", [2**32 - 1, 0x00FF0010])
def test_elect_chooses_one_member(mask: int) -> None:
    members = (mask >> LANES & 1).astype(bool)
    leader, elected, found = run("elect", random_words(0), mask=mask)
    assert not found
    assert elected.sum() == 1
    assert members[elected].all()
    assert (leader[members] == LANES[elected]).all()


def test_masks_that_do_not_fit_are_reported() -> None:
    half = np.where(LANES < 16, 0xFFFF, 0xFFFF0000)  # two groups that meet on their own
    assert run("ballot", random_words(0), mask=half)[2] == set()
    wrong = np.where(LANES < 16, 0xFFFF, 0xFFFF8000)  # names a lane that goes elsewhere
    assert run("ballot", random_words(0), mask=wrong)[2] & {"deadlock", "bad-mask"}


def test_only_syncwarp_orders_memory() -> None:
    values = random_words(9)
    assert run("exchange", values)[2] == set()
    assert run("exchange_unsynchronised", values)[2] & {"race-RAW", "race-WAR"}


def test_syncwarp_counts_and_is_clean() -> None:
    words = np.zeros((32, 4), np.uint32)
    words[:, 0], words[:, 3] = random_words(4), 2**32 - 1
    given = words[:, 0].copy()
    launch = program().run("exchange", words, np.zeros((32, 2), np.uint32))
    clean(launch)
    assert launch.counts["warp_syncs"] == 1
    assert (words[:, 0] == given[LANES ^ 1]).all()
