"""wgmma against products in float64 and int64: types, layouts in shared memory, and its hazards.

The images of shared memory are made here from the canonical layouts of the PTX ISA ("Strides" and
"Swizzling modes" of wgmma), element by element.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest

from tests.ptx.assembly import Array, Program, clean, kernel, kinds
from tests.ptx.elements import BITS, random_matrix, words

THREADS = 128
SHARED = 49152
B_START = 16384
SWIZZLES = {"none": 0, "128": 1, "64": 2, "32": 3}


@dataclass(frozen=True)
class Case:
    a: str
    b: str
    d: str
    n: int
    swizzle: str = "128"
    a_major: str = "k"  # "k", "m", or "registers"
    b_major: str = "k"
    sign_a: int = 1
    accumulate: bool = True

    @property
    def k(self) -> int:
        return 256 // BITS[self.a]

    @property
    def name(self) -> str:
        sign = "_minus" if self.sign_a < 0 else ""
        overwrite = "" if self.accumulate else "_overwrite"
        majors = f"{self.a_major}_{self.b_major}"
        return f"{self.a}_{self.b}_{self.d}_n{self.n}_{self.swizzle}_{majors}{sign}{overwrite}"

    @property
    def registers(self) -> int:
        return self.n // (4 if self.d == "f16" else 2)


CASES = [
    *(Case("bf16", "bf16", "f32", n) for n in (8, 24, 64, 256)),
    *(Case("f16", "f16", d, 32, swizzle=s) for d in ("f32", "f16") for s in SWIZZLES),
    *(
        Case("bf16", "bf16", "f32", 64, swizzle=s, a_major=a, b_major=b)
        for s in SWIZZLES
        for a, b in (("k", "n"), ("m", "k"), ("m", "n"), ("registers", "n"))
    ),
    *(Case("tf32", "tf32", "f32", 16, swizzle=s) for s in SWIZZLES),
    Case("tf32", "tf32", "f32", 16, a_major="registers"),
    *(Case(a, b, "s32", 32) for a in ("s8", "u8") for b in ("s8", "u8")),
    Case("s8", "s8", "s32", 32, swizzle="none", a_major="registers"),
    *(Case(a, b, "f32", 32) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
    Case("e4m3", "e4m3", "f16", 32, swizzle="32", a_major="registers"),
    Case("bf16", "bf16", "f32", 16, sign_a=-1),
    Case("bf16", "bf16", "f32", 16, accumulate=False),
]


def offset(case: Case, mn: int, k: int, major: str) -> tuple[int, int, int]:
    """(byte offset of element (mn, k), leading and stride byte offsets that I chose)."""
    size = BITS[case.a] // 8
    width = {"none": 16, "32": 32, "64": 64, "128": 128}[case.swizzle]
    if case.swizzle == "none":
        leading, stride = 128, 512  # of neighbouring core matrices
        if major == "k":  # core matrices: 8 rows (mn) of 16 bytes along k
            at = mn // 8 * stride + k * size // 16 * leading + mn % 8 * 16 + k * size % 16
        else:  # 8 rows (k) of 16 bytes along mn; the stride goes along mn, the leading along k
            at = mn * size // 16 * stride + k // 8 * leading + k % 8 * 16 + mn * size % 16
        return at, leading, stride
    if major == "k":  # atoms of 8 rows (mn) of `width` bytes
        leading, stride = 16, 8 * width
        at = mn // 8 * stride + mn % 8 * width + k * size
    else:  # atoms of 8 rows (k) of `width` bytes along mn
        leading, stride = 16 * width, 8 * width
        at = mn * size // width * leading + k // 8 * stride + k % 8 * width + mn * size % width
    chunk, row = at // 16, at // 128
    chunk ^= row % (width // 16)  # which 16 bytes of the row: exchanged from row to row
    return chunk * 16 + at % 16, leading, stride


def place(image: Array, start: int, case: Case, bits: Array, major: str) -> int:
    """Writes a matrix (mn, k) into the image; returns its descriptor."""
    raw = bits.view(np.uint8).reshape(*bits.shape, -1)
    leading = stride = 0
    for mn, k in np.ndindex(*bits.shape):
        at, leading, stride = offset(case, mn, k, "k" if major == "k" else "mn")
        image[start + at : start + at + raw.shape[-1]] = raw[mn, k]
    fields = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32
    return fields | SWIZZLES[case.swizzle] << 62


def d_element(thread: int, i: int) -> tuple[int, int]:
    """PTX ISA, "Register fragments for wgmma.mma_async": f32 i, or f16 element i, of D."""
    warp, lane = divmod(thread, 32)
    row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
    return row, i // 4 * 8 + lane % 4 * 2 + i % 2


def a_fragment(case: Case, bits: Array) -> Array:
    """[128, 4] registers of A: 16 rows per warp, as the A fragment of mma.m16n8k(32 bytes)."""
    per = 32 // BITS[case.a]
    held = np.empty((THREADS, 4, per), bits.dtype)
    for thread in range(THREADS):
        warp, lane = divmod(thread, 32)
        for register in range(4):
            row = 16 * warp + lane // 4 + (8 if register in (1, 3) else 0)
            first = lane % 4 * per + (4 * per if register >= 2 else 0)
            held[thread, register] = bits[row, first : first + per]
    return words(held).reshape(THREADS, 4)


FENCE = "fence.proxy.async.shared::cta;"
DEFAULT = {
    "proxy_fence": FENCE,
    "barrier": "bar.sync 0;",
    "fence": "wgmma.fence.sync.aligned;",
    "commit": "wgmma.commit_group.sync.aligned;",
    "wait": "wgmma.wait_group.sync.aligned 0;",
    "after": "",
}
# Shared memory is filled from array 1 word by word; array 2: descriptors of A and B; array 3: A in
# registers; array 4: the accumulators, in and out.
BODY = """
mov.b32 %r4, 0; mov.u64 %rd10, %rd1;
mad.wide.u32 %rd10, %r1, 4, %rd1; mad.lo.u32 %r5, %r1, 4, %r3;
FILL: ld.global.b32 %r6, [%rd10]; st.shared.b32 [%r5], %r6;
add.s64 %rd10, %rd10, 512; add.u32 %r5, %r5, 512; add.u32 %r4, %r4, 1;
setp.lt.u32 %p1, %r4, {fills}; @%p1 bra FILL;
ld.global.v2.b64 {{%rd11, %rd12}}, [%rd2];
mad.wide.u32 %rd13, %r1, 16, %rd3; ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd13];
mad.wide.u32 %rd14, %r1, {d_bytes}, %rd4;
{load_d}
{proxy_fence}
{barrier}
{fence}
setp.ne.u32 %p2, {accumulate}, 0;
wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b}
  {{{registers}}}, {a_operand}, %rd12, %p2{flags};
{commit}
{wait}
{after}
{store_d}
"""


def wgmma_kernel(name: str, case: Case, **parts: str) -> str:
    registers = [f"%r{100 + i}" for i in range(case.registers)]
    in_registers = case.a_major == "registers"
    flags = "" if case.d == "s32" else f", {case.sign_a}, 1"
    if BITS[case.a] == 16:
        flags += "" if in_registers else f", {int(case.a_major == 'm')}"
        flags += f", {int(case.b_major == 'n')}"
    body = BODY.format(
        **{**DEFAULT, **parts},
        fills=SHARED // 512,
        d_bytes=4 * case.registers,
        load_d="\n".join(f"ld.global.b32 {r}, [%rd14+{4 * i}];" for i, r in enumerate(registers)),
        store_d="\n".join(f"st.global.b32 [%rd14+{4 * i}], {r};" for i, r in enumerate(registers)),
        accumulate=int(case.accumulate),
        n=case.n,
        k=case.k,
        d=case.d,
        a=case.a,
        b=case.b,
        registers=", ".join(registers),
        a_operand="{%r10, %r11, %r12, %r13}" if in_registers else "%rd11",
        flags=flags,
    )
    return kernel(name, body, pointers=4, shared=SHARED)


BROKEN = {
    "without_proxy_fence": ({"proxy_fence": ""}, "missing-proxy-fence"),
    "fence_of_the_wrong_proxy_time": (
        {"proxy_fence": FENCE + "st.shared.b32 [%r3], %r6; bar.sync 0;"},
        "missing-proxy-fence",
    ),
    "without_barrier": ({"barrier": ""}, "race-RAW"),
    "without_wgmma_fence": ({"fence": ""}, "wgmma-hazard"),
    "without_wait": ({"wait": ""}, "wgmma-hazard"),
    "waits_for_too_few": (
        {"wait": "wgmma.wait_group.sync.aligned 1;", "after": "st.shared.b32 [%r3], %r1;"},
        "wgmma-hazard",
    ),
    "overwrites_before_the_wait": (
        {"commit": DEFAULT["commit"] + "bar.sync 0; st.shared.b32 [%r3], %r1;"},
        "wgmma-hazard",
    ),
}
HAZARD_CASE = Case("bf16", "bf16", "f32", 8)


@functools.cache
def program() -> Program:
    broken = [wgmma_kernel(name, HAZARD_CASE, **parts) for name, (parts, _) in BROKEN.items()]
    return Program(*(wgmma_kernel(case.name, case) for case in CASES), *broken)


def run(case: Case, name: str, seed: int = 0) -> tuple[Array, Array, set[str]]:
    """D as the executor computed it, the exact D, and the kinds of reports."""
    a, a_bits = random_matrix(case.a, 64, case.k, seed)
    b, b_bits = random_matrix(case.b, case.n, case.k, seed + 1)  # b[n, k]
    image = np.random.default_rng(seed).integers(0, 256, SHARED).astype(np.uint8)
    a_descriptor = 0
    if case.a_major != "registers":
        a_descriptor = place(image, 0, case, a_bits, case.a_major)
    b_descriptor = place(image, B_START, case, b_bits, case.b_major)
    descriptors = np.array([a_descriptor, b_descriptor], np.uint64)
    if case.d == "s32":
        limit = 2**31
        c = np.random.default_rng(seed).integers(-limit, limit, (64, case.n)).astype(np.int32)
        c_bits = c
    elif case.d == "f32":
        c = c_bits = np.random.default_rng(seed).standard_normal((64, case.n)).astype(np.float32)
    else:
        c, c_bits = random_matrix("f16", 64, case.n, seed + 2)
    per_thread = case.n // 2
    held = np.empty((THREADS, per_thread), c_bits.dtype)
    for thread, i in np.ndindex(held.shape):
        held[thread, i] = c_bits[d_element(thread, i)]
    launch = program().run(
        name, image, descriptors, a_fragment(case, a_bits), held, threads=THREADS
    )
    got = np.empty((64, case.n), held.dtype)
    for thread, i in np.ndindex(held.shape):
        got[d_element(thread, i)] = held[thread, i]
    wide = np.int64 if case.d == "s32" else np.float64
    exact = case.sign_a * (a @ b.T) + case.accumulate * c.astype(wide)
    if not kinds(launch):
        assert launch.counts["wgmma"] == 1
        clean(launch)
    return got, exact, kinds(launch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wgmma(case: Case) -> None:
    for seed in (0, 10):
        got, exact, found = run(case, case.name, seed)
        assert not found
        if case.d == "s32":
            assert (got == ((exact + 2**31) % 2**32 - 2**31)).all()
        elif case.d == "f32":
            assert (got == exact.astype(np.float32)).all()
        else:
            assert (got.view(np.float16) == exact.astype(np.float16)).all()


@pytest.mark.parametrize("name", BROKEN)
def test_hazards(name: str) -> None:
    assert BROKEN[name][1] in run(HAZARD_CASE, name)[2]
