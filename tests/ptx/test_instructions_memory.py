"""Loads, stores, atomics and address arithmetic of PTX, local memory's bounds among them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.ptx.assembly import Array, Program, kernel, kinds
from tests.ptx.formats import FORMATS, decode, encode

THREADS = 32

VECTORS = {
    "v8": "ld.global.v8.b32 {%r10,%r11,%r12,%r13,%r14,%r15,%r16,%r17}, [%rd5];"
    " st.global.v8.b32 [%rd6], {%r10,%r11,%r12,%r13,%r14,%r15,%r16,%r17};",
    "v4_64": "ld.global.v4.b64 {%rd10,%rd11,%rd12,%rd13}, [%rd5];"
    " st.global.v4.b64 [%rd6], {%rd10,%rd11,%rd12,%rd13};",
    "v4": "ld.global.nc.L1::evict_last.v4.u32 {%r10,%r11,%r12,%r13}, [%rd5];"
    " ld.global.v4.b32 {%r14,%r15,%r16,%r17}, [%rd5+16];"
    " st.global.cs.v4.b32 [%rd6+16], {%r14,%r15,%r16,%r17};"
    " st.global.wt.v4.u32 [%rd6], {%r10,%r11,%r12,%r13};",
    "b128": "{ .reg .b128 a, b; ld.global.b128 a, [%rd5]; ld.global.b128 b, [%rd5+16];"
    " st.global.b128 [%rd6], a; st.global.b128 [%rd6+16], b; }",
    "v2_16": "".join(
        f"ld.global.v2.b16 {{%h1, %h2}}, [%rd5+{i}]; st.global.v2.b16 [%rd6+{i}], {{%h1, %h2}};"
        for i in range(0, 32, 4)
    ),
    "bytes": "".join(
        f"ld.global.u8 %h1, [%rd5+{i}]; st.global.u8 [%rd6+{i}], %h1;" for i in range(32)
    ),
    "generic": "".join(
        f"ld.b64 %rd10, [%rd5+{i}]; st.b64 [%rd6+{i}], %rd10;" for i in range(0, 32, 8)
    ),
    "local": "{ .local .align 16 .b8 depot[64]; .reg .b64 at, generic; mov.u64 at, depot;"
    " cvta.local.u64 generic, at;"
    + "".join(
        f"ld.global.b64 %rd10, [%rd5+{i}]; st.local.b64 [at+{i}], %rd10;"
        f" ld.b64 %rd11, [generic+{i}];"
        f" st.global.b64 [%rd6+{i}], %rd11;"
        for i in range(0, 32, 8)
    )
    + "}",
    "shared": "{ .shared .align 16 .b8 block[1024]; .reg .b32 at; mov.u32 at, block;"
    " mad.lo.u32 at, %r1, 32, at;"
    + "".join(
        f"ld.global.b64 %rd10, [%rd5+{i}]; st.shared::cta.b64 [at+{i}], %rd10;"
        f" ld.shared.b64 %rd11, [at+{i}]; st.global.b64 [%rd6+{i}], %rd11;"
        for i in range(0, 32, 8)
    )
    + "}",
}
OFFSETS = "mul.wide.u32 %rd4, %r1, 32; add.s64 %rd5, %rd1, %rd4; add.s64 %rd6, %rd2, %rd4;"


@pytest.fixture(scope="module")
def copies() -> Program:
    return Program(*(kernel(name, OFFSETS + body, 2) for name, body in VECTORS.items()))


@pytest.mark.parametrize("name", VECTORS)
def test_copies(copies: Program, name: str) -> None:
    source = np.random.default_rng(1).integers(0, 256, THREADS * 32, np.uint8)
    target = np.zeros_like(source)
    launch = copies.run(name, source, target)
    assert not launch.reports, launch.reports
    np.testing.assert_array_equal(target, source)


def test_signs_are_extended() -> None:
    body = (
        OFFSETS
        + "ld.global.s8 %r10, [%rd5]; ld.global.s16 %r11, [%rd5]; ld.global.s8 %rd10, [%rd5];"
    )
    body += "ld.global.u8 %r12, [%rd5]; ld.global.s32 %rd11, [%rd5];"
    body += "st.global.v2.b32 [%rd6], {%r10, %r11}; st.global.b64 [%rd6+8], %rd10;"
    body += "st.global.b32 [%rd6+16], %r12; st.global.b64 [%rd6+24], %rd11;"
    source = np.random.default_rng(2).integers(0, 256, (THREADS, 32), np.uint8)
    target = np.zeros((THREADS, 4), np.int64)
    assert not Program(kernel("extend", body, 2)).run("extend", source, target).reports
    low = source[:, 0].view(np.int8)
    np.testing.assert_array_equal(target[:, 1], low)
    first = np.ascontiguousarray(target[:, 0]).view(np.int32).reshape(-1, 2)
    np.testing.assert_array_equal(first[:, 0], low)
    words = np.ascontiguousarray(source[:, :4])
    np.testing.assert_array_equal(target[:, 3], words.view(np.int32)[:, 0])
    np.testing.assert_array_equal(target[:, 2] & 0xFFFFFFFF, source[:, 0])
    short = np.ascontiguousarray(source[:, :2]).view(np.int16)[:, 0]
    np.testing.assert_array_equal(first[:, 1], short)


@pytest.mark.parametrize(("offset", "kind"), [(64, "out-of-bounds"), (2, "misaligned")])
def test_local_memory_is_bounded(offset: int, kind: str) -> None:
    body = f".local .align 8 .b8 depot[64]; st.local.b32 [depot+{offset}], %r1;"
    launch = Program(kernel("local", body)).run("local")
    assert kinds(launch) == {kind}


def test_tables() -> None:
    """Module-scope tables, through their space and through a generic address."""
    tables = ".const .align 4 .u32 primes[4] = {2, 3, 5, 7};\n"
    tables += ".global .align 4 .f32 halves[2] = {0f3F000000, 0f3FC00000};\n"
    body = "and.b32 %r5, %r1, 3; mul.wide.u32 %rd4, %r5, 4; mov.u64 %rd5, primes;"
    body += "add.s64 %rd5, %rd5, %rd4; ld.const.u32 %r6, [%rd5];"
    body += "cvta.global.u64 %rd6, halves; ld.f32 %r7, [%rd6+4]; ld.global.f32 %r8, [halves];"
    body += "mul.wide.u32 %rd7, %r1, 16; add.s64 %rd7, %rd1, %rd7;"
    body += "st.global.v4.b32 [%rd7], {%r6, %r7, %r8, %r5};"
    target = np.zeros((THREADS, 4), np.uint32)
    launch = Program(tables + kernel("tables", body, 1)).run("tables", target)
    assert not launch.reports, launch.reports
    np.testing.assert_array_equal(target[:4, 0], [2, 3, 5, 7])
    assert target[5].tolist() == [3, 0x3FC00000, 0x3F000000, 1]


def test_spaces_of_addresses() -> None:
    body = ".local .align 8 .b8 depot[16]; .shared .align 8 .b8 block[16];"
    body += "{ .reg .b64 l, s; .reg .pred p<4>; cvta.local.u64 l, depot; cvta.shared.u64 s, block;"
    body += "isspacep.local p0, l; isspacep.shared p1, s; isspacep.global p2, %rd1;"
    body += "isspacep.global p3, s;"
    body += "selp.u32 %r5, 1, 0, p0; selp.u32 %r6, 1, 0, p1; selp.u32 %r7, 1, 0, p2;"
    body += "selp.u32 %r8, 1, 0, p3; mul.wide.u32 %rd4, %r1, 16; add.s64 %rd4, %rd1, %rd4;"
    body += "st.global.v4.b32 [%rd4], {%r5, %r6, %r7, %r8}; }"
    target = np.zeros((THREADS, 4), np.uint32)
    assert not Program(kernel("spaces", body, 1)).run("spaces", target).reports
    assert target[3].tolist() == [1, 1, 1, 0]


# ---- atomics: one location, every thread ---------------------------------------------------------


def _half_sum(type: str) -> Callable[[list[int]], int]:
    format = FORMATS[type]

    def total(values: list[int]) -> int:
        code = 0
        for value in values:
            code = encode(format, decode(format, code) + decode(format, value))
        return code

    return total


ATOMICS: dict[str, tuple[int, int, Callable[[list[int]], int]]] = {
    # instruction: bits, initial value, result of all threads' operands
    "add.u32": (32, 5, lambda v: 5 + sum(v)),
    "add.u64": (64, 1 << 40, lambda v: (1 << 40) + sum(v)),
    "min.u32": (32, 0xFFFFFFFF, min),
    "max.s32": (32, 0x80000000, max),
    "and.b32": (32, 0xFF, lambda v: int(np.bitwise_and.reduce([0xFF, *v]))),
    "or.b64": (64, 0, lambda v: int(np.bitwise_or.reduce(v))),
    "xor.b32": (32, 0, lambda v: int(np.bitwise_xor.reduce(v))),
    "inc.u32": (32, 0, lambda v: THREADS % 1000),
    "exch.b32": (32, 0, lambda v: v[-1]),
    "add.noftz.f16": (16, 0, _half_sum("f16")),
    "add.noftz.bf16": (16, 0, _half_sum("bf16")),
}


@pytest.fixture(scope="module")
def atomics() -> Program:
    kernels = []
    for number, (name, (bits, _, _)) in enumerate(ATOMICS.items()):
        register = {16: "%h", 32: "%r", 64: "%rd"}[bits]
        value = f"{register}10"
        body = "mul.wide.u32 %rd4, %r1, 8; add.s64 %rd5, %rd2, %rd4; add.s64 %rd6, %rd3, %rd4;"
        body += f"ld.global.b{bits} {value}, [%rd5];"
        body += f"atom.relaxed.gpu.global.{name} {register}11, [%rd1], {value};"
        body += f"st.global.b{bits} [%rd6], {register}11;"
        kernels.append(kernel(f"atomic_{number}", body, 3))
    return Program(*kernels)


@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(atomics: Program, name: str) -> None:
    bits, initial, result = ATOMICS[name]
    numbers = (
        [encode(FORMATS[name.rpartition(".")[2]], 0.25 + t) for t in range(THREADS)]
        if bits == 16
        else [1000 + 37 * t % 91 for t in range(THREADS)]
    )
    place, operands = np.array([initial], np.uint64), np.array(numbers, np.uint64)
    before = np.zeros_like(operands)
    launch = atomics.run(f"atomic_{list(ATOMICS).index(name)}", place, operands, before)
    assert not launch.reports, launch.reports
    assert int(place[0]) == result(numbers)
    assert int(before[0]) == initial  # threads come in order, and each gets what it found
    assert len(set(before.tolist())) > 1


def test_compare_and_swap_makes_a_sum() -> None:
    """atom.cas.b16 in a loop: the way of 16-bit sums without an instruction of their own."""
    loop = "ld.global.b16 %h1, [%rd1];\nagain: add.u16 %h2, %h1, 3;"
    loop += "atom.global.cas.b16 %h3, [%rd1], %h1, %h2; setp.ne.b16 %p1, %h3, %h1;"
    loop += "mov.b16 %h1, %h3; @%p1 bra again;"
    body = loop.replace("ld.global.b16 %h1, [%rd1];", "atom.global.cas.b16 %h1, [%rd1], 0, 0;")
    place = np.zeros(4, np.uint16)
    launch = Program(kernel("cas", body, 1)).run("cas", place)
    assert not launch.reports, launch.reports
    assert place.tolist() == [3 * THREADS, 0, 0, 0]


def test_vector_and_packed_reductions() -> None:
    body = (
        "cvt.rn.f32.u32 %r5, %r1; red.global.add.v4.f32 [%rd1], {%r5, %r5, 0f3F800000, 0f00000000};"
    )
    body += "red.global.add.noftz.f16x2 [%rd1+16], 0x3C004000;"
    target = np.zeros(5, np.float32)
    launch = Program(kernel("vector", body, 1)).run("vector", target)
    assert not launch.reports, launch.reports
    assert target[:4].tolist() == [496.0, 496.0, 32.0, 0.0]
    assert target[4:].view(np.float16).tolist() == [64.0, 32.0]


def test_predicated_off_accesses_touch_nothing() -> None:
    body = "setp.lt.u32 %p1, %r1, 4; mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd1, %rd4;"
    body += "@%p1 st.global.b32 [%rd4], %r1; setp.gt.u32 %p2, %r1, 99; mov.u64 %rd5, 64;"
    body += "@%p2 ld.global.b32 %r5, [%rd5]; @%p2 atom.shared.add.u32 %r5, [%rd5], 1;"
    target: Array = np.zeros(4, np.uint32)
    launch = Program(kernel("guarded", body, 1)).run("guarded", target)
    assert not launch.reports, launch.reports
    assert target.tolist() == [0, 1, 2, 3]
