"""mov, logic, shifts, and everything that moves bits about."""

from __future__ import annotations

from ptx.instructions.base import Emitter, Instruction, bits_type, c_type, width
from ptx.operands import Register, Symbol, Unsupported
from ptx.syntax import Integer, Name, Vector

_BITS = ("b16", "b32", "b64")


def mov(i: Instruction) -> str:
    """Also packs {lo, hi} into one register and takes one apart."""
    type = i.type()
    source, target = i.operand(1), i.operand(0)
    if isinstance(target, Vector):
        part = f"b{width(type) // len(target.items)}"
        value = c_type(bits_type(type))
        writes = " ".join(
            i.names.write(item, part, f"{c_type(part)}(value >> {number * width(part)})")
            for number, item in enumerate(target.items)
        )
        return f"{{ const {value} value = {i.names.read(source, bits_type(type))}; {writes} }}"
    if isinstance(source, Vector):
        part = f"b{width(type) // len(source.items)}"
        whole = c_type(bits_type(type))
        parts = (
            f"{whole}({i.names.read(item, part)}) << {number * width(part)}"
            for number, item in enumerate(source.items)
        )
        return i.write(f"{whole}({' | '.join(parts)})", bits_type(type))
    # a plain move keeps the bits, whatever the type says
    kept = "pred" if type == "pred" else bits_type(type)
    if isinstance(source, Name):
        found = i.names.find(source.text)
        destination = i.names.find(target.text) if isinstance(target, Name) else None
        if isinstance(found, Register) and isinstance(destination, Register):
            if found.storage == destination.storage:
                return f"{destination.cpp} = {found.cpp};"
        elif isinstance(found, Symbol) and type[0] == "f":
            raise Unsupported("the address of a variable as a floating-point number")
    elif type in ("f32", "f64"):
        kept = type
    return i.write(i.names.read(source, kept), kept)


# ---- logic ---------------------------------------------------------------------------------------


def _logic(symbol: str, of_predicates: str) -> Emitter:
    def emit(i: Instruction) -> str:
        type = i.type(("pred", *_BITS))
        a, b = i.read(1, type), i.read(2, type)
        value = f"{a} {of_predicates if type == 'pred' else symbol} {b}"
        return i.write(f"u16({value})" if type == "b16" else value, type)

    return emit


def not_(i: Instruction) -> str:
    type = i.type(("pred", *_BITS))
    value = i.read(1, type)
    return i.write(f"!{value}" if type == "pred" else f"{c_type(type)}(~{value})", type)


def cnot(i: Instruction) -> str:
    type = i.type(_BITS)
    return i.write(f"{c_type(type)}({i.read(1, type)} == 0)", type)


def lop3(i: Instruction) -> str:
    """lop3{.BoolOp}.b32 d{|p}, a, b, c, table{, q}; p says d != 0 BoolOp q."""
    i.type(("b32",))
    table = i.operand(4)
    if not isinstance(table, Integer):
        raise Unsupported("a table that is not a constant")
    value = f"lop3<{table.value}>({', '.join(i.read(n, 'b32') for n in (1, 2, 3))})"
    boolean = i.one_of(("and", "or"), "")
    if not boolean:
        return i.write(value, "b32")
    target, predicate = i.pair(0)
    if predicate is None:
        raise Unsupported("no predicate")
    test = f"value != 0 {'&&' if boolean == 'and' else '||'} {i.read(5, 'pred')}"
    writes = i.names.write(target, "b32", "value") + " " + i.names.write(predicate, "pred", "test")
    return f"{{ const u32 value = {value}; const bool test = {test}; {writes} }}"


# ---- shifts --------------------------------------------------------------------------------------


def shl(i: Instruction) -> str:
    type = i.type(_BITS)
    return i.write(f"shift_left<{c_type(type)}>({i.read(1, type)}, {i.read(2, 'u32')})", type)


