"""mma.sync, ldmatrix and stmatrix against products in float64 and int64.

The layouts are written down here once more, element by element as the figures of the PTX ISA give
them, so that the executor's general description is not compared with itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest

from tests.ptx.assembly import Array, Program, clean, kernel
from tests.ptx.elements import BITS, random_matrix, words


@dataclass(frozen=True)
class Shape:
    a: str
    b: str
    d: str
    k: int
    satfinite: bool = False

    @property
    def name(self) -> str:
        return f"k{self.k}_{self.a}_{self.b}_{self.d}" + "_sat" * self.satfinite


SHAPES = [
    *(Shape(a, a, "f32", k) for a in ("f16", "bf16") for k in (8, 16)),
    *(Shape("f16", "f16", "f16", k) for k in (8, 16)),
    *(Shape("tf32", "tf32", "f32", k) for k in (4, 8)),
    *(Shape(a, b, "s32", k) for a in ("s8", "u8") for b in ("s8", "u8") for k in (16, 32)),
    *(Shape("s8", "u8", "s32", k, satfinite=True) for k in (16, 32)),
    *(Shape(a, b, "f32", 32) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
]


def a_element(bits: int, k: int, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of a_i; PTX ISA, "Matrix Fragments for mma.m16n8kK", one figure per case."""
    group, thread = lane >> 2, lane % 4
    match bits, k:
        case 16, 8:
            return (group if i in (0, 1) else group + 8), thread * 2 + (i & 1)
        case 16, 16:
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
        case 32, 4:
            return (group if i == 0 else group + 8), thread
        case 32, 8:
            return (group if i in (0, 2) else group + 8), (thread if i < 2 else thread + 4)
        case 8, 16:
            return (group if i < 4 else group + 8), thread * 4 + (i & 3)
        case 8, 32:
            row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
            return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)
    raise AssertionError((bits, k))


