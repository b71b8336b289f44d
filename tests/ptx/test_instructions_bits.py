"""Logic, shifts and bit fields of PTX on edge values, against their definitions in the ISA."""

from __future__ import annotations

from collections.abc import Callable

from tests.ptx.snippets import Snippet, bits_of, run
from tests.ptx.test_instructions_integer import each, of_type, wrapped


def mixed(text: str, result: str, inputs: tuple[str, ...], function: Callable[..., int]) -> Snippet:
    return Snippet(text, result, inputs, each(function, result))


def test_lop3_has_all_256_tables() -> None:
    def by_table(table: int) -> Callable[[int, int, int], int]:
        def reference(a: int, b: int, c: int) -> int:
            result = 0
            for index in range(8):
                if table >> index & 1:
                    result |= (
                        (a if index & 4 else ~a)
                        & (b if index & 2 else ~b)
                        & (c if index & 1 else ~c)
                    )
            return result

        return reference

    run([of_type(f"lop3.b32 d, a, b, c, {t};", "u32", by_table(t), 3) for t in range(256)])


def test_logic() -> None:
    snippets = []
    for t in ("u16", "u32", "u64"):
        b = f"b{bits_of(t)}"
        snippets += [
            of_type(f"and.{b} d, a, b;", t, lambda a, b: a & b),
            of_type(f"or.{b} d, a, b;", t, lambda a, b: a | b),
            of_type(f"xor.{b} d, a, b;", t, lambda a, b: a ^ b),
            of_type(f"not.{b} d, a;", t, lambda a: ~a, 1),
            of_type(f"cnot.{b} d, a;", t, lambda a: int(a == 0), 1),
        ]
    both = "{ .reg .pred p, q; setp.ne.u32 p, a, 0; setp.ne.u32 q, b, 0; "
    run(
        [
            *snippets,
            mixed(both + "and.pred d, p, q; }", "pred", ("u32",) * 2, lambda a, b: bool(a and b)),
            mixed(
                both + "xor.pred d, p, q; }", "pred", ("u32",) * 2, lambda a, b: (a > 0) ^ (b > 0)
            ),
            mixed(
                both + "or.pred p, p, !q; not.pred d, p; }",
                "pred",
                ("u32",) * 2,
                lambda a, b: not (a or not b),
            ),
            mixed(
                "lop3.or.b32 word|d, a, b, c, 128, 0;",
                "pred",
                ("u32",) * 3,
                lambda a, b, c: bool(a & b & c),
            ),
        ]
    )


def test_shifts_may_exceed_the_width() -> None:
    snippets = []
    for t in ("u16", "s16", "u32", "s32", "u64", "s64"):
        width = bits_of(t)
        count = (t, "u32")

        def right(a: int, n: int) -> int:
            return a >> min(n, 64)  # Python's integers keep the sign

        snippets.append(mixed(f"shr.{t} d, a, b;", t, count, right))
        if t[0] == "u":
            snippets.append(mixed(f"shl.b{width} d, a, b;", t, count, lambda a, n: a << min(n, 64)))
    run(snippets)


def test_funnel_shifts() -> None:
    def left(wrap: bool) -> Callable[[int, int, int], int]:
        return lambda a, b, n: ((b << 32 | a) << (n & 31 if wrap else min(n, 32))) >> 32

    def right(wrap: bool) -> Callable[[int, int, int], int]:
        return lambda a, b, n: (b << 32 | a) >> (n & 31 if wrap else min(n, 32))

    run(
        [
            of_type(f"shf.{side[0]}.{mode}.b32 d, a, b, c;", "u32", f(mode == "wrap"), 3)
            for side, f in (("left", left), ("right", right))
            for mode in ("wrap", "clamp")
        ]
    )