def shr(i: Instruction) -> str:
    type = i.type((*_BITS, "u16", "s16", "u32", "s32", "u64", "s64"))
    return i.write(f"shift_right<{c_type(type)}>({i.read(1, type)}, {i.read(2, 'u32')})", type)


def shf(i: Instruction) -> str:
    """The upper (.l) or lower (.r) half of {b, a} shifted by c."""
    i.type(("b32",))
    side = i.one_of(("l", "r"))
    mode = i.one_of(("wrap", "clamp"))
    name = "funnel_left" if side == "l" else "funnel_right"
    return i.write(f"{name}({_three(i)}, {str(mode == 'wrap').lower()})", "b32")


def _three(i: Instruction) -> str:
    return ", ".join(i.read(n, "u32") for n in (1, 2, 3))


# ---- fields and counts ---------------------------------------------------------------------------


def bfe(i: Instruction) -> str:
    type = i.type(("u32", "s32", "u64", "s64"))
    arguments = f"{i.read(1, type)}, {i.read(2, 'u32')}, {i.read(3, 'u32')}"
    return i.write(f"bit_field<{c_type(type)}>({arguments})", type)


def bfi(i: Instruction) -> str:
    type = i.type(("b32", "b64"))
    arguments = f"{i.read(1, type)}, {i.read(2, type)}, {i.read(3, 'u32')}, {i.read(4, 'u32')}"
    return i.write(f"insert_bits<{c_type(type)}>({arguments})", type)


def bfind(i: Instruction) -> str:
    type = i.type(("u32", "s32", "u64", "s64"))
    shift = str(i.take("shiftamt")).lower()
    return i.write(f"highest_bit<{c_type(type)}>({i.read(1, type)}, {shift})", "u32")


def popc(i: Instruction) -> str:
    type = i.type(("b32", "b64"))
    return i.write(f"u32(__builtin_popcountll({i.read(1, type)}))", "u32")


def clz(i: Instruction) -> str:
    type = i.type(("b32", "b64"))
    return i.write(f"leading_zeros<{c_type(type)}>({i.read(1, type)})", "u32")


def brev(i: Instruction) -> str:
    type = i.type(("b32", "b64"))
    return i.write(f"reverse_bits<{c_type(type)}>({i.read(1, type)})", type)


def bmsk(i: Instruction) -> str:
    i.type(("b32",))
    wrap = str(i.one_of(("wrap", "clamp")) == "wrap").lower()
    return i.write(f"bit_mask({i.read(1, 'u32')}, {i.read(2, 'u32')}, {wrap})", "b32")


def szext(i: Instruction) -> str:
    type = i.type(("u32", "s32"))
    wrap = str(i.one_of(("wrap", "clamp")) == "wrap").lower()
    value = f"extend_from<{c_type(type)}>({i.read(1, type)}, {i.read(2, 'u32')}, {wrap})"
    return i.write(value, type)


def fns(i: Instruction) -> str:
    i.type(("b32",))
    value = f"nth_set_bit({i.read(1, 'u32')}, {i.read(2, 'u32')}, {i.read(3, 's32')})"
    return i.write(value, "b32")


_PERMUTE_MODES = ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")


def prmt(i: Instruction) -> str:
    mode = ""
    if i.words[-1] in _PERMUTE_MODES:  # prmt.b32.f4e
        mode = i.words.pop()
    i.type(("b32",))
    if not mode:
        return i.write(f"permute({_three(i)})", "b32")
    return i.write(f"permute_{mode}({_three(i)})", "b32")


EMITTERS: dict[str, Emitter] = {
    "mov": mov,
    "and": _logic("&", "&&"),
    "or": _logic("|", "||"),
    "xor": _logic("^", "!="),
    "not": not_,
    "cnot": cnot,
    "lop3": lop3,
    "shl": shl,
    "shr": shr,
    "shf": shf,
    "bfe": bfe,
    "bfi": bfi,
    "bfind": bfind,
    "popc": popc,
    "clz": clz,
    "brev": brev,
    "bmsk": bmsk,
    "szext": szext,
    "fns": fns,
    "prmt": prmt,
}
