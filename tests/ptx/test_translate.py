"""The translator: parsing, source locations, splitting, calls, and that nothing is ignored."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ptx.parser import parse
from ptx.syntax import Address, Float, Integer, Name, Not, Pair, PtxSyntaxError, Statement, Vector
from ptx.translate import split_kernels, translate
from tests.ptx.assembly import HEADER, Program, kernel, kinds

TWO_KERNELS = """
.version 9.0
.target sm_90a
.address_size 64
.file 1 "/src/a.cu"
.file 2 "/src/b.cuh"
.const .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 0, 0, 0};
.global .align 4 .u32 counter;
.func (.param .b32 out) twice(.param .b32 x)
{
	.reg .b32 %r<3>;
	.loc 2 7 1
	ld.param.u32 %r1, [x];
	add.s32 %r2, %r1, %r1;
	st.param.b32 [out], %r2;
	ret;
}
.visible .entry first(.param .u64 p)
.maxntid 128, 1, 1
{
	.reg .b32 %r<4>;
	.reg .b64 %rd<2>;
	.loc 1 12 0
	ld.param.u64 %rd1, [p];
	mov.u32 %r1, %tid.x;
	{ // callseq 0, 0
	.param .b32 param0;
	st.param.b32 [param0], %r1;
	.param .b32 retval0;
	call.uni (retval0), twice, (param0);
	ld.param.b32 %r2, [retval0];
	}
	.loc 2 40 3, function_name $L__info_string0, inlined_at 1 12 0
	.loc 2 50 3, function_name $L__info_string1, inlined_at 2 40 3
	ld.const.u32 %r3, [table+4];
	st.global.u32 [%rd1], %r3;
	ret;
}
.visible .entry second()
{
	.loc 1 30 0
	ret;
}
.section .debug_str
{
$L__info_string0:
.b8 95, 90
}
"""


def statements(body: str) -> list[Statement]:
    module = parse(f"{HEADER}.entry k() {{ .reg .b32 %r<9>; .reg .pred %p<9>; {body} }}")
    items = module.functions["k"].body
    assert items is not None
    return [item for item in items if isinstance(item, Statement)]


def test_operands() -> None:
    (statement,) = statements("@!%p1 a.b::c.d32 %r1|%p2, !%p3, {%r2, _}, [%r4+-8], -5, 0f3F800000;")
    assert statement.words == ("a", "b::c", "d32")
    assert statement.guard is not None
    assert (statement.guard.register, statement.guard.negated) == ("%p1", True)
    assert statement.operands == (
        Pair(Name("%r1"), Name("%p2")),
        Not(Name("%p3")),
        Vector((Name("%r2"), Name("_"))),
        Address(Name("%r4"), -8),
        Integer(-5),
        Float(0x3F800000, 32),
    )


def test_tensor_addresses_and_spaces_in_text() -> None:
    (statement,) = statements("cp [ %r1 + 0 ], [%r2, { %r3,\n %r4 }], [sym], 0x10;")
    assert statement.operands[1] == Address(Name("%r2"), 0, Vector((Name("%r3"), Name("%r4"))))
    assert statement.operands[3] == Integer(16)


def test_variables_and_directives() -> None:
    module = parse(TWO_KERNELS)
    assert module.variables["table"].bytes == 8
    assert module.variables["table"].initial[:5] == (1, 0, 0, 0, 2)
    assert module.functions["first"].directives["maxntid"] == (128, 1, 1)
    assert [k.name for k in module.kernels] == ["first", "second"]


def test_a_syntax_error_names_the_line() -> None:
    with pytest.raises(PtxSyntaxError, match="PTX line 5: expected"):
        parse(HEADER + ".entry k() {\n add %r1 %r2;\n }")


@pytest.mark.parametrize(
    "line",
    [
        "add %r1,, %r2;",
        "add %r1, %r2,;",
        "add %r1, %r2",
        "add %r1, #2;",
        "add {%r1, %r2;",
        "ld %r1, [%r2;",
        "ld %r1, [%r2 %r3];",
        "@add;",
        ".bar %r1;",
        ".loc 1 2;",
        "/* add %r1, %r2;",
    ],
)
def test_what_is_malformed_is_refused(line: str) -> None:
    with pytest.raises(PtxSyntaxError, match="PTX line 5: "):
        parse(f"{HEADER}.entry k() {{\n {line}\n }}")


def test_comments_stand_anywhere() -> None:
    (statement,) = statements("add.u32 /* a, b; */ %r1, // c;\n %r2, [%r3 /* d */ + 4]; // e\n")
    assert statement.operands == (Name("%r1"), Name("%r2"), Address(Name("%r3"), 4))


def test_sites_follow_the_inlining() -> None:
    cpp = translate(TWO_KERNELS).cpp
    assert '"b.cuh:50<b.cuh:40<a.cu:12|ld.const.u32|' in cpp
    line = TWO_KERNELS.split("\n").index("\tst.global.u32 [%rd1], %r3;") + 1
    assert f'"b.cuh:50<b.cuh:40<a.cu:12|st.global.u32|{line}"' in cpp


def test_basic_blocks_are_counted_by_opcode() -> None:
    body = (
        "setp.lt.u32 %p1, %r1, 5; @%p1 bra L; add.u32 %r5, %r5, 1; add.u32 %r5, %r5, 2;\nL: nop1:"
    )
    cpp = translate(HEADER + kernel("k", body)).cpp
    assert '"add.u32=2"' in cpp  # the label nop1 is no target, and does not end the block


def test_split_takes_what_a_kernel_needs() -> None:
    texts = split_kernels(TWO_KERNELS)
    assert list(texts) == ["first", "second"]
    assert "table" in texts["first"]
    assert "twice" in texts["first"]
    assert "counter" not in texts["first"]
    assert '.file 2 "/src/b.cuh"' in texts["first"]
    assert "twice" not in texts["second"]
    assert "b.cuh" not in texts["second"]
    assert not any(".section" in text for text in texts.values())
    for name, text in texts.items():
        assert translate(text).kernels == [name]


def test_kernels_that_share_a_variable_stay_together() -> None:
    text = TWO_KERNELS.replace("\t.loc 1 30 0", "\tred.global.add.u32 [counter], 1;")
    text = text.replace("\tld.param.u64 %rd1, [p];", "\tred.global.add.u32 [counter], 1;")
    texts = split_kernels(text)
    assert texts["first"] == texts["second"]
    assert translate(texts["first"]).kernels == ["first", "second"]


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate.u32 %r5, %r6;",  # no such instruction
        "add.frob.u32 %r5, %r6, %r7;",  # no such modifier
        "add.u32.wide %r5, %r6, %r7;",  # in the wrong place
        "add.u32 %r5, %r6, %r7, %r8;",  # one operand too many
        "add.u32 %r5, %r6;",  # one too few
        "mul.sat.lo.u32 %r5, %r6, %r7;",  # known elsewhere
        "mov.u32 %r5, %smid;",  # no such special register
        "ld.global.b32 {%r5, %r6}, [%rd1];",  # another number of registers
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd1}, {%rd1}, {%rd1}, {%rd1};",
        "barrier.cluster.arrive.aligned;",
        "call (%r5), %rd5, (%r6), prototype;",
    ],
)
def test_what_is_unknown_is_loud(line: str) -> None:
    text = HEADER + kernel("k", line)
    opcode = line.partition(" ")[0].rstrip(";")
    assert translate(text).unsupported == {opcode: 1}
    launch = Program(kernel("k", line)).run("k")
    assert kinds(launch) == {"unsupported"}
    assert opcode in launch.reports[0].message


def test_what_is_unknown_and_not_reached_is_quiet() -> None:
    body = "setp.lt.u32 %p1, %r1, 999; @%p1 bra done; frobnicate; done:"
    assert not Program(kernel("k", body)).run("k").reports


FUNCTIONS = """
.func (.param .b32 out) fill(.param .b32 x)
{
	.local .align 8 .b8 depot[32];
	.reg .b32 %r<4>;
	.reg .b64 %rd<2>;
	ld.param.b32 %r1, [x];
	mov.u64 %rd1, depot;
	st.local.b32 [%rd1+28], %r1;
	ld.local.b32 %r2, [depot+28];
	st.param.b32 [out], %r2;
	ret;
}
.func (.param .align 8 .b8 out[8]) outer(.param .align 8 .b8 pair[8], .param .b32 z)
{
	.local .align 8 .b8 depot[16];
	.reg .b32 %r<9>;
	.reg .pred %p<2>;
	ld.param.v2.b32 {%r1, %r2}, [pair];
	ld.param.b32 %r3, [z];
	st.local.b32 [depot], %r3;
	{
	.param .b32 param0; .param .b32 retval0;
	st.param.b32 [param0], %r2;
	call.uni (retval0), fill, (param0);
	ld.param.b32 %r4, [retval0];
	}
	ld.local.b32 %r5, [depot];
	add.u32 %r5, %r5, %r1;
	setp.gt.u32 %p1, %r1, 15;
	st.param.v2.b32 [out], {%r5, %r4};
	@%p1 ret;
	st.param.b32 [out+4], 77;
	ret;
}
"""
CALL = """
	.local .align 8 .b8 depot[8];
	st.local.b32 [depot+4], 1234;
	mul.wide.u32 %rd4, %r1, 16; add.s64 %rd4, %rd1, %rd4;
	{
	.param .align 8 .b8 param0[8]; .param .b32 param1; .param .align 8 .b8 retval0[8];
	add.u32 %r5, %r1, 100;
	st.param.v2.b32 [param0], {%r1, %r5}; st.param.b32 [param1], 1000;
	call (retval0), outer, (param0, param1);
	ld.param.v2.b32 {%r6, %r7}, [retval0];
	}
	ld.local.b32 %r8, [depot+4];
	st.global.v4.b32 [%rd4], {%r6, %r7, %r8, 0};
