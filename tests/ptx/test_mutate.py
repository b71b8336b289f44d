"""The mutation test's own parts: what it changes, where it says that was, and how children end."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter

import pytest

from ptx import children, explained
from ptx.mutate import _grouped, op_tests, ops
from ptx.mutations import ROOT, mutants, parse

KERNEL = f"""
.version 8.8
.target sm_80
.visible .entry kernel(.param .u64 p)
{{
\t.loc\t1 2 3
\tbar.sync \t0;
\t.loc\t1 3 1, function_name $L__info_string0, inlined_at 2 2 1
\tld.global.v4.f32 \t{{%f1, %f2, %f3, %f4}}, [%rd1+16];
\t@%p1 ld.shared.b32 %r1, [ %r2 + 0 ];
\tst.shared.f32 \t[%r1], %f1;
\tsetp.lt.s32 \t%p1, %r1, %r2;
\t@%p1 bra \t$L__BB0_2;
\tfma.rn.f32 \t%f5, %f1, %f2, %f3;
\tsub.f32 \t%f6, %f1, 0f3F800000;
\tshfl.sync.bfly.b32 \t%r3|%p2, %r1, 16, 31, -1;
\tcp.async.wait_group \t1;
\tadd.s32 \t%r4, %r1, 4;
$L__BB0_2:
\tret;
}}
\t.file\t1 "{ROOT}/ptx/mutations.py"
\t.file\t2 "{ROOT}/ptx/mutate.py"
"""

EXPECTED = [
    ("drop barrier", ""),
    ("address + element", "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+20];"),
    ("address + vector", "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+32];"),
    ("address + element", "@%p1 ld.shared.b32 %r1, [%r2+4];"),
    ("drop predicate", "ld.shared.b32 %r1, [ %r2 + 0 ];"),
    ("address + element", "st.shared.f32 [%r1+4], %f1;"),
    ("drop st.shared", ""),
    ("bound", "setp.le.s32 %p1, %r1, %r2;"),
    ("branch always", "bra $L__BB0_2;"),
    ("branch never", ""),
    ("swap operands", "fma.rn.f32 %f5, %f3, %f2, %f1;"),
    ("fma to mul", "mul.rn.f32 %f5, %f1, %f2;"),
    ("swap operands", "sub.f32 %f6, 0f3F800000, %f1;"),
    ("sub to add", "add.f32 %f6, %f1, 0f3F800000;"),
    ("constant", "sub.f32 %f6, %f1, 0f40000000;"),
    ("shuffle down", "shfl.sync.down.b32 %r3|%p2, %r1, 16, 31, -1;"),
    ("shuffle distance", "shfl.sync.bfly.b32 %r3|%p2, %r1, 8, 31, -1;"),
    ("drop wait", ""),
    ("loosen wait", "cp.async.wait_group 2;"),
    ("constant", "add.s32 %r4, %r1, 5;"),
]


def test_every_kind_of_mutant():
    found = [(mutant.kind, " ".join(mutant.becomes.split())) for mutant in mutants(KERNEL)]
    assert found == EXPECTED


def test_a_mutant_changes_its_one_line():
    for mutant in mutants(KERNEL):
        before, after = KERNEL.split("\n"), mutant.applied(KERNEL).split("\n")
        changed = [n for n, (a, b) in enumerate(zip(before, after, strict=True), 1) if a != b]
        assert changed == [mutant.line]
        assert parse(before[mutant.line - 1]) is not None


def test_a_mutant_names_its_source_line():
    lines = (ROOT / "ptx/mutations.py").read_text(encoding="utf-8").splitlines()
    first, second = mutants(KERNEL)[:2]
    assert (first.where, first.source) == ("mutations.py:2", lines[1].strip())
    assert second.where == "mutations.py:3"
    assert "drop barrier: mutations.py:2" in str(first)


def test_tritons_comments_lead_to_the_line_of_the_kernel():
    text = KERNEL.replace("\t.loc\t1 2 3", "\t.loc\t3 9 3 // standard.py:9:3 @[ mutate.py:4:1 ]")
    text += '\t.file\t3 "/elsewhere/standard.py"\n'
    assert mutants(text)[0].where == "mutate.py:4"


def test_another_checkouts_file_is_this_projects():
    text = KERNEL.replace(f"{ROOT}/ptx", "/somewhere/else/ptx")
    assert [mutant.source for mutant in mutants(text)] == [m.source for m in mutants(KERNEL)]
    text = KERNEL.replace(f"{ROOT}/ptx/mutations.py", "/usr/include/other.h")
    assert mutants(text)[0].source == ""


def test_what_is_no_instruction_is_left_alone():
    for line in ("$L__BB0_2:", "\t.reg .pred %p<4>;", "", "// add.s32 %r1, %r1, 1;", "}"):
        assert parse(line) is None


def test_the_explained_survivors_are_complete_and_about_lines_that_exist():
    sources = {
        line.strip()
        for folder in ("csrc", "kernels")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cuh", ".cu", ".py")
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    entries = explained.entries()
    for entry in entries:
        assert {"kernel", "kind", "source", "why"} <= entry.keys()
        assert entry.keys() <= {"kernel", "kind", "source", "code", "within", "why"}
        assert {entry["source"], entry.get("within", "…")} - {"…"}, "it says of no line"
        for source in (entry["source"], entry.get("within", "…")):
            known = source in sources or any(explained.fits(source, line) for line in sources)
            assert known, f"no such line any more: {source}"
        assert len(entry["why"]) > 20
    fields = ("kernel", "kind", "source", "code", "within")
    keys = [[entry.get(field, "") for field in fields] for entry in entries]
    assert all(first < second for first, second in itertools.pairwise(keys))


def test_an_explanation_is_of_one_shape_one_instruction_and_one_caller():
    mutant = mutants(KERNEL)[8]
    assert (mutant.kind, mutant.code) == ("branch always", "setp.lt.s32 %p, %r, %r; @%p bra $L;")
    entry = {"kernel": "kernel", "kind": mutant.kind, "source": mutant.source}
    assert explained.explains(entry, "kernel<float, 8>", mutant)
    for more, right in (
        ({"kernel": "kernel<…, 8>"}, True),
        ({"kernel": "kernel<…, 16>"}, False),
        ({"kind": "branch never"}, False),
        ({"source": "…"}, True),
        ({"code": "setp.lt.…bra $L;"}, True),
        ({"code": "setp.ge.…bra $L;"}, False),
        ({"within": mutant.within[0]}, True),
        ({"within": "another caller"}, False),
    ):
        assert explained.explains(entry | more, "kernel<float, 8>", mutant) is right


def test_every_op_with_tests_on_the_executor_is_known():
    assert "layer_norm" in ops()
    names = {path.name for path in op_tests("layer_norm")}
    assert {f"test_layer_norm_{part}.py" for part in ("sharp", "edges", "cuda", "triton")} <= names


def entry(name: str, op: str, folder: str = "csrc", loads: str = "f32") -> str:
    file = f'.file 1 "{ROOT}/{folder}/common/x.h"\n.file 2 "{ROOT}/{folder}/{op}/x"\n'
    return f"{file}.visible .entry {name}()\n{{\n\tld.global.{loads} \t%f1, [%rd1];\n}}\n"


def test_which_texts_stand_for_a_kernel():
    """One dtype of a template, bf16 if there is one, in each shape; the ops kept apart."""
    bf16_4, half_4, half_8, float_4 = (
        entry(f"_ZN7kernels2op3addI{type}Li{shape}EEEvv", "op")
        for type, shape in [("13__nv_bfloat16", 4), ("6__half", 4), ("6__half", 8), ("f", 4)]
    )
    plain = entry("_ZN7kernels2op5countILi3EEEvv", "op")
    triton, vectors = entry("add", "op", "kernels"), entry("add", "op", "kernels", "v4.f32")
    other, of_a_test = entry("add", "another", "kernels"), ".visible .entry test()\n{\n}\n"
    launches = {bf16_4: 1, half_4: 9, half_8: 2, float_4: 5, plain: 1, triton: 1, vectors: 1}
    texts = {text: Counter(test=count) for text, count in (launches | {other: 1}).items()}
    found = _grouped(texts | {of_a_test: Counter(test=1)}, {"test": 1.0})
    assert {(kernel.op, kernel.texts[0]) for kernel in found} == {
        *(("op", text) for text in (bf16_4, half_8, plain, triton, vectors)),
        ("another", other),
        ("", of_a_test),
    }


# ---- children
def fail() -> None:
    raise ValueError("told to")


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("jobs", [1, 3])
def test_children_return_fail_crash_and_hang(jobs, monkeypatch):
    monkeypatch.setattr(children, "WAITING", 1)
    tasks = [
        ("value", lambda: [1, "two"], 30),
        ("failure", fail, 30),
        ("crash", lambda: os.kill(os.getpid(), signal.SIGKILL), 30),
        ("hang", spin, 1),
        ("hang, waiting", lambda: time.sleep(60), 1),
    ]
    outcomes = dict(children.run(tasks, jobs))
    assert outcomes["value"].value == [1, "two"]
    assert "ValueError: told to" in outcomes["failure"].failure
    assert outcomes["crash"].failure == "crash"
    assert outcomes["hang"].failure == outcomes["hang, waiting"].failure == "hang"


def test_a_child_that_is_paused_does_not_hang(monkeypatch):
    monkeypatch.setattr(children, "WAITING", 10)
    outcomes = dict(children.run([("slow", lambda: time.sleep(2), 1)], 1))
    assert outcomes["slow"].failure == ""
