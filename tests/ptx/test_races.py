"""The happens-before check: every kind of race with the twin that is ordered."""

from __future__ import annotations

import struct

import pytest

from tests.ptx.assembly import kernel
from tests.ptx.runtime_support import Buffer, Kernels, Outcome

# %r1: thread, %r2: lane, %r3: shared memory. %r4: this thread's word there, %r5: that of the thread
# with another number, %rd2: this thread's word of the first buffer.
OWN = (
    "shl.b32 %r10, %r1, 2; add.u32 %r4, %r3, %r10; cvt.u64.u32 %rd10, %r10;"
    "add.u64 %rd2, %rd1, %rd10;"
)


def other(flip: int) -> str:
    return f"xor.b32 %r11, %r1, {flip}; shl.b32 %r11, %r11, 2; add.u32 %r5, %r3, %r11;"


def exchange(name: str, order: str, flip: int) -> str:
    """Every thread stores its number in shared memory, and reads that of another one."""
    body = (
        f"{OWN} {other(flip)} st.shared.b32 [%r4], %r1; {order}"
        "ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd2], %r6;"
    )
    return kernel(name, body, pointers=1, shared=512)


def reuse(name: str, order: str) -> str:
    """A second store to shared memory that others have read since the first."""
    body = (
        f"{OWN} {other(32)} st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r6, [%r5];"
        f"{order} st.shared.b32 [%r4], %r6; st.global.b32 [%rd2], %r6;"
    )
    return kernel(name, body, pointers=1, shared=512)


NAMED = "shr.u32 %r12, %r1, 6; add.u32 %r12, %r12, 1; bar.sync %r12, 64;"

# Two consumer warps read and each arrive on a barrier of their own; the producer warp waits.
PIPELINE = (
    "setp.ge.u32 %p1, %r1, 64; @%p1 bra PRODUCER;"
    "ld.global.b32 %r7, [%rd1]; shr.u32 %r12, %r1, 5; add.u32 %r12, %r12, 1;"
    "bar.arrive %r12, 64; {late} bra END;"
    "PRODUCER: {waits} setp.eq.u32 %p2, %r2, 0; @%p2 st.global.b32 [%rd1], %r1; END:"
)


def pipeline(name: str, waits: str, late: str = "") -> str:
    return kernel(name, PIPELINE.format(waits=waits, late=late), pointers=1)


def matrix_stores(name: str, element_pair: str) -> str:
    """Every warp stores 8×8 matrices to the same rows: lane l gives the address of row l."""
    registers = ", ".join([element_pair] * 4)
    body = (
        "mov.b32 %r5, 7; shl.b32 %r10, %r2, 4; add.u32 %r4, %r3, %r10;"
        f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {{{registers}}};"
    )
    return kernel(name, body, shared=512)


READ = "ld.global.b32 %r5, [%rd1];"

