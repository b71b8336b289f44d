"""cvt between every pair of types, cvt.pack and the 8-bit floating-point formats."""

from __future__ import annotations

from ptx.instructions.base import Emitter, Instruction, c_type, width
from ptx.instructions.narrow import FORMATS
from ptx.operands import Unsupported

_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_FLOATS = ("f16", "bf16", "f32", "f64")
_PRECISION = {"bf16": 8, "f16": 11, "f32": 24, "f64": 53}
_ROUNDINGS = {"rn": "kNearest", "rz": "kZero", "rm": "kDown", "rp": "kUp", "rna": "kAway"}
_TO_INTEGRAL = {"rni": "kNearest", "rzi": "kZero", "rmi": "kDown", "rpi": "kUp"}
_PAIRS = {"f16x2": "Half", "bf16x2": "Brain", "e4m3x2": "E4m3", "e5m2x2": "E5m2"}


def cvt(i: Instruction) -> str:
    if i.take("pack"):
        return _pack(i)
    if any(word in _PAIRS for word in i.words):
        return _pair(i)
    if "tf32" in i.words:
        return _tf32(i)
    source = i.type((*_INTEGERS, *_FLOATS))
    target = i.type((*_INTEGERS, *_FLOATS))
    if source in _INTEGERS and target in _INTEGERS:
        return _integer_to_integer(i, target, source)
    if source in _INTEGERS:
        return _integer_to_float(i, target, source)
    if target in _INTEGERS:
        return _float_to_integer(i, target, source)
    return _float_to_float(i, target, source)


# ---- one value -----------------------------------------------------------------------------------


def _integer_to_integer(i: Instruction, target: str, source: str) -> str:
    value = i.read(1, source)
    if i.take("sat"):
        return i.write(f"clamp_to<{target}>({value})", target)
    return i.write(f"{target}({value})", target)


def _store_float(i: Instruction, type: str, value: str) -> str:
    """Writes an f16 or bf16 as bits, f32 and f64 as such."""
    return i.write(value, "b16" if type in FORMATS else type)


def _integer_to_float(i: Instruction, target: str, source: str) -> str:
    rounding = _ROUNDINGS[i.one_of(("rn", "rz", "rm", "rp"))]
    saturates = i.take("sat")
    if i.take("ftz") and target != "f32":
        raise Unsupported(f".ftz of {target}")
    value = i.read(1, source)
    if target in FORMATS:
        format = FORMATS[target]
        result = f"round_to<{format}>(to_odd_f64({value}), Rounding::{rounding})"
        return _store_float(i, target, f"saturate16<{format}>({result})" if saturates else result)
    result = f"{target}({value})"
    if rounding != "kNearest":
        result = f"directed_convert<Rounding::{rounding}, {target}>({value})"
    return i.write(f"saturate_unit({result})" if saturates else result, target)


def _read_float(i: Instruction, type: str) -> str:
    if type in FORMATS:
        return f"widen<{FORMATS[type]}>({i.read(1, 'b16')})"
    return i.read(1, type)


def _float_to_integer(i: Instruction, target: str, source: str) -> str:
    rounding = _TO_INTEGRAL[i.one_of(_TO_INTEGRAL)]
    i.take("sat")  # the result is clamped in any case
    value = _read_float(i, source)
    if i.take("ftz"):
        if source != "f32":
            raise Unsupported(f".ftz of {source}")
        value = f"flush({value})"
    # NaN becomes 0, but where f64 or 64 bits are involved the top bit
    nan = f"{c_type(target)}(1ull << {width(target) - 1})"
    if source != "f64" and width(target) != 64:
        nan = "0"
    call = f"to_integer<{c_type(target)}>(to_integral<Rounding::{rounding}>(f64({value})), {nan})"
    return i.write(call, target)


def _float_to_float(i: Instruction, target: str, source: str) -> str:
    integral = i.one_of(_TO_INTEGRAL, "")
    rounding = i.one_of(("rn", "rz", "rm", "rp"), "")
    narrows = _PRECISION[target] < _PRECISION[source] or {source, target} == set(FORMATS)
    if narrows != bool(rounding) or (integral and target != source):
        raise Unsupported("this rounding")
    flush, saturates = i.take("ftz"), i.take("sat")
    relu, finite = i.take("relu"), i.take("satfinite")
    if flush and "f32" not in (source, target):
        raise Unsupported(".ftz")
    if (relu or finite) and (source != "f32" or target not in FORMATS):
        raise Unsupported(".relu or .satfinite")
    value = _read_float(i, source)
    if flush and source == "f32":
        value = f"flush({value})"
    if integral:
        calculation = "f32" if source in FORMATS else source
        value = f"{calculation}(to_integral<Rounding::{_TO_INTEGRAL[integral]}>({value}))"
    if target in FORMATS:
        format = FORMATS[target]
        if rounding:
            mode = f", Rounding::{_ROUNDINGS[rounding]}" if rounding != "rn" else ""
            value = f"round_to<{format}>({value}{mode})"
        else:
            value = f"round_to<{format}>({value})"
        if finite:
            value = f"finite16<{format}>({value})"
        if saturates:
            value = f"saturate16<{format}>({value})"
        return i.write(f"relu16<{format}>({value})" if relu else value, "b16")
    if rounding in ("", "rn"):
        value = value if target == source else f"{target}({value})"
    else:
        value = f"directed_convert<Rounding::{_ROUNDINGS[rounding]}, {target}>({value})"
    if flush and target == "f32":
        value = f"flush({value})"
    return i.write(f"saturate_unit({value})" if saturates else value, target)


