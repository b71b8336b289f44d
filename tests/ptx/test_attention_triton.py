"""The Triton attention's compiled code on the executor: values, gradients, and no report at all.

A kernel is compiled anew for dtypes, BLOCK_D, elements of a vector and which features there are;
lengths, window, causality, heads and strides are numbers to it.  So few kernels serve many calls:
each group below shares one set.  Their tiles are small, which keeps compiling cheap; the tiles that
are shipped run under `-m sweep`, on both architectures and all schedules.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import ptx
from tests.attention.triton_calls import Call, Decode, check, check_decode

pytest.importorskip("triton")
from kernels.attention import triton as forward_module
from kernels.attention import triton_dkv, triton_dq

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

ARCHS = ("sm_80", "sm_90a")
SCHEDULES = ("round_robin", "reverse", "random")
KERNELS = {"_forward_kernel", "_delta_kernel", "dkv_kernel", "dq_kernel"}

# Of whole blocks, edges and ragged ends; GQA; every position of the diagonal; strides.
PLAIN = [
    Call(64, 64, heads=(1, 1)),
    Call(65, 130, heads=(4, 2)),
    Call(1, 1, causal=True),
    Call(130, 130, causal=True, heads_last=True, batch=2),
    Call(70, 150, causal=True, lower_right=True),
    Call(150, 70, causal=True, lower_right=True),
    Call(150, 150, window=(94, 30)),  # the last key of a block is just not seen
    Call(150, 150, causal=True, window=(64, -1)),
    Call(5, 0),
]
GLOBAL = [
    Call(150, 150, (7, 9), window=(20, 10), global_share=0.1, dropout_p=0.2),
    Call(150, 130, (7, 9), causal=True, window=(20, -1), global_share=0.05, global_tokens=3,
         lower_right=True, dropout_p=0.2, batch=2),
]  # fmt: skip
SCORED = [
    Call(100, 70, (24, 16), mask=torch.float32, alibi=True, sinks=True, softcap=4.0, dropout_p=0.3),
    Call(70, 100, (24, 16), causal=True, lower_right=True, mask=torch.float32, alibi=True,
         sinks=True, softcap=30.0, dropout_p=0.5, batch=2),
]  # fmt: skip
LENGTHS = (65, 0, 40, 15), (20, 5, 40, 25)
PACKED = [  # float32: products in slices of 16 columns, of which the last is not whole
    Call(120, 90, (24, 16), causal=True, lower_right=True, sinks=True, lengths=LENGTHS),
    Call(120, 90, (24, 16), window=(9, 3), sinks=True, lengths=LENGTHS),
]
MASKED = [Call(70, 80, mask=torch.bool, batch=2), Call(80, 80, mask=torch.bool, causal=True)]
GROUPS = {
    "plain, bfloat16": ("sm_80", torch.bfloat16, PLAIN),
    "plain, float16": ("sm_90a", torch.float16, PLAIN),
    "globals, dropout, no vectors": ("sm_90a", torch.bfloat16, GLOBAL),
    "everything in the scores": ("sm_80", torch.float16, SCORED),
    "packed, float32": ("sm_90a", torch.float32, PACKED),
    "bool mask": ("sm_90a", torch.bfloat16, MASKED),
}
DECODES = {
    "pages": ("sm_80", torch.bfloat16, Decode(500, (500, 0), 2, page_size=16)),
    "int8": ("sm_90a", torch.float16, Decode(600, (600, 77), cache=torch.int8)),
}


def run(call, dtype, arch, schedule) -> set[str]:
    """The kernels launched; everything about them was right."""
    with ptx.run(arch, schedule=schedule, seed=call.length_q) as session:
        check(call, dtype)
    assert not any(launch.reports for launch in session.launches)
    return {launch.name for launch in session.launches}


@pytest.fixture
def small_tiles(monkeypatch):
    """64 queries and 32 keys, the least that Hopper's matrix instructions take."""
    tiles = {
        forward_module: (64, 32, 4, 2),
        triton_dq: (64, 32, 4, 2),
        triton_dkv: (32, 64, 4, 2),
    }
    for module, tile in tiles.items():
        rows = (2, 256, 0, *tile, 0), (4, 256, 0, *tile, 16)
        monkeypatch.setattr(module, "TILES", dict.fromkeys(module.TILES, rows))


