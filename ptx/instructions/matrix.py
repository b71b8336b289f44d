"""Tensor-core instructions: ldmatrix, stmatrix, mma, wgmma."""

from __future__ import annotations

import re

from ptx.instructions.base import Emitter, Instruction
from ptx.operands import Unsupported
from ptx.syntax import Integer, Operand, Vector

_ELEMENTS = {
    "f16": "kF16",
    "bf16": "kBf16",
    "tf32": "kTf32",
    "s8": "kS8",
    "u8": "kU8",
    "e4m3": "kE4m3",
    "e5m2": "kE5m2",
    "f32": "kF32",
    "s32": "kS32",
}
_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}
_INPUTS = tuple(_BITS)
_ACCUMULATORS = ("f16", "f32", "s32")


def ldmatrix(i: Instruction) -> str:
    transposed = _matrix_words(i)
    targets = i.vector(0)
    _check_count(i, len(targets))
    row = i.pointer(1, i.space(("shared",)))
    call = f"ldmatrix(d, {len(targets)}, {transposed}, {row}, {i.site});"
    return f"{{ u32 d[{len(targets)}]; {call} {i.write_all(targets, 'b32', 'd')} }}"


def stmatrix(i: Instruction) -> str:
    transposed = _matrix_words(i)
    sources = i.vector(1)
    _check_count(i, len(sources))
    row = i.pointer(0, i.space(("shared",)))
    data = f"const u32 d[] = {i.array(sources, 'b32')};"
    return f"{{ {data} stmatrix(d, {len(sources)}, {transposed}, {row}, {i.site}); }}"


def _matrix_words(i: Instruction) -> str:
    i.type(("b16",))
    i.one_of(("sync",))
    i.one_of(("aligned",))
    i.one_of(("m8n8",))
    return str(i.take("trans")).lower()


def _check_count(i: Instruction, count: int) -> None:
    if i.one_of(("x1", "x2", "x4")) != f"x{count}":
        raise Unsupported(f"{count} registers")


def _take_element(i: Instruction, accepted: tuple[str, ...]) -> str:
    if not i.words or i.words[-1] not in accepted:
        raise Unsupported(f"the type {i.words[-1] if i.words else 'missing'}")
    return i.words.pop()


def _shape(i: Instruction) -> tuple[int, int, int]:
    for word in i.words:
        match = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", word)
        if match:
            i.words.remove(word)
            m, n, k = (int(size) for size in match.groups())
            return m, n, k
    raise Unsupported("no shape")


def mma(i: Instruction) -> str:
    """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 d, a, b, c"""
    c = _take_element(i, _ACCUMULATORS)
    b, a = _take_element(i, _INPUTS), _take_element(i, _INPUTS)
    d = _take_element(i, _ACCUMULATORS)
    for word in ("sync", "aligned", "row", "col"):
        i.one_of((word,))
    saturate = i.take("satfinite")
    m, n, k = _shape(i)
    row_bytes = k * _BITS[a] // 8  # 16 or 32; of f32's tf32 and of fp16's k8 half of that
    if (m, n) != (16, 8) or row_bytes not in (16, 32) or c != d or _BITS[a] != _BITS[b]:
        raise Unsupported("this shape")
    if saturate and d != "s32":
        raise Unsupported(".satfinite")
    counts = (4 if d != "f16" else 2, row_bytes // 8, row_bytes // 16, 4 if d != "f16" else 2)
    vectors = [i.vector(number) for number in range(4)]
    if tuple(map(len, vectors)) != counts:
        raise Unsupported("another number of registers than the shape has")
    shape = (
        f"{{{m}, {n}, {k}, Element::{_ELEMENTS[a]}, Element::{_ELEMENTS[b]},"
        f" Element::{_ELEMENTS[d]}, {str(saturate).lower()}}}"
    )
    inputs = " ".join(
        f"const u32 {name}[] = {i.array(vector, 'b32')};"
        for name, vector in zip("abc", vectors[1:], strict=True)
    )
    call = f"mma({shape}, d, a, b, c, {i.site});"
    return f"{{ {inputs} u32 d[{counts[0]}]; {call} {i.write_all(vectors[0], 'b32', 'd')} }}"


# ---- wgmma ---------------------------------------------------------------------------------------


def wgmma(i: Instruction) -> str:
    kind = i.one_of(("mma_async", "fence", "commit_group", "wait_group"))
    i.one_of(("sync",))
    i.one_of(("aligned",))
    if kind == "fence":
        return f"wgmma_fence({i.site});"
    if kind == "commit_group":
        return "wgmma_commit();"
    if kind == "wait_group":
        return f"wgmma_wait({i.read(0, 'u32')});"
    return _wgmma(i)


def _constant(operand: Operand) -> int:
    if not isinstance(operand, Integer):
        raise Unsupported("a modifier that is not a constant")
    return operand.value


def _wgmma(i: Instruction) -> str:
    """wgmma.mma_async d, a, b-desc, scale-d{, scale-a, scale-b{, trans-a, trans-b}}"""
    b, a = _take_element(i, _INPUTS), _take_element(i, _INPUTS)
    d = _take_element(i, _ACCUMULATORS)
    m, n, k = _shape(i)
    if m != 64 or k * _BITS[a] != 256 or n % 8 or not 8 <= n <= 256:
        raise Unsupported("this shape")
    targets = i.vector(0)
    if len(targets) != n // (2 if d != "f16" else 4):
        raise Unsupported(f"{len(targets)} accumulators")
    a_operand = i.operand(1)
    a_registers = isinstance(a_operand, Vector)
    signs, transposed = [1, 1], [False, False]
    if a not in ("s8", "u8"):
        signs = [_constant(i.operand(4)), _constant(i.operand(5))]
    if a in ("f16", "bf16"):  # a fragment in registers has one layout only
        flags = [bool(_constant(i.operand(6)))]
        flags += [bool(_constant(i.operand(7)))] if not a_registers else []
        transposed = [False, *flags] if a_registers else flags
    fields = [str(n), *(f"Element::{_ELEMENTS[type]}" for type in (a, b, d))]
    fields += [str(flag).lower() for flag in transposed] + [str(sign) for sign in signs]
    code = f"u32 d[] = {i.array(targets, 'b32')}; "
    if isinstance(a_operand, Vector):
        code += f"const u32 a[] = {i.array(a_operand.items, 'b32')}; "
        source = "a, 0"
    else:
        source = f"nullptr, {i.read(1, 'b64')}"
    accumulate = i.read(3, "pred")
    code += f"wgmma({{{', '.join(fields)}}}, d, {source}, {i.read(2, 'b64')}, {accumulate}"
    return f"{{ {code}, {i.site}); {i.write_all(targets, 'b32', 'd')} }}"


EMITTERS: dict[str, Emitter] = {
    "ldmatrix": ldmatrix,
    "stmatrix": stmatrix,
    "mma": mma,
    "wgmma": wgmma,
}
