"""Single-instruction changes of a kernel's PTX: what the mutation test (mutate.py) tries out.

Each function below takes an instruction and yields what could stand in its place. They are bugs of
the kind that people write: a barrier forgotten, an address one element off, < for <=, a swap.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "kernels", "ptx", "tests")  # of this project's sources
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}  # bytes, by the number in a PTX type


@dataclass(frozen=True)
class Instruction:
    """`@%p1 ld.global.v4.b32 {…}, [%rd1];`: predicate "@%p1", opcode, and operands as written."""

    predicate: str
    opcode: str
    operands: str

    def __str__(self) -> str:
        return f"\t{self.predicate} {self.opcode} \t{self.operands};".replace("\t ", "\t")

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def having(self, opcode: str | None = None, operands: str | None = None) -> str:
        changed = Instruction(self.predicate, opcode or self.opcode, operands or self.operands)
        return str(changed)


@dataclass(frozen=True)
class Mutant:
    kind: str
    line: int  # of the PTX, from 1
    was: str
    becomes: str
    where: str  # "cuda_forward.cuh:88"
    source: str  # that line's text
    code: str  # the instruction without numbers of registers, after what sets its predicate
    within: tuple[str, ...]  # the texts of the lines that call the function of `source`

    def applied(self, ptx: str) -> str:
        lines = ptx.split("\n")
        lines[self.line - 1] = self.becomes
        return "\n".join(lines)

    def __str__(self) -> str:
        becomes = self.becomes.strip() or "nothing"
        return f"{self.kind}: {self.where} `{self.source}`: {self.was.strip()} -> {becomes}"


Change = tuple[str, str]  # the kind of mutant, the line that replaces the instruction's
Mutator = Callable[[Instruction], Iterator[Change]]


def _barriers(i: Instruction) -> Iterator[Change]:
    if re.match(r"(bar|barrier)\.(cta\.)?(sync|warp\.sync)", i.opcode):
        yield "drop barrier", ""


def _waits(i: Instruction) -> Iterator[Change]:
    if re.match(r"(cp\.async\.wait|cp\.async\.bulk\.wait|wgmma\.wait)", i.opcode):
        yield "drop wait", ""
        if i.operands.strip().isdecimal():
            yield "loosen wait", i.having(operands=str(int(i.operands) + 1))


def _is_access(i: Instruction, *opcodes: str) -> bool:
    return i.parts[0] in opcodes and i.parts[1] in ("global", "shared")


def _addresses(i: Instruction) -> Iterator[Change]:
    if not _is_access(i, "ld", "st"):
        return
    size = SIZES[re.sub(r"\D", "", i.parts[-1])]
    vector = next((int(part[1:]) for part in i.parts if re.fullmatch(r"v\d", part)), 1)

    def shifted(by: int) -> str:
        def add(found: re.Match[str]) -> str:
            return f"[{found[1]}+{int(found[2] or 0) + by}]"

        return i.having(
            operands=re.sub(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", add, i.operands)
        )

    yield "address + element", shifted(size)
    if vector > 1:
        yield "address + vector", shifted(size * vector)


def _stores(i: Instruction) -> Iterator[Change]:
    if _is_access(i, "st"):
        yield f"drop st.{i.parts[1]}", ""


def _operands(i: Instruction) -> list[str]:
    """At the commas outside braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", i.operands)]


def _floats(i: Instruction) -> Iterator[Change]:
    if i.parts[-1] not in ("f32", "f64"):
        return
    name, operands = i.parts[0], _operands(i)
    if name in ("sub", "div") and operands[1] != operands[2]:
        swapped = [operands[0], operands[2], operands[1], *operands[3:]]
        yield "swap operands", i.having(operands=", ".join(swapped))
    if name == "fma":
        d, a, b, c = operands
        if a != c:
            yield "swap operands", i.having(operands=f"{d}, {c}, {b}, {a}")
        yield "fma to mul", i.having(i.opcode.replace("fma", "mul"), f"{d}, {a}, {b}")
    if name == "mul":
        yield "mul to add", i.having(i.opcode.replace("mul", "add"))
    if name == "add":
        yield "add to sub", i.having(i.opcode.replace("add", "sub"))
    if name == "sub":
        yield "sub to add", i.having(i.opcode.replace("sub", "add"))


def _bounds(i: Instruction) -> Iterator[Change]:
    other = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo"}
    other |= {"hi": "hs", "hs": "hi"}
    if i.parts[0] == "setp" and i.parts[1] in other and i.parts[-1][0] in "us":
        opcode = ".".join(["setp", other[i.parts[1]], *i.parts[2:]])
        yield "bound", i.having(opcode)


def _predicates(i: Instruction) -> Iterator[Change]:
    if not i.predicate:
        return
    if i.parts[0] == "bra":
        yield "branch always", str(Instruction("", i.opcode, i.operands))
        yield "branch never", ""
    else:
        yield "drop predicate", str(Instruction("", i.opcode, i.operands))