def _tf32(i: Instruction) -> str:
    """f32 with 10 bits of fraction; the lower 13 bits are zero."""
    i.type(("f32",))
    i.type(("tf32",))
    rounding = _ROUNDINGS[i.one_of(("rna", "rn", "rz"))]
    value = f"round_to_tf32({i.read(1, 'f32')}, Rounding::{rounding}"
    value += f", {str(i.take('satfinite')).lower()})"
    if i.take("relu"):
        value = f"bits(larger_or_nan(as_f32({value}), 0.0f))"
    return i.write(value, "b32")


# ---- two values ----------------------------------------------------------------------------------


def _pair(i: Instruction) -> str:
    """d = {a, b}, a in the upper half; or both halves of a."""
    source = i.type(("f32", "f16x2", "e4m3x2", "e5m2x2"))
    target = i.type(_PAIRS)
    format = _PAIRS[target]
    eight_bits = target in ("e4m3x2", "e5m2x2")
    if source in ("e4m3x2", "e5m2x2"):
        if target != "f16x2":
            raise Unsupported(f"{source} to {target}")
        i.one_of(("rn",))
        value = f"widen_pair<{_PAIRS[source]}>({i.read(1, 'b16')})"
        return i.write(f"relu_pair<Half>({value})" if i.take("relu") else value, "b32")
    if source == "f16x2" and not eight_bits:
        raise Unsupported(f"{source} to {target}")
    rounding = _ROUNDINGS[i.one_of(("rn",) if eight_bits else ("rn", "rz"))]
    finite = i.take("satfinite")
    if eight_bits and not finite:
        raise Unsupported(".satfinite is missing")
    relu = i.take("relu")
    if source == "f16x2":
        packed = i.read(1, "b32")
        high, low = f"widen<Half>(u16({packed} >> 16))", f"widen<Half>(u16({packed}))"
    else:
        high, low = i.read(1, "f32"), i.read(2, "f32")
    halves = []
    for value in (high, low):
        if eight_bits:
            value = f"larger_or_nan({value}, 0.0f)" if relu else value
            halves.append(f"round_to_8<{format}>({value})")
            continue
        mode = f", Rounding::{rounding}" if rounding != "kNearest" else ""
        value = f"round_to<{format}>({value}{mode})"
        value = f"finite16<{format}>({value})" if finite else value
        halves.append(f"relu16<{format}>({value})" if relu else value)
    if eight_bits:
        return i.write(f"u16({halves[0]} << 8 | {halves[1]})", "b16")
    return i.write(f"u32({halves[0]}) << 16 | {halves[1]}", "b32")


def _pack(i: Instruction) -> str:
    """cvt.pack.sat.type.s32{.b32} d, a, b{, c}: a above b, and c's low bits above both."""
    i.one_of(("sat",))
    takes_c = i.take("b32")
    narrow = i.words.pop(0) if i.words else ""
    kinds = {"u16": 16, "s16": 16, "u8": 8, "s8": 8, "u4": 4, "s4": 4, "u2": 2, "s2": 2}
    if narrow not in kinds:
        raise Unsupported(f"packing into {narrow}")
    i.type(("s32",))
    bits = kinds[narrow]
    mask = (1 << bits) - 1
    high = mask >> 1 if narrow[0] == "s" else mask
    low = high - mask
    a, b = (f"(saturate<u32>({i.read(n, 's32')}, {low}, {high}) & {mask}u)" for n in (1, 2))
    value = f"{a} << {bits} | {b}"
    if takes_c and bits < 16:
        value += f" | {i.read(3, 'b32')} << {2 * bits}"
    elif takes_c != (bits < 16):
        raise Unsupported("another number of operands than the type has")
    return i.write(value, "b32")


EMITTERS: dict[str, Emitter] = {"cvt": cvt}
