"""The gates: reading machine code, finding its loops, occupancy, and what counts as worse."""

from __future__ import annotations

import random
import subprocess
import sysconfig
from pathlib import Path

import pytest

from bench import gates, sass
from bench.loops import innermost_loops
from ptx import occupancy

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z4copyPfPKfi:
  REG:40 STACK:8 SHARED:1792 LOCAL:16 CONSTANT[0]:632 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function plain:
  REG:12 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:368 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """
.nv.info
	<0x1>
	Attribute:	EIATTR_REGCOUNT
.nv.info._Z4copyPfPKfi
	<0x1>
	Attribute:	EIATTR_NUM_BARRIERS
	Format:	EIFMT_BVAL
	Value:	0x1
	<0x2>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x40 0x4 0x1
.nv.info.plain
	<0x1>
	Attribute:	EIATTR_NUM_BARRIERS
"""
# Two nested loops; the inner one has its rare part behind EXIT, from where it jumps back.
LISTING = """
	code for sm_90a
		Function : _Z4copyPfPKfi
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;           /* 0x00000a00ff017b82 */
                                                                    /* 0x000fe20000000800 */
        /*0010*/                   MOV R2, RZ ;                     /* 0x0000000000047919 */
        /*0020*/                   LDG.E.CONSTANT R8, desc[UR4][R2.64] ; /* 0x0 */
        /*0030*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ; /* 0x0 */
        /*0040*/               @P0 BRA 0xc0 ;                       /* 0x0 */
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;    /* 0x0 */
        /*0070*/                   BRA.U !UP0, 0x30 ;               /* 0x0 */
        /*0080*/                   MUFU.RCP R3, R3 ;                /* 0x0 */
        /*0090*/              @!P2 BRA 0x20 ;                       /* 0x0 */
        /*00a0*/                   STG.E desc[UR4][R2.64], R4 ;     /* 0x0 */
        /*00b0*/                   EXIT ;                           /* 0x0 */
        /*00c0*/                   HMMA.16816.F32.BF16 R4, R4, R2, R4 ; /* 0x0 */
        /*00d0*/                   LDSM.16.M88.4 R4, [R2] ;         /* 0x0 */
        /*00e0*/                   BRA 0x50 ;                       /* 0x0 */
        /*00f0*/                   BRA 0xf0;                        /* 0x0 */
        /*0100*/                   NOP;                             /* 0x0 */
		..........
"""


def test_resources_and_launch_bounds():
    usage = sass.resources(USAGE)
    assert usage["_Z4copyPfPKfi"] == sass.Resources(40, 8, 1792, 16)
    assert usage["plain"] == sass.Resources(12, 0, 0, 0)
    assert sass.launch_bounds(ELF) == {"_Z4copyPfPKfi": 256}


def test_instructions_by_class():
    (code,) = sass.functions(LISTING).values()
    assert len(code) == 16  # without the NOP
    assert [i.conditional for i in code[:5]] == [False, False, False, True, True]
    assert sass.mix(code) == {
        "load_narrow": 1,
        "load_wide": 1,
        "store_64": 1,
        "store_narrow": 1,
        "barrier": 1,
        "mufu": 1,
        "mma": 1,
        "ldmatrix": 1,
    }


def test_the_innermost_loop_holds_its_rare_part_and_no_more():
    (code,) = sass.functions(LISTING).values()
    (loop,) = innermost_loops(code)
    addresses = [0x30, 0x40, 0x50, 0x60, 0x70, 0xC0, 0xD0, 0xE0]
    assert [i.address for i in loop] == addresses
    assert sass.mix(loop)["mma"] == 1
    assert "mufu" not in sass.mix(loop)


def test_a_jump_back_from_rare_code_is_no_loop():
    rare = LISTING.replace("BRA.U !UP0, 0x30", "MOV R2, RZ").replace("@!P2 BRA 0x20", "MOV R2, RZ")
    (code,) = sass.functions(rare).values()
    assert innermost_loops(code) == []


def test_widths_of_every_spelling():
    wide = ["LDG.E.128", "LDG.E.128.CONSTANT", "LDG.E.NA.128.STRONG.GPU", "LDG.E.ENL2.256"]
    codes = [sass.Instruction(0, opcode, "") for opcode in wide]
    assert sass.mix(codes) == {"load_wide": 4}
    assert sass.mix([sass.Instruction(0, "LDG.E.64.CONSTANT", "")]) == {"load_64": 1}
    assert sass.mix([sass.Instruction(0, "LDG.E.U16", "")]) == {"load_narrow": 1}
    assert sass.mix([sass.Instruction(0, "LDGSTS.E.BYPASS.128", "")]) == {"copy_async": 1}
    assert sass.mix([sass.Instruction(0, "STL.64", "")]) == {"local": 1}


def test_short_names():
    mangled = (
        "_ZN7kernels10layer_norm20backward_long_kernelI13__nv_bfloat16Li8EEEvNS0_12BackwardArgsE"
    )
    assert sass.demangled([mangled]) == {mangled: "layer_norm::backward_long_kernel<bf16, 8>"}
    assert sass.demangled(["_forward_kernel"]) == {"_forward_kernel": "_forward_kernel"}


