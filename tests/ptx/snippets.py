"""One-instruction PTX snippets run over arrays of edge values, many snippets in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.assembly import Array, Program

ROWS = 448  # threads of the one block; each computes one row of every snippet
_DTYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
_DTYPES |= {f"u{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)}
_DTYPES |= {f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)}
_BITS = {"f16": 16, "bf16": 16, "e4m3x2": 16, "e5m2x2": 16, "pred": 32}
_BITS |= {"f16x2": 32, "bf16x2": 32, "f32x2": 64}


def bits_of(type: str) -> int:
    return _BITS.get(type) or int(type.lstrip("bfsu"))


def dtype_of(type: str) -> np.dtype[Any]:
    """f16, bf16 and packed types travel as their bits."""
    return _DTYPES.get(type) or np.dtype(f"uint{bits_of(type)}")


@dataclass(frozen=True)
class Snippet:
    """`text` reads the registers a, b, c and writes d; `reference` says what d is, row by row."""

    text: str
    result: str
    inputs: tuple[str, ...]
    reference: Callable[..., object]
    relative: float = 0.0  # error that is allowed; 0: every bit is compared


# ---- values --------------------------------------------------------------------------------------

_F32_EDGES = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754942e-38]
_F32_EDGES += [1.17549435e-38, -1.17549435e-38, 3.4028235e38, -3.4028235e38, 0.5, -0.5, 1.5, 2.5]
_F32_EDGES += [0.99999994, 1.0000001, 2.0**31, -(2.0**31), 2147483520.0, 2.0**32, 4294967040.0]
_F32_EDGES += [2.0**63, -(2.0**63), 2.0**64, 65504.0, 65519.996, 65520.0, 127.5, -128.5, 255.5]
_F32_EDGES += [448.0, 464.0, 57344.0, 61440.0, 1.00390625, 1.01171875, 5.9604645e-08, 2.9802322e-08]


def _floats(type: str, count: int, generator: np.random.Generator) -> tuple[Array, Array]:
    dtype, word = (np.float32, np.uint32) if type == "f32" else (np.float64, np.uint64)
    edges = np.array(_F32_EDGES, dtype)
    anything = generator.integers(0, 2 ** bits_of(type), count, word, endpoint=False).view(dtype)
    usual = generator.standard_normal(count).astype(dtype)
    return edges, np.where(generator.random(count) < 0.5, anything, usual)


def _integers(type: str, count: int, generator: np.random.Generator) -> tuple[Array, Array]:
    dtype, bits = dtype_of(type), bits_of(type)
    unsigned = np.dtype(f"uint{dtype.itemsize * 8}")
    top = 1 << (bits - 1)
    edges = [
        0,
        1,
        2,
        3,
        7,
        8,
        31,
        32,
        33,
        63,
        64,
        127,
        128,
        255,
        top - 1,
        top,
        top + 1,
        2 * top - 1,
    ]
    edges += [2 * top - 2, 0x5410, 0x89ABCDEF, 0x12345678]
    if type in ("f16", "bf16", "f16x2", "bf16x2", "e4m3x2", "e5m2x2"):
        edges += [0x3C00, 0x3C01, 0xBC00, 0x7C00, 0x7C01, 0xFC00, 0x03FF, 0x0400, 0x7BFF, 0x8000]
        edges += [0x3F80, 0x7F80, 0xFF80, 0x7F7F, 0x007F, 0x0080, 0x8001, 0x3555, 0x7E, 0x7F7F]
        edges += [0x7C000001, 0x80003C00, 0x3F803C01, 0x00017E00]
    values = np.array([edge % (1 << bits) for edge in edges], np.uint64).astype(unsigned)
    random = generator.integers(0, 1 << bits, count, unsigned, endpoint=False)
    return values.view(dtype), random.view(dtype)


def rows_of(types: Sequence[str], count: int = ROWS, seed: int = 0) -> list[Array]:
    """A column for each type: pairs of edge values first, then edges among random values."""
    generator = np.random.default_rng([seed, *"".join(types).encode()])
    columns = []
    for type in types:
        if type == "pred":
            columns.append(generator.integers(0, 2, count, np.uint32))
            continue
        make = _floats if type in ("f32", "f64") else _integers
        edges, random = make(type, count, generator)
        chosen = generator.choice(edges, count)
        columns.append(np.where(generator.random(count) < 0.6, chosen, random).astype(edges.dtype))
        columns[-1][: len(edges)] = generator.permutation(edges)[:count]
    return columns


# ---- running -------------------------------------------------------------------------------------


def _register(type: str) -> str:
    if type in ("f32", "f64", "pred"):
        return type
    return f"b{max(16, bits_of(type))}"


def _load(name: str, type: str, offset: int) -> str:
    if type == "pred":
        return f"ld.global.u32 word, [%rd1+{offset}]; setp.ne.u32 {name}, word, 0;"
    return f"ld.global.b{bits_of(type)} {name}, [%rd1+{offset}];"


def _code(snippet: Snippet, offsets: Sequence[int], result: int) -> str:
    names = "abcefg"[: len(snippet.inputs)]
    lines = ["{ .reg .b32 word;"]
    lines += [f".reg .{_register(t)} {n};" for n, t in zip(names, snippet.inputs, strict=True)]
    lines += [f".reg .{_register(snippet.result)} d;"]
    lines += [_load(n, t, o) for n, t, o in zip(names, snippet.inputs, offsets, strict=True)]
    lines.append(snippet.text)
    if snippet.result == "pred":
        lines.append(f"selp.u32 word, 1, 0, d; st.global.b32 [%rd2+{result}], word;")
    else:
        lines.append(f"st.global.b{bits_of(snippet.result)} [%rd2+{result}], d;")
    return "\n".join([*lines, "}"])


def _kernel(snippets: Sequence[Snippet], offsets: Sequence[Sequence[int]]) -> str:
    body = "\n".join(
        _code(snippet, offsets[number], number * ROWS * 8)
        for number, snippet in enumerate(snippets)
    )
    return (
        ".visible .entry snippets(.param .u64 inputs, .param .u64 outputs)\n{\n"
        ".reg .b32 %r<9>; .reg .b64 %rd<9>;\n"
        "ld.param.u64 %rd1, [inputs]; ld.param.u64 %rd2, [outputs];\n"
        "mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 8;\n"
        f"add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3;\n{body}\nret;\n}}\n"
    )


def run(snippets: Sequence[Snippet]) -> None:
    """Runs them all and compares with their references; the message names what differs where."""
    columns: dict[tuple[tuple[str, ...], int], tuple[int, Array]] = {}
    offsets = []
    for snippet in snippets:
        for number, column in enumerate(rows_of(snippet.inputs)):
            columns.setdefault((snippet.inputs, number), (len(columns) * ROWS * 8, column))
        offsets.append([columns[snippet.inputs, n][0] for n in range(len(snippet.inputs))])
    inputs = np.zeros((max(1, len(columns)), ROWS, 8), np.uint8)
    for offset, column in columns.values():
        inputs[offset // (ROWS * 8), :, : column.itemsize] = column.view(np.uint8).reshape(ROWS, -1)
    outputs = np.zeros((len(snippets), ROWS, 8), np.uint8)
    launch = Program(_kernel(snippets, offsets)).run("snippets", inputs, outputs, threads=ROWS)
    assert not launch.reports, "\n".join(map(str, launch.reports))
    problems = []
    for number, snippet in enumerate(snippets):
        arguments = [columns[snippet.inputs, n][1] for n in range(len(snippet.inputs))]
        problems += list(_differences(snippet, arguments, outputs[number]))
    assert not problems, f"{len(problems)} snippets differ:\n" + "\n".join(problems[:12])


def _differences(snippet: Snippet, arguments: list[Array], output: Array) -> Iterator[str]:
    dtype = dtype_of(snippet.result)
    got = np.ascontiguousarray(output[:, : dtype.itemsize]).view(dtype).reshape(-1)
    with np.errstate(all="ignore"):
        wanted = np.asarray(snippet.reference(*arguments)).astype(dtype)
    if dtype.kind == "f":
        word = np.dtype(f"uint{8 * dtype.itemsize}")
        equal = (got.view(word) == wanted.view(word)) | (np.isnan(got) & np.isnan(wanted))
        if snippet.relative:
            with np.errstate(all="ignore"):
                equal |= np.abs(got - wanted) <= snippet.relative * np.abs(wanted)
    else:
        equal = got == wanted
    if not equal.all():
        row = int(np.argmin(equal))
        values = ", ".join(f"{a[row]!r}" for a in arguments)
        yield (
            f"{snippet.text}  of ({values}) is {got[row]!r}, expected {wanted[row]!r}"
            f" ({int((~equal).sum())} rows)"
        )