"""


def test_calls_pass_buffers_and_keep_their_own_locals() -> None:
    target = np.zeros((32, 4), np.uint32)
    launch = Program(FUNCTIONS + kernel("calls", CALL, 1)).run("calls", target)
    assert not launch.reports, launch.reports
    t = np.arange(32)
    np.testing.assert_array_equal(target[:, 0], 1000 + t)
    np.testing.assert_array_equal(target[:, 1], np.where(t > 15, 100 + t, 77))
    np.testing.assert_array_equal(target[:, 2], 1234)
    assert launch.instructions["add.u32"] == 64  # the functions' instructions are counted too


def test_recursion_is_refused() -> None:
    functions = FUNCTIONS.replace("fill, (param0)", "outer, (param0)")
    assert translate(HEADER + functions + kernel("calls", CALL, 1)).unsupported == {"call.uni": 1}


def test_indirect_jumps() -> None:
    body = "and.b32 %r5, %r1, 3;\ntable: .branchtargets L0, L1, L1, L2;\nbrx.idx %r5, table;\n"
    body += "L0: mov.u32 %r6, 10; bra.uni out;\nL1: mov.u32 %r6, 11; bra.uni out;\n"
    body += "L2: mov.u32 %r6, 12;\nout: mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd1, %rd4;"
    body += "st.global.b32 [%rd4], %r6;"
    target = np.zeros(32, np.uint32)
    assert not Program(kernel("jump", body, 1)).run("jump", target).reports
    assert target[:4].tolist() == [10, 11, 11, 12]


def test_inline_assembly_repeats_its_labels() -> None:
    """Each scope has its own labels and registers."""
    loop = "{{ .reg .pred p; .reg .b32 n; mov.u32 n, 0;\nAGAIN: add.u32 n, n, {step};"
    loop += " setp.lt.u32 p, n, 10;\n@p bra AGAIN;\nadd.u32 %r5, %r5, n; }}\n"
    body = "mov.u32 %r5, 0;" + loop.format(step=4) + loop.format(step=7)
    body += "mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd1, %rd4; st.global.b32 [%rd4], %r5;"
    target = np.zeros(32, np.uint32)
    assert not Program(kernel("loops", body, 1)).run("loops", target).reports
    assert set(target.tolist()) == {12 + 14}


def string(name: str, text: str) -> str:
    """A module-scope string, as compilers write it."""
    values = ", ".join(map(str, text.encode()))
    return f".global .align 1 .b8 {name}[{len(text) + 1}] = {{{values}, 0}};\n"


def test_trap_and_assertion() -> None:
    assert kinds(Program(kernel("k", "trap;")).run("k")) == {"trap"}
    strings = "".join(
        string(name, text)
        for name, text in (("message", "x > 0"), ("file", "a.cu"), ("function", "void k()"))
    )
    declaration = ".extern .func __assertfail(.param .b64 a, .param .b64 b, .param .b32 c,"
    declaration += " .param .b64 d, .param .b64 e);\n"
    call = "{ .param .b64 p0; .param .b64 p1; .param .b32 p2; .param .b64 p3; .param .b64 p4;"
    call += "cvta.global.u64 %rd5, message; st.param.b64 [p0], %rd5;"
    call += "cvta.global.u64 %rd5, file; st.param.b64 [p1], %rd5; st.param.b32 [p2], 7;"
    call += "cvta.global.u64 %rd5, function; st.param.b64 [p3], %rd5; st.param.b64 [p4], 1;"
    call += "call.uni __assertfail, (p0, p1, p2, p3, p4); }"
    launch = Program(strings + declaration + kernel("k", call)).run("k")
    assert kinds(launch) == {"device-assert"}
    assert "a.cu:7: void k(): assertion `x > 0' failed" in launch.reports[0].message


def test_printf(capfd: pytest.CaptureFixture[str]) -> None:
    format = "%d %5.2f %s|%llx%%\n"
    texts = "".join(string(name, text) for name, text in (("format", format), ("word", "abc")))
    declaration = ".extern .func (.param .b32 r) vprintf(.param .b64 a, .param .b64 b);\n"
    call = ".local .align 8 .b8 depot[32]; setp.ne.u32 %p1, %r1, 3; @%p1 ret;"
    call += (
        "{ .reg .b64 at; .param .b64 p0; .param .b64 p1; .param .b32 r0; cvta.local.u64 at, depot;"
    )
    call += "st.b32 [at], -5; st.b64 [at+8], 0d400921FB54442D18;"
    call += "cvta.global.u64 %rd5, word; st.b64 [at+16], %rd5; st.b64 [at+24], 0x1234567890;"
    call += "cvta.global.u64 %rd5, format; st.param.b64 [p0], %rd5; st.param.b64 [p1], at;"
    call += "call.uni (r0), vprintf, (p0, p1); }"
    assert not Program(texts + declaration + kernel("k", call)).run("k").reports
    assert capfd.readouterr().err == "-5  3.14 abc|1234567890%\n"


def test_generated_code_reads_well() -> None:
    """The PTX stands beside its translation, and no line of it is lost."""
    translation = translate(TWO_KERNELS)
    assert re.search(r"r2 = r1 \+ r1;  // add\.s32 %r2, %r1, %r1\n", translation.cpp)
    assert "  // b.cuh:50<b.cuh:40<a.cu:12" in translation.cpp
