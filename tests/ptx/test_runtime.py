"""The runtime: bounds, alignment, never-written bytes, barriers, launches, counts; all to the byte.

Races have a file of their own.
"""

from __future__ import annotations

import ctypes
import math
import struct

import pytest

from ptx.executor import Executor
from tests.ptx.assembly import kernel
from tests.ptx.runtime_support import Buffer, Kernels, Outcome, access, shared

OWN = "shl.b32 %r10, %r1, 2; cvt.u64.u32 %rd10, %r10; add.u64 %rd2, %rd1, %rd10;"


FILL = "st.shared.v4.b32 [%r4], {%r1, %r1, %r1, %r1}; bar.sync 0;"
LOAD4, LOAD16 = "ld.global.b32 %r5, HERE;", "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, HERE;"
V4 = "{%r5, %r6, %r7, %r8}"

DYNAMIC = ".extern .shared .align 16 .b8 window[];\n" + kernel(
    "dynamic",
    "mov.b32 %r4, window; shl.b32 %r5, %r1, 2; add.u32 %r4, %r4, %r5;st.shared.b32 [%r4+4], %r1;",
)

LOCAL = """
.visible .entry local_{name}(.param .u64 pointer0)
{{
.local .align 8 .b8 depot[64];
.reg .b64 %rd<8>; .reg .b32 %r<8>;
mov.u32 %r1, %tid.x; mov.b64 %rd1, depot; cvta.local.u64 %rd2, %rd1; {body}
ret;
}}
"""

TABLE = (
    ".const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0};\n"
    + kernel(
        "table",
        f"{OWN} mov.b64 %rd20, table; add.u64 %rd21, %rd20, %rd10; ld.const.b32 %r5, [%rd21];"
        "st.global.b32 [%rd2], %r5;",
        pointers=1,
    )
)

KERNELS = Kernels(
    "".join(
        [
            access("load4", LOAD4, 4),
            access("load4_before", LOAD4, 4, -4),
            access("load16", LOAD16, 16),
            access("load16_by_4", LOAD16, 4),
            access("load2", "ld.global.b16 %h1, HERE;", 2),
            access("store4", "st.global.b32 HERE, %r1;", 4),
            access("store16", f"st.global.v4.b32 HERE, {V4};", 16),
            access("wild", "mov.b64 %rd3, 64; ld.global.b32 %r5, [%rd3];", 4),
            access("shared_as_global", "cvt.u64.u32 %rd3, 64; st.global.b32 [%rd3], 1;", 4),
            access("generic", "ld.b32 %r5, HERE; st.b32 HERE, 9;", 4),
            shared("shared_own", "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, HERE;", 16, FILL),
            shared("shared_unwritten", "ld.shared.b32 %r5, HERE;", 4),
            shared("shared_past", "st.shared.b32 HERE, 1;", 64),
            shared("shared_misaligned", "st.shared.b32 HERE, 1;", 2),
            DYNAMIC,
            TABLE,
            LOCAL.format(name="own", body="st.local.b32 [depot+60], %r1; ld.b32 %r2, [%rd2+60];"),
            LOCAL.format(name="past", body="st.local.b32 [depot+64], %r1;"),
            LOCAL.format(name="generic_past", body="st.b32 [%rd2+64], %r1;"),
            LOCAL.format(name="generic_before", body="st.b32 [%rd2+-4], %r1;"),
            LOCAL.format(name="misaligned", body="st.local.b32 [depot+2], %r1;"),
            LOCAL.format(
                name="of_another",
                body="ld.param.u64 %rd3, [pointer0]; setp.eq.u32 %p1, %r1, 0;"
                "@%p1 st.global.b64 [%rd3], %rd2; bar.sync 0; ld.global.b64 %rd4, [%rd3];"
                "ld.b32 %r2, [%rd4];",
            ).replace(".reg .b64", ".reg .pred %p<2>; .reg .b64"),
            kernel(
                "divergent_barrier",
                "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra FIRST;\nbar.sync 0;\nbra END;\n"
                "FIRST:\nbar.sync 0;\nEND:",
            ),
            kernel(
                "deadlock",
                "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra FIRST;\nbar.sync 1, 64;\nbra END;\n"
                "FIRST:\nbar.sync 2, 64;\nEND:",
            ),
            kernel("early_exit", "setp.ge.u32 %p1, %r1, 40; @%p1 ret; bar.sync 0; bar.sync 0;"),
            kernel("odd_count", "bar.sync 0, 40;"),
            kernel(
                "different_counts",
                "setp.lt.u32 %p1, %r1, 32;\nselp.b32 %r4, 64, 96, %p1;\nbar.sync 1, %r4;",
            ),
            kernel(
                "reduce",
                f"{OWN} setp.lt.u32 %p1, %r1, 40; bar.red.popc.u32 %r4, 0, %p1;"
                "bar.red.or.pred %p2, 0, %p1; bar.red.and.pred %p3, 0, %p1;"
                "@%p2 add.u32 %r4, %r4, 1000; @%p3 add.u32 %r4, %r4, 10000;"
                "st.global.b32 [%rd2], %r4;",
                pointers=1,
            ),
            # The first warp spins on a word until the second sets it; or nobody does.
            kernel(
                "spin",
                "setp.ge.u32 %p1, %r1, 32; @%p1 bra SET; LOOP: atom.global.add.u32 %r4, [%rd1], 0;"
                "setp.eq.u32 %p2, %r4, 0; @%p2 bra LOOP; bra END;"
                "SET: atom.global.exch.b32 %r4, [%rd1], 1; END:",
                pointers=1,
            ),
            kernel("nothing", ""),
            kernel("bounded", "").replace("\n{", "\n.maxntid 64, 1, 1\n{", 1),
            kernel("required", "").replace("\n{", "\n.reqntid 64, 2, 1\n{", 1),
            kernel("trapped", "setp.eq.u32 %p1, %r1, 7; @%p1 trap;"),
        ]
    )
)