KERNELS = Kernels(
    "".join(
        [
            exchange("raw", "", 32),
            exchange("raw_barrier", "bar.sync 0;", 32),
            exchange("raw_same_warp", "", 1),
            exchange("raw_syncwarp", "bar.warp.sync 0xffffffff;", 1),
            exchange("raw_half_syncwarp", "bar.warp.sync %r20;", 1).replace(
                "mov.u32 %r1, %tid.x;",
                "mov.u32 %r1, %tid.x; and.b32 %r21, %r1, 1; mov.b32 %r22, 0x55555555;"
                "shl.b32 %r20, %r22, %r21;",
            ),
            exchange("raw_shuffle", "shfl.sync.bfly.b32 %r8, %r1, 1, 31, 0xffffffff;", 1),
            exchange("raw_vote", "vote.sync.ballot.b32 %r8, 1, 0xffffffff;", 1),
            exchange("named_inside", NAMED, 32),
            exchange("named_outside", NAMED, 64),
            reuse("war", ""),
            reuse("war_barrier", "bar.sync 0;"),
            kernel("waw", "st.shared.b32 [%r3], %r1;", shared=16),
            kernel("waw_same_value", "st.shared.b32 [%r3], 7;", shared=16),
            kernel(
                "waw_same_value_two_instructions",
                "setp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.b32 [%r3], 7;\n"
                "@!%p1 st.shared.b32 [%r3], 7;",
                shared=16,
            ),
            matrix_stores("waw_matrices", "%r1"),
            matrix_stores("waw_same_matrices", "%r5"),
            kernel(
                "waw_barrier",
                "setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%r3], 1; bar.sync 0;"
                "@!%p1 st.shared.b32 [%r3], 1;",
                shared=16,
            ),
            kernel(
                "byte_neighbours", "add.u32 %r4, %r3, %r1; st.shared.b8 [%r4], %r1;", shared=128
            ),
            kernel("global_waw", "st.global.b32 [%rd1], %r1;", pointers=1),
            kernel(
                "blocks_waw",
                "mov.u32 %r4, %ctaid.x; st.global.b32 [%rd1], %r4;",
                pointers=1,
            ),
            kernel(
                "blocks_raw",
                "mov.u32 %r4, %ctaid.x; setp.eq.u32 %p1, %r4, 0; @%p1 st.global.b32 [%rd1], 1;"
                "@!%p1 ld.global.b32 %r5, [%rd1];",
                pointers=1,
            ),
            kernel(
                "blocks_war",
                "mov.u32 %r4, %ctaid.x; setp.eq.u32 %p1, %r4, 0; @%p1 ld.global.b32 %r5, [%rd1];"
                "@!%p1 st.global.b32 [%rd1], 1;",
                pointers=1,
            ),
            # All blocks read a word; the last one then writes.
            *(
                kernel(
                    name,
                    "mov.u32 %r4, %ctaid.x; mov.u32 %r6, %nctaid.x; sub.u32 %r6, %r6, 1;"
                    f"setp.eq.u32 %p1, %r4, %r6; {read} @%p1 {write};",
                    pointers=1,
                )
                for name, read, write in [
                    ("blocks_read_then_store", READ, "st.global.b32 [%rd1], 1"),
                    ("blocks_read_then_atomic", READ, "red.global.add.u32 [%rd1], 1"),
                    (
                        "blocks_read_vector_then_store",
                        "@!%p1 ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd1];"
                        "@%p1 ld.global.b32 %r5, [%rd1+8];",
                        "st.global.b32 [%rd1+8], 1",
                    ),
                    ("blocks_read_then_store_next", READ, "st.global.b32 [%rd1+4], 1"),
                ]
            ),
            kernel(
                "blocks_apart",
                "mov.u32 %r4, %ctaid.x; mul.wide.u32 %rd3, %r4, 4; add.u64 %rd4, %rd1, %rd3;"
                "ld.global.b32 %r5, [%rd4]; add.u32 %r5, %r5, 1; st.global.b32 [%rd4], %r5;",
                pointers=1,
            ),
            kernel("atomics", "red.global.add.u32 [%rd1], 1;", pointers=1),
            kernel(
                "atomic_and_store",
                "setp.eq.u32 %p1, %r1, 5; @%p1 st.global.b32 [%rd1], 1;"
                "@!%p1 red.global.add.u32 [%rd1], 1;",
                pointers=1,
            ),
            kernel(
                "atomic_then_load",
                "red.global.add.u32 [%rd1], 1; ld.global.b32 %r4, [%rd1];",
                pointers=1,
            ),
            kernel(
                "atomic_barrier_load",
                "red.global.add.u32 [%rd1], 1; bar.sync 0; ld.global.b32 %r4, [%rd1];",
                pointers=1,
            ),
            kernel(
                "nc_after_write",
                f"{OWN} st.global.b32 [%rd2], %r1; ld.global.nc.b32 %r4, [%rd2];",
                pointers=1,
            ),
            kernel(
                "nc_before_write",
                f"{OWN} ld.global.nc.b32 %r4, [%rd2]; st.global.b32 [%rd2], %r4;",
                pointers=1,
            ),
            kernel(
                "nc_other_array",
                f"{OWN} ld.global.nc.b32 %r4, [%rd2]; st.global.b32 [%rd2+256], %r4;",
                pointers=1,
            ),
            pipeline("pipeline", "bar.sync 1, 64; bar.sync 2, 64;"),
            pipeline("pipeline_one_wait", "bar.sync 1, 64;"),
            pipeline(
                "read_after_arrive",
                "bar.sync 1, 64; bar.sync 2, 64;",
                late="ld.global.b32 %r7, [%rd1];",
            ),
            # Thread 0 overwrites what all read; the stored value is the one that stands there.
            kernel(
                "replicas",
                "ld.global.b32 %r4, [%rd1]; setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], 9;"
                "setp.ne.u32 %p2, %r1, 0; @%p2 mov.b32 %r4, 0; st.global.b32 [%rd1+128], 3;",
                pointers=1,
            ),
            kernel(
                "replicas_used",
                f"{OWN} setp.eq.u32 %p1, %r1, 0; ld.global.b32 %r4, [%rd1]; "
                "@%p1 st.global.b32 [%rd1], 9; st.global.b32 [%rd2+128], %r4;",
                pointers=1,
            ),
        ]
    )
)


