"""What the runtime counts: requests, sectors, bank wavefronts, footprints, load phases."""

from __future__ import annotations

import pytest

from tests.ptx.assembly import kernel
from tests.ptx.runtime_support import Buffer, Kernels, Outcome, access, shared

LOAD4, LOAD16 = "ld.global.b32 %r5, HERE;", "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, HERE;"
V4 = "{%r5, %r6, %r7, %r8}"

KERNELS = Kernels(
    "".join(
        [
            access("load4", LOAD4, 4),
            access("load16", LOAD16, 16),
            access("load2", "ld.global.b16 %h1, HERE;", 2),
            access("store16", f"st.global.v4.b32 HERE, {V4};", 16),
            access("load4_by_64", LOAD4, 64),
            access("load4_by_0", LOAD4, 0),
            access("load4_from_4", LOAD4, 4, 4),
            access("load16_by_32", LOAD16, 32),
            access("atomic4_own", "red.global.add.u32 HERE, 1;", 4),
            access(
                "half_off",
                f"@%p1 {LOAD4}\n{LOAD4}",
                4,
                setup="setp.lt.u32 %p1, %r1, 16;",
            ),
            access(
                "loop",
                "mov.b32 %r6, 0; LOOP: ld.global.b32 %r5, [%rd2]; add.u64 %rd2, %rd2, 128;"
                "add.u32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, 3; @%p1 bra LOOP;",
                4,
            ),
            shared("banks1", "st.shared.b32 HERE, 1;", 4),
            shared("banks2", "st.shared.b32 HERE, 1;", 8),
            shared("banks8", "st.shared.b32 HERE, 1;", 32),
            shared("banks32", "st.shared.b32 HERE, 1;", 128),
            shared("banks_broadcast", "st.shared.b32 HERE, 1;", 0),
            shared("banks_half", "st.shared.b16 HERE, %h1;", 2),
            shared("banks_wide8", "st.shared.v2.b32 HERE, {%r5, %r6};", 8),
            shared("banks_wide16", "st.shared.v4.b32 HERE, {%r5, %r6, %r7, %r8};", 16),
            shared("banks_wide16_by_32", "st.shared.v4.b32 HERE, {%r5, %r6, %r7, %r8};", 32),
            kernel(
                "phases",
                "ld.global.b32 %r4, [%rd1]; ld.global.b32 %r5, [%rd1+4]; bar.sync 0; bar.sync 0;"
                "ld.global.b32 %r6, [%rd1];",
                pointers=1,
            ),
        ]
    )
)


def run(name: str, *buffers: Buffer, **keywords: object) -> Outcome:
    return KERNELS.run(name, *buffers, **keywords)  # type: ignore[arg-type]


# name, bytes read per lane, requests of 32 threads, sectors, distinct bytes
GLOBAL_COUNTS = [
    ("load4", 4, 1, 4, 128),
    ("load16", 16, 1, 16, 512),
    ("load2", 2, 1, 2, 64),
    ("load4_by_64", 4, 1, 32, 128),
    ("load4_by_0", 4, 1, 1, 4),
    ("load4_from_4", 4, 1, 5, 128),
    ("load16_by_32", 16, 1, 32, 512),
    ("loop", 4, 3, 12, 384),
]


@pytest.mark.parametrize("case", GLOBAL_COUNTS, ids=[case[0] for case in GLOBAL_COUNTS])
@pytest.mark.parametrize("schedule", [0, 1, 3])
def test_requests_and_sectors(case: tuple[str, int, int, int, int], schedule: int) -> None:
    name, size, requests, sectors, distinct = case
    outcome = run(name, Buffer(4096), schedule=schedule, preempt=schedule)
    (site,) = outcome.launch.sites
    assert (site["space"], site["access"], site["bytes_per_lane"]) == ("global", "read", size)
    assert (site["requests"], site["lanes"]) == (requests, requests * 32)
    assert (site["sectors"], site["distinct_bytes"]) == (sectors, distinct)
    (footprint,) = outcome.footprints
    assert (footprint.bytes_read, footprint.bytes_written) == (distinct, 0)
    assert (footprint.sectors_read, footprint.requested_read_sectors) == (sectors, sectors)
    assert outcome.launch.counts["global_load_sectors"] == sectors


def test_footprints_are_per_buffer_and_of_the_last_launch_only() -> None:
    outcome = run("load4", Buffer(4096), Buffer(64, "y"))
    assert [each.bytes_read for each in outcome.footprints] == [128, 0]
    outcome = run("store16", Buffer(4096), threads=4)
    (footprint,) = outcome.footprints
    assert (footprint.bytes_read, footprint.bytes_written) == (0, 64)
    assert (footprint.sectors_written, footprint.requested_written_sectors) == (2, 2)


def test_predicated_lanes_keep_requests_together() -> None:
    """Two loads, the first by half of the warp: two requests, of 16 and of 32 lanes."""
    outcome = run("half_off", Buffer(128))
    requests = sorted((site["requests"], site["lanes"]) for site in outcome.launch.sites)
    assert requests == [(1, 16), (1, 32)]


def test_atomics_are_counted_apart() -> None:
    counts = run("atomic4_own", Buffer(128)).launch.counts
    assert (counts["global_atomic_requests"], counts["global_atomic_sectors"]) == (1, 4)
    assert counts["global_load_requests"] == counts["global_store_requests"] == 0


BANKS = [
    ("banks1", 1, 1),
    ("banks2", 2, 1),
    ("banks8", 8, 1),
    ("banks32", 32, 1),
    ("banks_broadcast", 1, 1),
    ("banks_half", 1, 1),
    ("banks_wide8", 2, 2),
    ("banks_wide16", 4, 4),
    ("banks_wide16_by_32", 8, 4),
]


@pytest.mark.parametrize(("name", "wavefronts", "ideal"), BANKS, ids=[case[0] for case in BANKS])
def test_wavefronts(name: str, wavefronts: int, ideal: int) -> None:
    outcome = run(name)
    (site,) = outcome.launch.sites
    assert (site["wavefronts"], site["ideal_wavefronts"]) == (wavefronts, ideal)
    assert outcome.launch.counts["shared_wavefronts"] == wavefronts


def test_load_phases_are_barrier_intervals_with_a_load() -> None:
    assert run("phases", Buffer(64), threads=64).launch.counts["load_phases"] == 2
    assert run("phases", Buffer(64), threads=64, grid=(3, 1, 1)).launch.counts["load_phases"] == 6


def test_counting_can_be_switched_off() -> None:
    outcome = run("load4", Buffer(128), count=0)
    assert outcome.launch.sites == []
    assert outcome.footprints[0].bytes_read == 128