def b_element(bits: int, k: int, lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    match bits, k:
        case 16, 8:
            return thread * 2 + i, group
        case 16, 16:
            return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
        case 32, 4:
            return thread, group
        case 32, 8:
            return (thread if i == 0 else thread + 4), group
        case 8, 16:
            return thread * 4 + i, group
        case 8, 32:
            return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group
    raise AssertionError((bits, k))


def d_element(lane: int, i: int) -> tuple[int, int]:
    """The same for f32, s32 and (two to a register) f16."""
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


def lanes_hold(bits: Array, count: int, element: object) -> Array:
    """[32, count] elements of a matrix as the lanes hold them."""
    held = np.empty((32, count), bits.dtype)
    for lane in range(32):
        for i in range(count):
            held[lane, i] = bits[element(lane, i)]
    return held


def registers(shape: Shape) -> tuple[int, int, int]:
    bytes_a = 16 * shape.k * BITS[shape.a] // 8 // 32
    return bytes_a // 4, bytes_a // 8, 2 if shape.d == "f16" else 4


def mma_kernel(shape: Shape) -> str:
    counts = registers(shape)
    first = {"a": 10, "b": 20, "c": 30}
    load = []
    for pointer, (operand, count) in enumerate(zip("abc", counts, strict=True), 1):
        load.append(f"mad.wide.u32 %rd10, %r1, {4 * count}, %rd{pointer};")
        for i in range(count):
            load.append(f"ld.global.b32 %r{first[operand] + i}, [%rd10+{4 * i}];")

    def vector(start: int, count: int) -> str:
        return "{" + ", ".join(f"%r{start + i}" for i in range(count)) + "}"

    saturate = ".satfinite" if shape.satfinite else ""
    operands = [vector(40, counts[2])]
    operands += [vector(first[o], n) for o, n in zip("abc", counts, strict=True)]
    store = [f"mad.wide.u32 %rd10, %r1, {4 * counts[2]}, %rd4;"]
    store += [f"st.global.b32 [%rd10+{4 * i}], %r{40 + i};" for i in range(counts[2])]
    instruction = (
        f"mma.sync.aligned.m16n8k{shape.k}.row.col{saturate}"
        f".{shape.d}.{shape.a}.{shape.b}.{shape.d} {', '.join(operands)};"
    )
    return kernel(shape.name, "\n".join([*load, instruction, *store]), pointers=4)


@functools.cache
def mma_program() -> Program:
    return Program(*map(mma_kernel, SHAPES))


def accumulators(shape: Shape, seed: int) -> tuple[Array, Array]:
    """C and its registers [32, n]."""
    if shape.d == "s32":
        generator = np.random.default_rng(seed)  # so near the limits that many sums overflow
        near = generator.integers(0, 10000, (16, 8))
        low = generator.integers(0, 2, (16, 8))
        c = np.where(low, -(2**31) + near, 2**31 - 1 - near).astype(np.int32)
        bits = c.view(np.uint32)
    elif shape.d == "f32":
        c = np.random.default_rng(seed).standard_normal((16, 8)).astype(np.float32)
        bits = c.view(np.uint32)
    else:
        c, bits = random_matrix("f16", 16, 8, seed)
    return c, words(lanes_hold(bits, 4, d_element))


def matrix_of_lanes(d: Array, kind: str) -> Array:
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[kind]
    values = d.view(dtype).reshape(32, 4)
    result = np.empty((16, 8), dtype)
    for lane in range(32):
        for i in range(4):
            result[d_element(lane, i)] = values[lane, i]
    return result


def run_mma(shape: Shape, seed: int, **options: int) -> tuple[Array, Array]:
    """What the executor gives, and the exact result."""
    bits = BITS[shape.a]
    a, a_bits = random_matrix(shape.a, 16, shape.k, seed)
    b, b_bits = random_matrix(shape.b, shape.k, 8, seed + 1)
    c, c_words = accumulators(shape, seed + 2)
    count_a = 16 * shape.k // 32
    a_words = words(lanes_hold(a_bits, count_a, functools.partial(a_element, bits, shape.k)))
    b_words = words(lanes_hold(b_bits, count_a // 2, functools.partial(b_element, bits, shape.k)))
    d_words = np.zeros((32, registers(shape)[2]), np.uint32)
    launch = mma_program().run(shape.name, a_words, b_words, c_words, d_words, **options)
    clean(launch)
    assert launch.counts["mma"] == 1
    exact = a @ b + c.astype(np.int64 if shape.d == "s32" else np.float64)
    return matrix_of_lanes(d_words, shape.d), exact


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_mma(shape: Shape) -> None:
    for seed in range(5):
        got, exact = run_mma(shape, seed)
        if shape.d == "s32":
            limits = (-(2**31), 2**31 - 1)
            wrapped = (exact - limits[0]) % 2**32 + limits[0]
            expected = exact.clip(*limits) if shape.satfinite else wrapped
            assert (got == expected).all()
        else:  # one rounding of the exact sum
            assert (got == exact.astype(got.dtype)).all()


def test_saturation_differs_from_wrapping() -> None:
    """The inputs of test_mma reach both limits: it could not pass with plain wrapping."""
    shape = next(shape for shape in SHAPES if shape.satfinite)
    overflown = [run_mma(shape, seed)[1] for seed in range(5)]
    assert any((exact > 2**31 - 1).any() for exact in overflown)
    assert any((exact < -(2**31)).any() for exact in overflown)


@pytest.mark.parametrize(("rounding", "worst"), [(1, 2e-6), (2, 4e-6)])
def test_rounding_modes_differ_within_bounds(rounding: int, worst: float) -> None:
    """Both lose bits that the double sum keeps, and no more than fp32 sums of 16 terms may."""
    lost = False
    for seed in range(5):
        got, exact = run_mma(Shape("bf16", "bf16", "f32", 16), seed, mma_rounding=rounding)
        lost |= bool((got != exact.astype(np.float32)).any())
        assert np.abs(got - exact).max() < worst
    assert lost


def test_mma_of_special_values() -> None:
    """Infinities and NaN of e5m2, NaN of e4m3, subnormals of all: exactly their meaning."""
    shape = Shape("e4m3", "e5m2", "f32", 32)
    one_a, one_b = 0x38, 0x3C
    for a_bits, b_bits, expected in [
        (0x7F, one_b, np.nan),
        (one_a, 0x7C, np.inf),
        (one_a, 0xFC, -np.inf),
        (one_a, 0x7E, np.nan),
        (0x7E, one_b, 448.0),
        (one_a, 0x7B, 57344.0),
        (0x01, one_b, 2.0**-9),
        (one_a, 0x81, -(2.0**-16)),
    ]:
        a = np.zeros((16, 32), np.uint8)
        b = np.zeros((32, 8), np.uint8)
        a[:, 0], b[0, :] = a_bits, b_bits
        a_words = words(lanes_hold(a, 16, functools.partial(a_element, 8, 32)))
        b_words = words(lanes_hold(b, 8, functools.partial(b_element, 8, 32)))
        d = np.zeros((32, 4), np.uint32)
        clean(mma_program().run(shape.name, a_words, b_words, np.zeros_like(d), d))
        np.testing.assert_array_equal(d.view(np.float32), np.float32(expected))


# ---- ldmatrix, stmatrix


def move_kernel(name: str, count: int, transposed: bool, store: bool) -> str:
    """Shared memory from array 1; ldmatrix to array 2, or stmatrix from array 2 to array 1.

    Lane l gives the address of the 16-byte row 31 - l, so that rows and lanes differ.
    """
    trans = ".trans" if transposed else ""
    registers_ = "{" + ", ".join(f"%r{20 + i}" for i in range(count)) + "}"
    copy = "ld.global.b32 %r10, [%rd10+{0}]; st.shared.b32 [%r4+{0}], %r10;"
    back = "ld.shared.b32 %r10, [%r4+{0}]; st.global.b32 [%rd10+{0}], %r10;"
    row = ["mad.wide.u32 %rd10, %r1, 16, %rd1;", "mad.lo.u32 %r4, %r1, 16, %r3;"]
    address = ["sub.u32 %r5, 31, %r1;", "mad.lo.u32 %r5, %r5, 16, %r3;"]
    fragment = [f"mad.wide.u32 %rd11, %r1, {4 * count}, %rd2;"]
    load = [f"ld.global.b32 %r{20 + i}, [%rd11+{4 * i}];" for i in range(count)]
    keep = [f"st.global.b32 [%rd11+{4 * i}], %r{20 + i};" for i in range(count)]
    form = f"sync.aligned.m8n8.x{count}{trans}.shared.b16"
    if store:
        work = [*load, f"stmatrix.{form} [%r5], {registers_};", "bar.sync 0;"]
        lines = [*(copy.format(4 * i) for i in range(4)), "bar.sync 0;", *work]
        lines += [back.format(4 * i) for i in range(4)]
    else:
        work = [f"ldmatrix.{form} {registers_}, [%r5];", *keep]
        lines = [*(copy.format(4 * i) for i in range(4)), "bar.sync 0;", *work]
    return kernel(name, "\n".join([*row, *address, *fragment, *lines]), pointers=2, shared=512)


MOVES = [(count, trans, store) for count in (1, 2, 4) for trans in (0, 1) for store in (0, 1)]


@functools.cache
def move_program() -> Program:
    return Program(*(move_kernel(f"move_{c}_{t}_{s}", c, bool(t), bool(s)) for c, t, s in MOVES))


@pytest.mark.parametrize(("count", "transposed", "store"), MOVES)
def test_ldmatrix_and_stmatrix(count: int, transposed: int, store: int) -> None:
    """PTX ISA: lane l holds elements (l / 4, 2 (l % 4) + {0, 1}) of matrix i in register i."""
    generator = np.random.default_rng(count)
    memory = generator.integers(0, 2**16, (32, 8)).astype(np.uint16)  # rows of 16 bytes
    held = generator.integers(0, 2**16, (32, count, 2)).astype(np.uint16)
    before = memory.copy()
    expected_memory, expected_held = memory.copy(), held.copy()
    for i in range(count):
        rows = [31 - (8 * i + r) for r in range(8)]  # the lanes 8 i … give matrix i's addresses
        for lane in range(32):
            for e in range(2):
                row, column = lane // 4, 2 * (lane % 4) + e
                if transposed:
                    row, column = column, row
                expected_held[lane, i, e] = before[rows[row], column]
                expected_memory[rows[row], column] = held[lane, i, e]
    launch = move_program().run(f"move_{count}_{transposed}_{store}", memory, held)
    clean(launch)
    if store:
        assert (memory == expected_memory).all()
    else:
        assert (held == expected_held).all()
    assert launch.counts["stmatrix" if store else "ldmatrix"] == 1