def _shuffles(i: Instruction) -> Iterator[Change]:
    if i.parts[0] != "shfl":
        return
    if "bfly" in i.parts:
        yield "shuffle down", i.having(i.opcode.replace("bfly", "down"))
    destination, value, lane, *rest = _operands(i)
    if lane.isdecimal():
        distance = str(int(lane) // 2 or 2)
        changed = ", ".join([destination, value, distance, *rest])
        yield "shuffle distance", i.having(operands=changed)


def _immediates(i: Instruction) -> Iterator[Change]:
    arithmetic = ("add", "sub", "mul", "mad", "fma", "div", "rem", "and", "or", "xor", "shl", "shr")
    if i.parts[0] not in (*arithmetic, "mov", "selp", "setp", "min", "max"):
        return
    operands = _operands(i)
    for at, operand in enumerate(operands[1:], 1):
        if re.fullmatch(r"-?\d+", operand):
            changed = str(int(operand) + 1)
        elif re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            changed = "0f40000000" if operand.upper() != "0F40000000" else "0f3F800000"
        else:
            continue
        yield (
            "constant",
            i.having(operands=", ".join([*operands[:at], changed, *operands[at + 1 :]])),
        )


MUTATORS: tuple[Mutator, ...] = (
    _barriers,
    _waits,
    _addresses,
    _stores,
    _floats,
    _bounds,
    _predicates,
    _shuffles,
    _immediates,
)


def parse(line: str) -> Instruction | None:
    """The one instruction that a line of PTX holds; None for labels, directives and blocks."""
    text = line.split("//")[0].strip()
    found = re.fullmatch(r"(@!?%\w+)?\s*([a-z][\w.:]*)\s*([^;]*);", text)
    return Instruction(found[1] or "", found[2], found[3].strip()) if found else None


def mutants(ptx: str) -> list[Mutant]:
    """Every mutant of the kernel, in the order of its instructions."""
    locations = _Locations(ptx)
    found = []
    inside = False
    setters: dict[str, str] = {}  # of each predicate register, the last instruction that sets it
    for number, line in enumerate(ptx.split("\n"), 1):
        locations.read(line)
        inside = inside or line.startswith("{")
        instruction = parse(line) if inside else None
        if instruction is None:
            continue
        where, source, *within = locations.here()
        code = _without_numbers(setters.get(instruction.predicate.strip("@!"), "") + line)
        for mutator in MUTATORS:
            for kind, becomes in mutator(instruction):
                found.append(
                    Mutant(kind, number, line, becomes, where, source, code, tuple(within))
                )
        for predicate in re.findall(r"^%p\d+|(?<=\|)%p\d+", instruction.operands):
            setters[predicate] = line
    return found


def _without_numbers(code: str) -> str:
    """`setp.lt.s32 %p, %r, %r; @%p bra $L;`: what stays the same when a compiler renumbers."""
    code = " ".join(code.split("//")[0].split())
    return re.sub(r"\$L\w+", "$L", re.sub(r"(%[a-z]+)\d+", r"\1", code))


class _Locations:
    """Follows .loc through a kernel: the lines of this project that an instruction comes from.

    nvcc says where a line was inlined by inlined_at, Triton by a comment `@[ file:line:column ]`.
    """

    _INLINED = re.compile(r"inlined_at (\d+) (\d+) (\d+)")
    _COMMENT = re.compile(r"([\w.]+):(\d+):\d+")

    def __init__(self, ptx: str) -> None:
        self._files = {
            number: Path(path) for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)
        }
        self._callers: dict[tuple[str, str, str], tuple[str, str, str]] = {}
        self._frames: list[tuple[Path, int]] = []  # the innermost first
        self._own: list[tuple[Path, int]] = []  # the last that were of this project

    def read(self, line: str) -> None:
        found = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)", line)
        if found is None or found[2] == "0":
            return
        at = found[1], found[2], found[3]
        if caller := self._INLINED.search(line):
            self._callers[at] = caller[1], caller[2], caller[3]
        elif at in self._callers:
            del self._callers[at]
        self._frames = []
        seen = set()
        while at not in seen:
            seen.add(at)
            self._frames.append((self._files[at[0]], int(at[1])))
            at = self._callers.get(at, at)
        for name, number in self._COMMENT.findall(line.partition("@[")[2]):
            path = next((path for path in self._files.values() if path.name == name), Path(name))
            self._frames.append((path, int(number)))
        own = ((_of_project(file), number) for file, number in self._frames)
        found_own = [(file, number) for file, number in own if file is not None]
        self._own = found_own or self._own  # some of Triton's lines lack their callers

    def here(self) -> list[str]:
        """["cuda_forward.cuh:88", the text of that line, those of its callers…]"""
        frames = self._own or self._frames
        if not frames:
            return ["", ""]
        path, number = frames[0]
        return [f"{path.name}:{number}", *(_line(*frame) for frame in frames)]


@functools.cache
def _of_project(path: Path) -> Path | None:
    """The file of this project that is meant, if one is.

    Triton keeps PTX by the text of the kernel: it may name the same file of another checkout.
    """
    for depth, folder in enumerate(path.parts):
        here = ROOT.joinpath(*path.parts[depth:])
        if folder in FOLDERS and here.is_file():
            return here
    return None


def _line(path: Path, number: int) -> str:
    lines = _lines(path)
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


@functools.cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
