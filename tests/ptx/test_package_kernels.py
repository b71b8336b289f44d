"""Every CUDA kernel of the package (csrc/<op>/module_cuda.cu) is one that the executor can run:
nothing in the PTX that nvcc makes of it is left to be reported when a thread gets there."""

from __future__ import annotations

import re

import pytest

from ptx import build
from ptx.translate import split_kernels, translate
from tests.ptx.conftest import ARCHS, DEFAULT_ARCHS

# The groups: a guard, the opcode, the operands.
STATEMENT = re.compile(r"^[ \t]*(@!?%p\d+[ \t]+)?([a-z][\w.:]*)([^;]*);", re.MULTILINE)
WITHOUT_DIGITS = str.maketrans("", "", "0123456789")


def forms(ptx: str) -> str:
    """The text with the first statement of each form only, each on the line that it stands on.

    Statements of one form differ in numbers alone: of registers, of labels, and constants."""
    seen = set()

    def first(found: re.Match[str]) -> str:
        form = bool(found[1]), found[2], found[3].translate(WITHOUT_DIGITS)
        if form in seen:
            return "\n" * found[0].count("\n")
        seen.add(form)
        return found[0]

    return STATEMENT.sub(first, ptx)


def unsupported(ptx: str) -> list[str]:
    """What of the text is not implemented: the kernel, the reason, and "file:line|opcode|line"."""
    translation = translate(ptx)
    sites = re.findall(r'^    "(.+\|.+\|\d+)",$', translation.cpp, re.MULTILINE)
    found = []
    name = ""
    for line in translation.cpp.split("\n"):
        if line.startswith("namespace kernel_"):
            name = line.partition("// ")[2]
        if report := re.search(r'fatal\("unsupported", "(.+)", (?:site\((\d+)\)|0)\);', line):
            site = sites[int(report[2])] if report[2] else "the whole kernel"
            found.append(f"{name}: {report[1]}: {site}")
    assert len(found) == sum(translation.unsupported.values())
    return found


@pytest.mark.parametrize(
    "every_statement",
    [False, pytest.param(True, marks=pytest.mark.sweep)],
    ids=["forms", "kernels"],
)
@pytest.mark.parametrize(
    ("op", "arch"),
    [
        pytest.param(op, arch, marks=[pytest.mark.sweep] * (arch not in DEFAULT_ARCHS[op]))
        for op in build.op_sources()
        for arch in ARCHS
    ],
)
def test_no_instruction_is_unsupported(op: str, arch: str, every_statement: bool) -> None:
    """By default of each form of statement the first that an op's kernels have."""
    ptx = build.nvcc_ptx(build.op_sources()[op], arch)
    texts = split_kernels(ptx).values() if every_statement else [forms(ptx)]
    for text in texts:
        assert unsupported(text) == []
    assert any(re.search(r"^\s*st\.global\.", text, re.MULTILINE) for text in texts)


PLANTED = """
.version 8.7
.target sm_90a
.visible .entry first()
{
	.reg .b32 %r<70>;
	add.u32 %r5, %r6, 7;
	add.u32 %r50, %r60, 70;
	@%p1 bra $L__BB0_1;
$L__BB0_1:
	ret;
}
.visible .entry second()
{
	.reg .b32 %r<70>;
	add.u32 %r50,
		%r60, 70;
	add.u32 %r51,
		%r61, 71;
	add.u32 %r5, %r6, %smid;
	add.frob.u32 %r5, %r6, 7;
	add.frob.u32 %r6, %r7, 8;
	@%p1 bra $L__BB1_1;
$L__BB1_1:
	ret;
}
.visible .entry third()
.reqnctapercluster 2
{
	ret;
}
"""


def test_what_is_unsupported_is_found_with_its_kernel_and_line() -> None:
    """Also where its opcode has been seen with other operands."""
    lines, kept = PLANTED.split("\n"), forms(PLANTED).split("\n")
    dropped = [line.strip() for line, left in zip(lines, kept, strict=True) if line != left]
    again = ["add.u32 %r51,", "%r61, 71;", "add.frob.u32 %r6, %r7, 8;", "@%p1 bra $L__BB1_1;"]
    assert dropped == ["add.u32 %r50, %r60, 70;", *again, "ret;", "ret;"]
    found = unsupported(forms(PLANTED))
    assert len(found) == 4
    for text, kernel, line, reason in zip(
        found,
        ("first", "second", "second", "third"),
        ("@%p1 bra $L__BB0_1;", "add.u32 %r5, %r6, %smid;", "add.frob.u32 %r5, %r6, 7;", ""),
        ("the guard %p1", "the operand %smid", "the modifier .frob", "clusters of more than one"),
        strict=True,
    ):
        assert text.startswith(f"{kernel}: ")
        assert reason in text
        assert not line or text.endswith(f"|{lines.index(chr(9) + line) + 1}")