def run(name: str, *buffers: Buffer, **keywords: object) -> Outcome:
    return KERNELS.run(name, *buffers, **keywords)  # type: ignore[arg-type]


def only(outcome: Outcome) -> str:
    """The one report's kind and message."""
    (report,) = outcome.reports
    return f"{report.kind}: {report.message}"


# ---- bounds, alignment, written -----------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("load4", 4), ("load16", 16), ("load2", 2)])
def test_global_bounds_to_the_byte(name: str, size: int) -> None:
    assert run(name, Buffer(32 * size)).reports == []
    outcome = run(name, Buffer(32 * size - 1))
    message = (
        f"{size}-byte read outside every allocation: global 'x'+{31 * size} of {32 * size - 1}"
    )
    assert only(outcome).startswith(f"out-of-bounds: {message}")
    assert outcome.reports[0].thread == 31


def test_below_a_buffer_and_far_from_any() -> None:
    assert "global 'x'-4 of 128 bytes" in only(run("load4_before", Buffer(128)))
    assert only(run("wild", Buffer(128))).startswith("wild-access: 4-byte read at 0x40")
    assert only(run("shared_as_global", Buffer(128))).startswith(
        "wild-access: 4-byte write at 0x40"
    )


def test_misaligned() -> None:
    outcome = run("load16_by_4", Buffer(1024))
    assert "misaligned: 16-byte read at an address that is not 16-byte aligned" in only(outcome)
    assert outcome.reports[0].thread == 1
    assert only(run("shared_misaligned")).startswith("misaligned: 4-byte write")


def test_uninitialised_global_bytes() -> None:
    outcome = run("load4", Buffer(128, written=False))
    assert only(outcome) == "uninitialised-read: read of never-written global 'x'+0 of 128 bytes"
    assert outcome.reports[0].count == 32
    assert run("load4", Buffer(128, written=False), init=0).reports == []
    written = Buffer(128, written=False)
    assert run("store4", written).reports == []
    assert struct.unpack("32I", written.contents) == tuple(range(32))


def test_unwritten_memory_is_nan_and_which_bytes_were_written_comes_back() -> None:
    executor = Executor.instance()
    address = executor.alloc(8, "y", written=False)
    flags = (ctypes.c_uint8 * 8)(*[0] * 4, *[1] * 4)
    assert math.isnan(struct.unpack("f", ctypes.string_at(address, 4))[0])
    executor.set_written(address, 8, ctypes.addressof(flags))
    got = (ctypes.c_uint8 * 8)()
    executor.get_written(address, 8, ctypes.addressof(got))
    executor.free(address)
    assert list(got) == list(flags)


def test_bytes_outside_every_view_are_out_of_bounds() -> None:
    executor = Executor.instance()
    address = executor.alloc(128, "view", written=True)
    flags = (ctypes.c_uint8 * 128)(*[1] * 100, *[0] * 28)
    executor.set_accessible(address, 128, ctypes.addressof(flags))
    assert run("load4", Buffer(128)).reports == []  # also loads the module
    launch = executor.launch(
        KERNELS.numbers["load4"], (1, 1, 1), (32, 1, 1), 0, struct.pack("Q", address)
    )
    executor.free(address)
    assert "global 'view'+100 of 128 bytes" in launch.reports[0].message


def test_shared_memory() -> None:
    assert run("shared_own", threads=64).reports == []
    assert "never-written shared+0 of 8192 bytes" in only(run("shared_unwritten"))
    assert run("shared_past", threads=128).reports == []
    message = (
        "out-of-bounds: 4-byte write past the block's shared memory: shared+8192 of 8192 bytes"
    )
    assert only(run("shared_past", threads=160)) == message


def test_dynamic_shared_memory() -> None:
    assert run("dynamic", dynamic=132).reports == []
    assert "shared+128 of 128 bytes" in only(run("dynamic", dynamic=128))


def test_generic_addresses() -> None:
    buffer = Buffer(128)
    assert run("generic", buffer).reports == []
    assert buffer.contents == struct.pack("32I", *[9] * 32)


def test_module_variables() -> None:
    buffer = Buffer(16)
    assert run("table", buffer, threads=4).reports == []
    assert struct.unpack("4I", buffer.contents) == (1, 2, 3, 4)
    found = run("table", Buffer(64), threads=5)
    assert found.kinds in (["out-of-bounds"], ["wild-access"])
    assert found.reports[0].thread == 4