def run(name: str, threads: int = 128, blocks: int = 1, **options: int) -> Outcome:
    return KERNELS.run(name, Buffer(1024), threads=threads, grid=(blocks, 1, 1), **options)


# "read-write": which of the two accesses comes first, and so the kind, is the scheduler's choice;
# so is whether a read finds its byte written.
SHARED = [
    ("raw", {"read-write"}),
    ("raw_same_warp", {"read-write"}),
    ("raw_half_syncwarp", {"read-write"}),
    ("named_outside", {"read-write"}),
    ("war", {"read-write"}),
    ("waw", {"race-WAW"}),
    ("waw_same_value_two_instructions", {"race-WAW"}),
    ("waw_matrices", {"race-WAW"}),
    ("raw_barrier", set()),
    ("raw_syncwarp", set()),
    ("named_inside", set()),
    ("war_barrier", set()),
    ("waw_barrier", set()),
    ("byte_neighbours", set()),
]


@pytest.mark.parametrize(("name", "kinds"), SHARED, ids=[case[0] for case in SHARED])
@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_shared_memory(name: str, kinds: set[str], schedule: int) -> None:
    found = set(run(name, schedule=schedule, seed=3).kinds)
    if "read-write" in kinds:
        found -= {"uninitialised-read"}
        found = {"read-write" if kind in ("race-RAW", "race-WAR") else kind for kind in found}
    assert found == kinds


@pytest.mark.parametrize("name", ["raw_shuffle", "raw_vote"])
def test_shuffles_and_votes_order_no_memory(name: str) -> None:
    """The lanes have met, so the numbers are right, and yet nothing orders their accesses."""
    outcome = run(name)
    assert outcome.words()[:4] == [1, 0, 3, 2]
    assert outcome.kinds == ["race-RAW"]


def test_a_report_names_both_instructions_the_thread_and_the_byte() -> None:
    outcome = run("raw_shuffle", threads=32)
    report = outcome.reports[0]
    assert (report.opcode, report.block, report.thread) == ("ld.shared.b32", (0, 0, 0), 31)
    assert "shared+120 of 512 bytes" in report.message
    assert "thread 30" in report.message
    assert report.count == 32  # every thread reads unordered


@pytest.mark.parametrize(
    ("name", "threads", "same_bytes"),
    [("waw_same_value", 32, 31 * 4), ("waw_same_matrices", 64, 512)],
)
def test_the_same_value_by_the_same_instruction_is_no_race(
    name: str, threads: int, same_bytes: int
) -> None:
    outcome = run(name, threads=threads)
    assert outcome.reports == []
    assert outcome.launch.counts["same_value_writes"] == same_bytes


GLOBAL = [
    ("global_waw", 1, ["race-WAW"]),
    ("atomics", 3, []),
    ("atomic_and_store", 1, ["race-WAW"]),
    ("atomic_then_load", 1, ["race-WAR"]),
    ("atomic_barrier_load", 1, []),
    ("nc_after_write", 1, ["nc-load-of-written-data"]),
    ("nc_before_write", 1, ["nc-load-of-written-data"]),
    ("nc_other_array", 1, []),
]