@pytest.mark.parametrize(
    "group",
    # float16 runs by default with everything in the scores
    [pytest.param(g, marks=[pytest.mark.sweep] * (g == "plain, float16")) for g in GROUPS],
)
def test_values_and_gradients(small_tiles, group):
    arch, dtype, calls = GROUPS[group]
    names = set()
    for call, schedule in zip(calls, itertools.cycle(SCHEDULES)):
        names |= run(call, dtype, arch, schedule)
    assert names - {"list_globals_kernel"} == KERNELS


@pytest.mark.parametrize("name", DECODES)
def test_decode(name):
    arch, dtype, call = DECODES[name]
    for schedule in SCHEDULES:
        with ptx.run(arch, schedule=schedule) as session:
            check_decode(call, dtype)
        assert not any(launch.reports for launch in session.launches)


def test_keys_are_read_once_per_block_of_queries(small_tiles):
    """Causal, 256 positions: block n of queries reads the keys up to its end, and nothing twice."""
    call = Call(256, 256, causal=True, heads=(1, 1))
    with ptx.run("sm_80") as session:
        check(call, torch.bfloat16)
    (forward,) = [launch for launch in session.launches if launch.name == "_forward_kernel"]
    blocks = 256 // 64
    rows = sum(64 * (n + 1) for n in range(blocks))
    loaded = sum(
        site["bytes"]
        for site in forward.sites
        if site["space"] == "global" and site["access"] == "read"
    )
    row_bytes = 16 * 2
    assert loaded == (256 + 2 * rows) * row_bytes
    assert forward.counts["shared_wavefronts"] == forward.counts["shared_ideal_wavefronts"]


def test_what_no_query_sees_is_not_read(small_tiles):
    """A window of 32 over 1024 positions reads a few keys for each query, not all of them."""
    read = {}
    for length in (512, 1024):
        call = Call(length, length, causal=True, window=(32, -1), heads=(1, 1))
        with ptx.run("sm_80") as session:
            check(call, torch.bfloat16)
        for launch in session.launches:
            bytes_read = launch.counts["global_load_bytes"]
            assert bytes_read <= 8 * length * 16 * 2 * 2, launch.name
            read.setdefault(launch.name, []).append(bytes_read)
    for name, (half, whole) in read.items():
        assert whole <= 2.1 * half, name


@pytest.mark.sweep
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (33, 65), (64, 64), (128, 128), (80, 256)], ids=str)
def test_shipped_tiles(dims, dtype, arch, schedule):
    for call in (
        Call(200, 200, dims, causal=True, heads=(2, 1)),
        Call(130, 257, dims, window=(70, 9), global_share=0.02, heads=(1, 1)),
        Call(100, 120, dims, mask=torch.bool, alibi=True, sinks=True, softcap=9.0, dropout_p=0.1),
    ):
        run(call, dtype, arch, schedule)


@pytest.mark.sweep
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_everywhere(group, schedule):
    _, _, calls = GROUPS[group]
    dtypes = torch.bfloat16, torch.float16, torch.float32
    for call, arch, dtype in itertools.product(calls, ARCHS, dtypes):
        run(call, dtype, arch, schedule)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "cache", [torch.bfloat16, torch.float16, torch.float32, torch.int8], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_decode_everywhere(dtype, cache, arch):
    calls = [
        Decode(600, (600, 33), 3, (40, 72), page_size=32, cache=cache, softcap=5.0),
        Decode(
            300, (300, 7), 2, (16, 128), heads=(32, 2), cache=cache, features=("alibi", "sinks")
        ),
        Decode(400, (400, 5), 2, window=(50, 0), global_tokens=9, cache=cache, causal=False),
    ]
    for call, schedule in zip(calls, SCHEDULES, strict=True):
        with ptx.run(arch, schedule=schedule) as session:
            check_decode(call, dtype)
        assert not any(launch.reports for launch in session.launches)