LOCAL_CASES = [
    ("past", "out-of-bounds"),
    ("generic_past", "wild-access"),
    ("generic_before", "wild-access"),
    ("misaligned", "misaligned"),
    ("of_another", "wild-access"),
]


@pytest.mark.parametrize(("name", "kind"), LOCAL_CASES, ids=[case[0] for case in LOCAL_CASES])
def test_local_memory(name: str, kind: str) -> None:
    assert run("local_own", Buffer(8)).reports == []
    assert run(f"local_{name}", Buffer(8)).kinds == [kind]


# ---- barriers -----------------------------------------------------------------------------------


def test_early_exit_before_a_barrier_is_legal() -> None:
    outcome = run("early_exit", threads=128)
    assert outcome.reports == []
    assert outcome.launch.counts["barriers"] == 2


def test_divergent_barriers() -> None:
    assert run("divergent_barrier", threads=32).reports == []
    outcome = run("divergent_barrier", threads=64)
    assert outcome.kinds == ["divergent-barrier"]
    assert outcome.reports[0].opcode == "bar.sync"
    assert "multiple of 32" in only(run("odd_count", threads=64))
    assert run("different_counts", threads=64).kinds == ["divergent-barrier"]


def test_a_deadlock_lists_who_waits_where() -> None:
    message = only(run("deadlock", threads=64))
    assert message.startswith("deadlock: 64 threads wait for ever: thread 0 waits in a barrier at")
    assert "thread 32 waits in a barrier at" in message
    assert run("deadlock", threads=128).kinds == ["deadlock"]  # 32 and 96 come for two of 64


def test_spinning_ends_or_is_a_deadlock() -> None:
    assert run("spin", Buffer(4), threads=64).reports == []
    message = only(run("spin", Buffer(4), threads=32, spin_limit=1 << 18))
    assert message.startswith("deadlock: 32 threads make no step forward, some thread spins")


def test_barrier_reductions() -> None:
    buffer = Buffer(256)
    assert run("reduce", buffer, threads=64).reports == []
    assert struct.unpack("64I", buffer.contents) == (1040,) * 64
    buffer = Buffer(128)
    run("reduce", buffer, threads=32)
    assert struct.unpack("32I", buffer.contents) == (11032,) * 32


def test_trap() -> None:
    outcome = run("trapped")
    assert outcome.kinds == ["trap"]
    assert outcome.reports[0].thread == 7


# ---- launches -----------------------------------------------------------------------------------

BAD_LAUNCHES = [
    ("nothing", {"threads": 1025}, "blockDim.x is 1025"),
    ("nothing", {"threads": (64, 32, 1)}, "2048 threads in a block"),
    ("nothing", {"threads": (1, 1, 65)}, "blockDim.z is 65"),
    ("nothing", {"grid": (0, 1, 1)}, "gridDim.x is 0"),
    ("nothing", {"grid": (1, 65536, 1)}, "gridDim.y is 65536"),
    ("bounded", {"threads": 65}, "compiled for at most 64 (.maxntid)"),
    ("required", {"threads": (64, 1, 1)}, "blockDim.y is 1, the kernel was compiled for 2"),
    ("dynamic", {"dynamic": 232449}, "232449 bytes of shared memory"),
    ("dynamic", {"dynamic": 2048, "shared_limit": 1024}, "at most 1024"),
]


@pytest.mark.parametrize(("name", "keywords", "words"), BAD_LAUNCHES)
def test_bad_launches(name: str, keywords: dict[str, object], words: str) -> None:
    outcome = run(name, **keywords)
    assert only(outcome).startswith("bad-launch: ")
    assert words in only(outcome)
    assert outcome.launch.counts["blocks_run"] == 0


def test_good_launches() -> None:
    assert run("nothing", threads=(8, 2, 64)).reports == []
    assert run("bounded", threads=64).reports == []
    assert run("required", threads=(64, 2, 1)).reports == []
    assert run("dynamic", dynamic=232448).reports == []


def test_sampled_blocks() -> None:
    outcome = run("nothing", grid=(1000, 10, 1), sample=7)
    assert (outcome.launch.counts["blocks"], outcome.launch.counts["blocks_run"]) == (10000, 7)


# ---- the arena ----------------------------------------------------------------------------------


def test_freed_memory_is_used_again_and_clean() -> None:
    """At the same address, without a shadow of the former tenant: the arena never fills up."""
    executor = Executor.instance()
    addresses = set()
    for _ in range(3):
        address = executor.alloc(1 << 26, "big", written=False)
        addresses.add(address)
        executor.free(address)
    assert len(addresses) == 1
    assert run("store4", Buffer(128)).reports == []
    assert run("load4", Buffer(128, written=False)).kinds == ["uninitialised-read"]


def test_a_full_arena_says_so() -> None:
    with pytest.raises(MemoryError, match="no room for 5368709120 bytes of huge"):
        Executor.instance().alloc(5 << 30, "huge")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="no option 'speed'"):
        Executor.instance().options(speed=1)