# ---- occupancy -----------------------------------------------------------------------------------
CALCULATOR = r"""
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, minor, threads_per_sm, shared_per_sm, threads, registers, shared;
  while (scanf("%d %d %d %d %d %d %d", &major, &minor, &threads_per_sm, &shared_per_sm, &threads,
               &registers, &shared) == 7) {
    cudaOccDeviceProp p{};
    p.computeMajor = major;
    p.computeMinor = minor;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = threads_per_sm;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.sharedMemPerBlock = 49152;
    p.sharedMemPerMultiprocessor = shared_per_sm;
    p.numSms = 1;
    p.sharedMemPerBlockOptin = shared_per_sm - 1024;
    p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes a{};
    a.maxThreadsPerBlock = 1024;
    a.numRegs = registers;
    a.sharedSizeBytes = shared;
    a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = shared_per_sm - 1024;
    a.numBlockBarriers = 1;
    cudaOccDeviceState s{};
    s.cacheConfig = CACHE_PREFER_SHARED;
    s.carveoutConfig = 100;
    cudaOccResult r;
    const int error = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, 0);
    printf("%d\n", error ? -error : r.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_that_of_nvidias_calculator(tmp_path):
    headers = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/include"
    if not (headers / "cuda_occupancy.h").exists():
        pytest.skip("the triton wheel, which brings cuda_occupancy.h, is not installed")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    command = ["g++", "-O1", "-I", str(headers), "-o", "calculator", "calculator.cpp"]
    subprocess.run(command, check=True, cwd=tmp_path)
    numbers = random.Random(0)
    cases, questions = [], []
    for target, limits in occupancy.MULTIPROCESSORS.items():
        for _ in range(300):
            threads = numbers.choice([32, 64, 96, 128, 256, 320, 512, 768, 1024])
            registers = numbers.randint(16, min(255, 65536 // threads // 8 * 8))
            shared = numbers.choice([0, 1, 512, 4096, 12345, 33792, limits.shared // 2])
            cases.append((target, threads, registers, shared))
            major, minor = divmod(int(target), 10)
            questions.append(
                f"{major} {minor} {limits.threads} {limits.shared} {threads} {registers} {shared}"
            )
    answers = subprocess.run(
        [str(tmp_path / "calculator")],
        input="\n".join(questions),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [occupancy.blocks(*case) for case in cases] == [int(n) for n in answers.split()]


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="sm_75"):
        occupancy.blocks("sm_75", 128, 32, 0)


# ---- the gates -----------------------------------------------------------------------------------
GATE = {
    "registers": 40,
    "local": 0,
    "spills": 0,
    "shared": 1024,
    "threads": 256,
    "blocks": 4,
    "loop_load_wide": 4,
    "loop_mufu": 2,
}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("registers", 41),
        ("local", 8),
        ("spills", 1),
        ("shared", 1025),
        ("blocks", 3),
        ("loop_load_wide", 3),
        ("loop_load_narrow", 1),
    ],
)
def test_every_regression_is_named(column, value):
    before = {"cuda sm_80": {"f": GATE, "g": GATE}}
    now = {"cuda sm_80": {"f": GATE | {column: value}, "g": GATE}}
    (failure,) = gates.compare(now, before)
    assert (failure.kernel, failure.column, failure.value) == ("f", column, value)
    assert str(value) in str(failure)
    assert "cuda sm_80  f" in str(failure)


def test_what_got_better_or_is_no_gate_passes():
    better = GATE | {"registers": 39, "shared": 0, "blocks": 5, "loop_load_wide": 5, "loop_mufu": 9}
    assert gates.compare({"cuda": {"f": better}}, {"cuda": {"f": GATE}}) == []


def test_ratios_have_room_for_rounding_only():
    gate = {"cuda": {"f": {"moved_over_least": 1.25}}}
    assert gates.compare({"cuda": {"f": {"moved_over_least": 1.2504}}}, gate) == []
    (failure,) = gates.compare({"cuda": {"f": {"moved_over_least": 1.26}}}, gate)
    assert "1.26" in str(failure)


def test_a_kernel_that_is_new_or_gone_fails():
    new, gone = gates.compare({"cuda": {"new": GATE}}, {"cuda": {"old": GATE}})
    assert "new, gates.json does not know it" in str(new)
    assert "gone" in str(gone)


def test_a_new_kernel_must_not_spill_either():
    failures = gates.compare({"cuda": {"new": GATE | {"spills": 2}}}, {})
    assert [failure.column for failure in failures] == ["", "spills"]


def test_the_file_keeps_a_kernel_per_line(tmp_path):
    path = tmp_path / "gates.json"
    rows = {"triton": {"b": GATE, "a": GATE}, "cuda": {"f": {"blocks": 1}}}
    gates.write(rows, {"nvcc": "13.0.88"}, path)
    assert gates.read(path) == (rows, {"nvcc": "13.0.88"})
    assert len(path.read_text().splitlines()) == 2 + 1 + 2 * 2 + 3
    assert path.read_text().index('"cuda"') < path.read_text().index('"triton"')
    assert path.read_text().index('"a"') < path.read_text().index('"b"')


def test_the_checked_in_file_keeps_the_promises():
    known, compilers = gates.read()
    assert compilers.keys() == {"nvcc", "triton"}
    targets = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]
    assert {f"cuda {target}" for target in targets} <= known.keys()
    for section, rows in known.items():
        for kernel, row in rows.items():
            assert row.get("spills", 0) == row.get("local", 0) == 0, (section, kernel)