def bfe(type: str) -> Callable[[int, int, int], int]:
    """The ISA's loop."""
    top = bits_of(type) - 1

    def reference(a: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        a &= (1 << top + 1) - 1
        sign = type[0] == "s" and length and a >> min(start + length - 1, top) & 1
        result = 0
        for i in range(top + 1):
            bit = a >> (start + i) & 1 if i < length and start + i <= top else sign
            result |= int(bit) << i
        return result

    return reference


def bfi(bits: int) -> Callable[[int, int, int, int], int]:
    def reference(a: int, b: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        for i in range(length):
            if start + i < bits:
                b = b & ~(1 << start + i) | (a >> i & 1) << start + i
        return b

    return reference


def test_bit_fields() -> None:
    snippets = [
        mixed(f"bfe.{t} d, a, b, c;", t, (t, "u32", "u32"), bfe(t))
        for t in ("u32", "s32", "u64", "s64")
    ]
    # positions and lengths that lie inside, which random ones seldom do
    near = "{{ .reg .b32 p, n; and.b32 p, b, 31; and.b32 n, c, 31; {} }}"

    def masked(function: Callable[..., int]) -> Callable[..., int]:
        return lambda *v: function(*v[:-2], v[-2] & 31, v[-1] & 31)

    for t in ("u32", "s32", "u64", "s64"):
        text = near.format(f"bfe.{t} d, a, p, n;")
        snippets.append(mixed(text, t, (t, "u32", "u32"), masked(bfe(t))))
    for t in ("u32", "u64"):
        width = bits_of(t)
        inputs = (t, t, "u32", "u32")
        snippets.append(mixed(f"bfi.b{width} d, a, b, c, e;", t, inputs, bfi(width)))
        text = "{ .reg .b32 p, n; and.b32 p, c, 31; and.b32 n, e, 31; "
        text += f"bfi.b{width} d, a, b, p, n; }}"
        snippets.append(mixed(text, t, inputs, masked(bfi(width))))
    run(snippets)


def test_counts() -> None:
    def bfind(type: str, distance: bool) -> Callable[[int], int]:
        def reference(a: int) -> int:
            highest = (~a if a < 0 else a).bit_length() - 1
            if highest < 0:
                return -1
            return bits_of(type) - 1 - highest if distance else highest

        return reference

    snippets = [
        Snippet(f"bfind{'.shiftamt' * d}.{t} d, a;", "u32", (t,), each(bfind(t, d), "u32"))
        for t in ("u32", "s32", "u64", "s64")
        for d in (False, True)
    ]
    for t in ("u32", "u64"):
        n = bits_of(t)
        snippets += [
            mixed(f"popc.b{n} d, a;", "u32", (t,), lambda a: a.bit_count()),
            mixed(f"clz.b{n} d, a;", "u32", (t,), lambda a, n=n: n - a.bit_length()),
            mixed(f"brev.b{n} d, a;", t, (t,), lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2)),
        ]
    run(snippets)


def test_masks_and_extensions() -> None:
    def bmsk(start: int, length: int) -> int:
        return (1 << min(length, 32)) - 1 << start if start < 32 else 0

    def szext(type: str, wrap: bool) -> Callable[[int, int], int]:
        def reference(a: int, n: int) -> int:
            n = n & 31 if wrap else n
            if n >= 32:
                return a
            return wrapped(f"{type[0]}{n}", a) if n else 0

        return reference

    snippets = [
        of_type("bmsk.clamp.b32 d, a, b;", "u32", bmsk),
        of_type("bmsk.wrap.b32 d, a, b;", "u32", lambda a, b: bmsk(a & 31, b & 31)),
    ]
    for t in ("u32", "s32"):
        for mode in ("wrap", "clamp"):
            reference = szext(t, mode == "wrap")
            snippets.append(mixed(f"szext.{mode}.{t} d, a, b;", t, (t, "u32"), reference))
    run(snippets)


def test_find_nth_set() -> None:
    def fns(mask: int, base: int, n: int) -> int:
        base, n = base & 31, n % 9 - 4
        bits = [i for i in range(32) if mask >> i & 1]
        if n == 0:
            return base if base in bits else -1
        found = [i for i in bits if i >= base] if n > 0 else [i for i in bits if i <= base][::-1]
        return found[abs(n) - 1] if len(found) >= abs(n) else -1

    text = "{ .reg .b32 p, n; and.b32 p, b, 31; rem.u32 n, c, 9; sub.s32 n, n, 4;"
    run([of_type(text + " fns.b32 d, a, p, n; }", "u32", fns, 3)])


def byte(a: int, b: int, index: int) -> int:
    return (b << 32 | a) >> 8 * index & 255


def prmt(a: int, b: int, selectors: int) -> int:
    result = 0
    for i in range(4):
        selector = selectors >> 4 * i & 15
        value = byte(a, b, selector & 7)
        if selector & 8:
            value = 255 if value & 128 else 0
        result |= value << 8 * i
    return result


def test_permutations() -> None:
    """The ISA's table of modes: the selected bytes, highest first, for c & 3 = 0, 1, 2, 3."""
    modes = {
        "f4e": ((3, 2, 1, 0), (4, 3, 2, 1), (5, 4, 3, 2), (6, 5, 4, 3)),
        "b4e": ((5, 6, 7, 0), (6, 7, 0, 1), (7, 0, 1, 2), (0, 1, 2, 3)),
        "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
        "ecl": ((3, 2, 1, 0), (3, 2, 1, 1), (3, 2, 2, 2), (3, 3, 3, 3)),
        "ecr": ((0, 0, 0, 0), (1, 1, 1, 0), (2, 2, 1, 0), (3, 2, 1, 0)),
        "rc16": ((1, 0, 1, 0), (3, 2, 3, 2), (1, 0, 1, 0), (3, 2, 3, 2)),
    }

    def by_mode(rows: tuple[tuple[int, ...], ...]) -> Callable[[int, int, int], int]:
        return lambda a, b, c: int.from_bytes(bytes(byte(a, b, i) for i in rows[c & 3]), "big")

    snippets = [of_type("prmt.b32 d, a, b, c;", "u32", prmt, 3)]
    snippets += [
        of_type(f"prmt.b32.{mode} d, a, b, c;", "u32", by_mode(rows), 3)
        for mode, rows in modes.items()
    ]
    run(snippets)


def test_packing() -> None:
    run(
        [
            mixed("mov.b32 d, {a, b};", "u32", ("u16", "u16"), lambda a, b: b << 16 | a),
            mixed("mov.b64 d, {a, b};", "u64", ("u32", "u32"), lambda a, b: b << 32 | a),
            mixed(
                "mov.b64 d, {a, b, c, e};",
                "u64",
                ("u16",) * 4,
                lambda a, b, c, e: e << 48 | c << 32 | b << 16 | a,
            ),
            mixed(
                "{ .reg .b16 x, y; mov.b32 {x, y}, a; mov.b32 d, {y, x}; }",
                "u32",
                ("u32",),
                lambda a: a >> 16 | a << 16,
            ),
            mixed(
                "{ .reg .b32 y; mov.b64 {_, y}, a; mov.b32 d, y; }",
                "u32",
                ("u64",),
                lambda a: a >> 32,
            ),
            mixed(
                "selp.b32 d, a, b, c;", "u32", ("u32", "u32", "pred"), lambda a, b, c: a if c else b
            ),
            mixed(
                "slct.u32.s32 d, a, b, c;",
                "u32",
                ("u32", "u32", "s32"),
                lambda a, b, c: a if c >= 0 else b,
            ),
        ]
    )