@pytest.mark.parametrize(("name", "blocks", "kinds"), GLOBAL, ids=[case[0] for case in GLOBAL])
def test_global_memory(name: str, blocks: int, kinds: list[str]) -> None:
    assert run(name, threads=64, blocks=blocks).kinds == kinds


def test_atomics_add_up() -> None:
    assert run("atomics", threads=64, blocks=3).words()[0] == 192


BLOCKS = [
    ("blocks_waw", "race-WAW-blocks", "race-WAW-blocks"),
    ("blocks_raw", "race-RAW-blocks", "race-WAR-blocks"),
    ("blocks_war", "race-WAR-blocks", "race-RAW-blocks"),
]


@pytest.mark.parametrize(("name", "forward", "reverse"), BLOCKS, ids=[case[0] for case in BLOCKS])
def test_blocks_are_never_ordered(name: str, forward: str, reverse: str) -> None:
    """In which order the blocks happen to run decides the kind, not whether it is found."""
    assert run(name, threads=1, blocks=2).kinds == [forward]
    assert run(name, threads=1, blocks=2, schedule=1).kinds == [reverse]
    assert run(name, threads=1, blocks=1).kinds == []


@pytest.mark.parametrize(
    "name", ["blocks_read_then_store", "blocks_read_then_atomic", "blocks_read_vector_then_store"]
)
@pytest.mark.parametrize("blocks", [2, 3])
def test_a_block_that_reads_and_then_writes_what_another_reads(name: str, blocks: int) -> None:
    """Its own read does not make the other block's forgotten."""
    assert run(name, threads=1, blocks=blocks).kinds == ["race-WAR-blocks"]
    assert run(name, threads=1, blocks=blocks, schedule=1).kinds == ["race-RAW-blocks"]
    assert run(name, threads=1, blocks=1).kinds == []


def test_reads_of_one_word_and_a_write_of_the_next_are_clean() -> None:
    for schedule in range(4):
        assert (
            run("blocks_read_then_store_next", blocks=3, threads=1, schedule=schedule).kinds == []
        )


def test_blocks_apart_and_a_launch_after_another_are_clean() -> None:
    outcome = run("blocks_apart", threads=1, blocks=4)
    assert outcome.reports == []
    assert outcome.words()[:5] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_arrive_orders_the_warps_that_arrive(schedule: int) -> None:
    """Whenever the consumers come: a producer that waits for both is clean."""
    assert run("pipeline", threads=96, schedule=schedule).kinds == []
    for bad in ("pipeline_one_wait", "read_after_arrive"):
        found = set(run(bad, threads=96, schedule=schedule).kinds)
        assert found, bad
        assert found <= {"race-WAR", "race-RAW"}, bad


@pytest.mark.parametrize("race", [0, 1])
def test_the_option_race(race: int) -> None:
    assert run("waw", threads=32, race=race).kinds == ["race-WAW"] * race


def test_poisoned_races_show_whether_a_raced_read_matters() -> None:
    """Reads that race with a later write give 0xff... in a second run with poison_races."""
    for name, matters in (("replicas", False), ("replicas_used", True)):
        plain = run(name, threads=32, schedule=1)
        poisoned = run(name, threads=32, schedule=1, poison_races=1)
        assert set(plain.kinds) <= {"race-WAR", "race-RAW"}
        assert plain.kinds
        assert (plain.words() != poisoned.words()) == matters


def test_a_missing_barrier_shows_in_the_numbers_under_random_priorities() -> None:
    """The race check needs one run; PCT makes the bug visible without it too, over a few seeds."""
    right = struct.unpack("128I", struct.pack("128I", *[thread ^ 32 for thread in range(128)]))
    wrong = 0
    for seed in range(1, 9):
        outcome = run("war_barrier", schedule=2, seed=seed)
        assert outcome.words()[:128] == list(right)
        outcome = run("raw", schedule=2, seed=seed, race=0, init=0)
        wrong += outcome.words()[:128] != list(right)
    assert wrong >= 6
