"""cp.async, mbarriers and bulk copies: good kernels are clean, each one's bad twin is reported."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.ptx.assembly import Array, Program, clean, kernel, kinds

THREADS = 64
BYTES = 16 * THREADS

# Every thread copies 16 bytes to shared memory, then reads those of one in the other warp.
CP_ASYNC = """
mad.wide.u32 %rd10, %r1, 16, %rd1; mad.wide.u32 %rd11, %r1, 16, %rd2;
mad.lo.u32 %r4, %r1, 16, %r3; xor.b32 %r5, %r1, 32; mad.lo.u32 %r5, %r5, 16, %r3;
cp.async.cg.shared.global [%r4], [%rd10], 16{source_bytes};
{wait}
{barrier}
ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r5];
st.global.v4.b32 [%rd11], {{%r10, %r11, %r12, %r13}};
"""
COMMIT_AND_WAIT = "cp.async.commit_group; cp.async.wait_group {};"
SYNC = "bar.sync 0;"

# A ring of 2 buffers of 1024 bytes, 6 go from array 1 to array 2: thread 0 loads (and counts in
# %r6, with the buffer in %r5 and the parity it waits for in %r7), warp 1 stores. The mbarriers
# "full" of the buffers are at 4096 and 4104, "empty" at 4112 and 4120.
RING = """
setp.eq.u32 %p1, %r1, 0; add.u32 %r4, %r3, 4096;
@%p1 mbarrier.init.shared::cta.b64 [%r4], 1; @%p1 mbarrier.init.shared::cta.b64 [%r4+8], 1;
@%p1 mbarrier.init.shared::cta.b64 [%r4+16], 32; @%p1 mbarrier.init.shared::cta.b64 [%r4+24], 32;
bar.sync 0;
setp.lt.u32 %p2, %r1, 32;
mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, {first_parity};
@!%p2 bra CONSUMER;
@!%p1 bra DONE;
PRODUCE:
mad.lo.u32 %r8, %r5, 8, %r4; mad.lo.u32 %r9, %r5, 1024, %r3;
{wait_empty}
{expect}
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%rd1], {bytes}, [%r8];
add.s64 %rd1, %rd1, 1024; add.u32 %r6, %r6, 1; xor.b32 %r5, %r5, 1;
setp.eq.u32 %p3, %r5, 0; @%p3 xor.b32 %r7, %r7, 1;
setp.lt.u32 %p4, %r6, 6; @%p4 bra PRODUCE;
bra DONE;
CONSUMER:
mov.b32 %r7, 0; mad.wide.u32 %rd2, %r2, 32, %rd2;
CONSUME:
mad.lo.u32 %r8, %r5, 8, %r4; mad.lo.u32 %r9, %r5, 1024, %r3; mad.lo.u32 %r9, %r2, 32, %r9;
{wait_full}
ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r9];
ld.shared.v4.b32 {{%r14, %r15, %r16, %r17}}, [%r9+16];
st.global.v4.b32 [%rd2], {{%r10, %r11, %r12, %r13}};
st.global.v4.b32 [%rd2+16], {{%r14, %r15, %r16, %r17}};
{arrive}
add.s64 %rd2, %rd2, 1024; add.u32 %r6, %r6, 1; xor.b32 %r5, %r5, 1;
setp.eq.u32 %p3, %r5, 0; @%p3 xor.b32 %r7, %r7, 1;
setp.lt.u32 %p4, %r6, 6; @%p4 bra CONSUME;
DONE:
"""
WAIT = """
{label}: mbarrier.{form}_wait.parity.shared::cta.b64 %p5, [%r8{offset}], %r7;
@!%p5 bra {label};
"""
RING_GOOD = {
    "first_parity": "1",  # the buffers are empty at the start: the wait for phase -1 succeeds
    "wait_empty": WAIT.format(label="E", form="try", offset="+16"),
    "expect": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 1024;",
    "bytes": "1024",
    "wait_full": WAIT.format(label="F", form="try", offset=""),
    "arrive": "mbarrier.arrive.shared::cta.b64 _, [%r8+16];",
}
RING_BAD = {
    "ring_without_full_wait": {"wait_full": ""},
    "ring_without_empty_wait": {"wait_empty": ""},
    "ring_wait_without_loop": {
        "wait_full": "mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r8], %r7;"
    },
    "ring_wrong_phase": {"first_parity": "0"},
    "ring_wrong_consumer_phase": {
        "wait_full": "xor.b32 %r7, %r7, 1;" + RING_GOOD["wait_full"] + "xor.b32 %r7, %r7, 1;"
    },
    "ring_without_expect": {"expect": "mbarrier.arrive.shared::cta.b64 _, [%r8];"},
    "ring_too_few_bytes": {"bytes": "1008"},
    "ring_too_many_bytes": {"bytes": "1040"},
    "ring_arrives_twice": {"arrive": RING_GOOD["arrive"] * 2},
    "ring_without_arrive": {"arrive": ""},
    "ring_misaligned_size": {"bytes": "1000"},
}

# Each thread writes 16 bytes of shared memory, one copies all of it to global memory.
STORE = """
mad.wide.u32 %rd10, %r1, 16, %rd1; mad.lo.u32 %r4, %r1, 16, %r3;
ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd10];
st.shared.v4.b32 [%r4], {{%r10, %r11, %r12, %r13}};
{fence}
{barrier}
setp.eq.u32 %p1, %r1, 0;
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd2{offset}], [%r3{offset}], {bytes};
@%p1 cp.async.bulk.commit_group;
{wait}
bar.sync 0;
{after}
"""
STORE_GOOD = {
    "fence": "fence.proxy.async.shared::cta;",
    "barrier": SYNC,
    "offset": "",
    "bytes": str(BYTES),
    "wait": "@%p1 cp.async.bulk.wait_group.read 0;",
    "after": "st.shared.b32 [%r4], %r1;",
}
STORE_BAD = {
    "store_without_fence": {"fence": ""},
    "store_without_barrier": {"barrier": ""},
    "store_without_wait": {"wait": ""},
    "store_waits_for_too_few": {"wait": "@%p1 cp.async.bulk.wait_group.read 1;"},
    "store_then_read_of_result": {"after": "ld.global.b32 %r10, [%rd2];"},
    "store_misaligned": {"offset": "+8", "bytes": "512"},
    "store_past_the_end": {"bytes": "2048"},
    "store_never_waited": {"wait": "", "after": ""},
}


# A counter of 2 phases: all threads arrive, all wait, by state or by parity.
ARRIVE = """
setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r3], {count};
bar.sync 0;
mad.lo.u32 %r4, %r1, 4, %r3; xor.b32 %r5, %r1, 32; mad.lo.u32 %r5, %r5, 4, %r3;
st.shared.b32 [%r4+64], %r1;
{work}
ld.shared.b32 %r10, [%r5+64];
mad.wide.u32 %rd10, %r1, 4, %rd1; st.global.b32 [%rd10], %r10;
"""
ARRIVALS = {
    "arrive_by_state": (
        "64",
        "mbarrier.arrive.shared::cta.b64 %rd20, [%r3];"
        "W: mbarrier.try_wait.shared::cta.b64 %p2, [%r3], %rd20; @!%p2 bra W;",
    ),
    "arrive_by_test": (
        "64",
        "mbarrier.arrive.shared::cta.b64 %rd20, [%r3];"
        "W: mbarrier.test_wait.shared::cta.b64 %p2, [%r3], %rd20; @!%p2 bra W;",
    ),
    "arrive_by_count": (
        "128",
        "mbarrier.arrive.shared::cta.b64 %rd20, [%r3], 2; mov.b32 %r6, 0;"
        "W: mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r3], %r6; @!%p2 bra W;",
    ),
    "arrive_without_wait": ("64", "mbarrier.arrive.shared::cta.b64 %rd20, [%r3];"),
    "arrive_too_few": (
        "65",
        "mbarrier.arrive.shared::cta.b64 %rd20, [%r3];"
        "W: mbarrier.try_wait.shared::cta.b64 %p2, [%r3], %rd20; @!%p2 bra W;",
    ),
    "arrive_at_nothing": ("64", "mbarrier.arrive.shared::cta.b64 %rd20, [%r3+8];"),
    "arrive_misaligned": ("64", "mbarrier.arrive.shared::cta.b64 %rd20, [%r3+4];"),
    "init_again": (
        "64",
        "mbarrier.arrive.shared::cta.b64 %rd20, [%r3];"
        "@%p1 mbarrier.init.shared::cta.b64 [%r3], 64;",
    ),
    "init_zero": ("0", ""),
    "init_after_inval": (
        "64",
        "@%p1 mbarrier.inval.shared::cta.b64 [%r3]; @%p1 mbarrier.init.shared::cta.b64 [%r3], 64;"
        "bar.sync 0;",
    ),
    "overwritten": (
        "64",
        "@%p1 st.shared.b32 [%r3], %r1; bar.sync 0; mbarrier.arrive.shared::cta.b64 %rd20, [%r3];",
    ),
    "noinc": (
        "64",
        "cp.async.ca.shared.global [%r4+1024], [%rd1], 4;"
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r3]; mov.b32 %r6, 0;"
        "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], %r6; @!%p2 bra W;"
        "ld.shared.b32 %r11, [%r5+1024];",
    ),
    "noinc_without_wait": (
        "64",
        "cp.async.ca.shared.global [%r4+1024], [%rd1], 4;"
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r3]; bar.sync 0;"
        "ld.shared.b32 %r11, [%r5+1024];",
    ),
}


def cp_async_kernel(name: str, wait: str, barrier: str = SYNC, source_bytes: str = "") -> str:
    body = CP_ASYNC.format(wait=wait, barrier=barrier, source_bytes=source_bytes)
    return kernel(name, body, pointers=2, shared=BYTES)


@functools.cache
def program() -> Program:
    rings = {"ring": {}, **RING_BAD}
    rings["ring_test_wait"] = {"wait_full": WAIT.format(label="F", form="test", offset="")}
    stores = {"store": {}, **STORE_BAD}
    stores["store_reads_after_full_wait"] = {
        "wait": "@%p1 cp.async.bulk.wait_group 0;",
        "after": "ld.global.b32 %r10, [%rd2];",
    }
    return Program(
        cp_async_kernel("waits", COMMIT_AND_WAIT.format(0)),
        cp_async_kernel("waits_for_all", "cp.async.wait_all;"),
        cp_async_kernel("fills_with_zeros", "cp.async.wait_all;", source_bytes=", 4"),
        cp_async_kernel("never_waits", "cp.async.commit_group;"),
        cp_async_kernel("waits_for_too_few", COMMIT_AND_WAIT.format(1)),
        cp_async_kernel("waits_after_the_barrier", "bar.sync 0;", "cp.async.wait_all;"),
        *(kernel(n, RING.format(**{**RING_GOOD, **f}), 2, shared=4224) for n, f in rings.items()),
        *(
            kernel(n, STORE.format(**{**STORE_GOOD, **f}), 2, shared=BYTES)
            for n, f in stores.items()
        ),
        *(
            kernel(name, ARRIVE.format(count=count, work=work), 1, shared=2048)
            for name, (count, work) in ARRIVALS.items()
        ),
    )


def random_words(count: int) -> Array:
    return np.random.default_rng(count).integers(0, 2**32, count).astype(np.uint32)


SCHEDULES = [0, 1, 2, 3]

# ---- cp.async


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("name", ["waits", "waits_for_all", "fills_with_zeros"])
def test_cp_async(name: str, early: int) -> None:
    given, out = random_words(BYTES // 4), np.zeros(BYTES // 4, np.uint32)
    clean(program().run(name, given, out, threads=THREADS, async_early=early))
    expected = given.reshape(THREADS, 4)[np.arange(THREADS) ^ 32].copy()
    if name == "fills_with_zeros":
        expected[:, 1:] = 0
    assert (out.reshape(THREADS, 4) == expected).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("never_waits", "cp.async-hazard"),
        ("waits_for_too_few", "cp.async-hazard"),
        ("waits_after_the_barrier", "race-RAW"),
    ],
)
def test_cp_async_without_its_wait(name: str, kind: str) -> None:
    out = np.zeros(BYTES // 4, np.uint32)
    for schedule in SCHEDULES:
        launch = program().run(
            name, random_words(BYTES // 4), out, threads=THREADS, schedule=schedule
        )
        assert kinds(launch) & {kind, "cp.async-hazard"}


# ---- mbarriers


@pytest.mark.parametrize("name", ["arrive_by_state", "arrive_by_test", "arrive_by_count", "noinc"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_arrive_and_wait_order_memory(name: str, schedule: int) -> None:
    out = np.zeros(THREADS, np.uint32)
    clean(program().run(name, out, threads=THREADS, schedule=schedule))
    assert (out == np.arange(THREADS) ^ 32).all()


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("arrive_without_wait", "race-RAW", "without a barrier"),
        ("arrive_too_few", "deadlock", "1 arrivals and 0 bytes missing"),
        ("arrive_at_nothing", "mbarrier-misuse", "no mbarrier has been initialised"),
        ("arrive_misaligned", "mbarrier-misuse", "8-byte aligned"),
        ("init_again", "mbarrier-misuse", "initialised again"),
        ("init_zero", "mbarrier-misuse", "0 arrivals"),
        ("overwritten", "mbarrier-misuse", "overwritten"),
        ("noinc_without_wait", "cp.async-hazard", "unfinished cp.async"),
    ],
)
def test_misuse_of_an_mbarrier(name: str, kind: str, says: str) -> None:
    launch = program().run(name, np.zeros(THREADS, np.uint32), threads=THREADS)
    found = [report.message for report in launch.reports if report.kind == kind]
    assert any(says in message for message in found), launch.reports


def test_init_after_inval_is_no_misuse() -> None:
    launch = program().run("init_after_inval", np.zeros(THREADS, np.uint32), threads=THREADS)
    assert "mbarrier-misuse" not in kinds(launch)


# ---- bulk loads through a ring of buffers


@pytest.mark.parametrize("name", ["ring", "ring_test_wait"])
@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ring_of_bulk_loads(name: str, early: int, schedule: int) -> None:
    given, out = random_words(6 * 256), np.zeros(6 * 256, np.uint32)
    launch = program().run(
        name, given, out, threads=THREADS, schedule=schedule, async_early=early, seed=7
    )
    clean(launch)
    assert (out == given).all()
    assert launch.counts["bulk_copies"] == 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ring_without_full_wait", {"bulk-copy-hazard", "uninitialised-read"}),
        ("ring_without_empty_wait", {"race-WAR", "bulk-copy-hazard", "mbarrier-misuse"}),
        ("ring_wait_without_loop", {"bulk-copy-hazard", "uninitialised-read"}),
        ("ring_wrong_phase", {"deadlock"}),
        ("ring_wrong_consumer_phase", {"bulk-copy-hazard", "uninitialised-read"}),
        ("ring_without_expect", {"mbarrier-misuse", "bulk-copy-hazard"}),
        ("ring_too_few_bytes", {"deadlock"}),
        ("ring_too_many_bytes", {"mbarrier-misuse"}),
        ("ring_arrives_twice", {"mbarrier-misuse", "race-WAR", "deadlock"}),
        ("ring_without_arrive", {"deadlock"}),
        ("ring_misaligned_size", {"misaligned"}),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_broken_rings_are_reported(name: str, expected: set[str], schedule: int) -> None:
    given, out = random_words(6 * 256 + 4), np.zeros(6 * 256 + 4, np.uint32)
    launch = program().run(name, given, out, threads=THREADS, schedule=schedule)
    assert kinds(launch) & expected, launch.reports


# ---- bulk stores


@pytest.mark.parametrize("name", ["store", "store_reads_after_full_wait"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bulk_store(name: str, schedule: int) -> None:
    given, out = random_words(BYTES // 4), np.zeros(BYTES // 4, np.uint32)
    launch = program().run(name, given, out, threads=THREADS, schedule=schedule)
    clean(launch)
    assert (out == given).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("store_without_fence", "missing-proxy-fence"),
        ("store_without_barrier", "race-WAR"),  # thread 0 copies before the others write
        ("store_without_wait", "bulk-copy-hazard"),
        ("store_waits_for_too_few", "bulk-copy-hazard"),
        ("store_then_read_of_result", "bulk-copy-hazard"),
        ("store_misaligned", "misaligned"),
        ("store_past_the_end", "out-of-bounds"),
        ("store_never_waited", "bulk-copy-hazard"),
    ],
)
def test_broken_bulk_stores_are_reported(name: str, kind: str) -> None:
    given, out = random_words(BYTES // 4), np.zeros(BYTES // 4, np.uint32)
    launch = program().run(name, given, out, threads=THREADS)
    assert kind in kinds(launch), launch.reports


def test_marks_of_an_aborted_launch_do_not_outlive_it() -> None:
    """The deadlocked ring leaves copies in flight; the next launch reads the same memory."""
    given, out = random_words(6 * 256), np.zeros(6 * 256, np.uint32)
    first = program().place(given, "given")
    second = program().place(out, "out")
    run = functools.partial(program().run, threads=THREADS, addresses=(first, second))
    assert "deadlock" in kinds(run("ring_too_few_bytes"))
    clean(run("ring"))
    program().fetch(second, out)
    program().fetch(first, np.empty_like(given))
    assert (out == given).all()
