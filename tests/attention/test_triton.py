"""The Triton attention without a GPU: its machine code by reading.

Its values: tests/test_triton_interpreter.py and, compiled, tests/ptx.

Nothing here runs on a GPU.  Compiled kernels are checked for what the toolchain tells: that they
compile for every target, that no register spills, and that Hopper's matrix instructions are used.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

_triton = pytest.importorskip(
    "kernels._triton", reason="triton is not installed", exc_type=ImportError
)
from kernels.attention import triton as backend  # noqa: E402
from kernels.attention.decode import triton as decode  # noqa: E402
from kernels.attention.pattern import Pattern, Scaling  # noqa: E402
from tests.triton_code import spilled  # noqa: E402

FEATURES = ("mask", "alibi", "softcap", "dropout", "globals")

# (target, dims, dtype, features): widths of the tables in whole vectors, and what needs more
# registers: the widest rows, rows without vectors.  float32 is in the sweep.
VARIANTS = {
    "sm_80": ((64, 64), torch.bfloat16, ()),
    "sm_90": ((128, 128), torch.bfloat16, ()),
    "sm_100": ((256, 256), torch.bfloat16, ()),
    "sm_120": ((63, 33), torch.bfloat16, ()),
    "gfx942": ((64, 64), torch.bfloat16, ()),
    "gfx950": ((128, 128), torch.bfloat16, ()),
}
COMPILED = [(target, *variant) for target, variant in VARIANTS.items()]
# (target, dtype of the cache): by default the cache that CACHES names, the rest in the sweep.
CACHES = {
    "sm_80": torch.bfloat16,
    "sm_90": torch.int8,
    "sm_120": torch.bfloat16,
    "gfx942": torch.int8,
}
DECODED = [
    pytest.param(target, cache, marks=[pytest.mark.sweep] * (CACHES.get(target) != cache))
    for target, cache in itertools.product(_triton.TARGETS, (torch.bfloat16, torch.int8))
]
# All of the tables, and each feature alone.
WIDTHS = [(dim, dim) for dim in (64, 128, 256)]
EVERYTHING = [
    (target, dims, dtype, features)
    for target in _triton.TARGETS
    for dims in WIDTHS
    for dtype in (torch.bfloat16, torch.float32)
    for features in ((), *((feature,) for feature in FEATURES))
]


def compiled(target, dims, dtype, features=(), length=300):
    """The kernels that a causal forward and backward launch on `target`."""
    query, value = (torch.empty(1, 2, length, dim, dtype=dtype) for dim in dims)
    has = dict.fromkeys(features, True).get
    mask = torch.empty(1, 2, length, length, dtype=dtype) if has("mask") else None
    slopes = torch.empty(1, 2) if has("alibi") else None
    marked = torch.ones(1, length, dtype=torch.bool) if has("globals") else None
    seed = torch.tensor([1]) if has("dropout") else None
    pattern = Pattern(1, 0, 50 if has("globals") else -1, -1, 0, length, length)
    scaling = Scaling(1.0, 5.0 if has("softcap") else 0.0, 0.1 if has("dropout") else 0.0)
    call = query, query, value, mask, slopes, None, marked, seed, None, None, pattern, scaling
    with _triton.compile_only(target) as kernels:
        out, lse = backend.forward(*call)
        backend.backward(out, None, *call, out, lse, (True, True, True, False, False))
    return kernels


@pytest.mark.parametrize(
    ("target", "dims", "dtype", "features"),
    # gfx942 has the registers of gfx950, sm_80 those of sm_120
    [
        pytest.param(*each, marks=[pytest.mark.sweep] * (each[0] in ("gfx950", "sm_120")))
        for each in COMPILED
    ],
    ids=str,
)
def test_compiles_without_spills(target, dims, dtype, features):
    kernels = compiled(target, dims, dtype, features)
    names = {kernel.name for kernel in kernels}
    assert names >= {"_forward_kernel", "_delta_kernel", "dkv_kernel", "dq_kernel"}
    assert spilled(kernels) == {}


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (128, torch.bfloat16),
        pytest.param(64, torch.bfloat16, marks=pytest.mark.sweep),
        pytest.param(64, torch.float16, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_hopper_multiplies_by_warp_groups(dim, dtype):
    """Both loops of a kernel hold both (dk/dv: four) products as wgmma, and none as mma."""
    for kernel in compiled("sm_90", (dim, dim), dtype):
        text = kernel.file("ptx").read_text()
        assert "mma.sync" not in text
        if kernel.name != "_delta_kernel":
            groups = text.count("wgmma.commit_group")
            assert (
                groups >= 2 * {"_forward_kernel": 2, "dkv_kernel": 4, "dq_kernel": 3}[kernel.name]
            )


@pytest.mark.sweep
@pytest.mark.parametrize(("target", "dims", "dtype", "features"), EVERYTHING, ids=str)
def test_everything_compiles_without_spills(target, dims, dtype, features):
    assert spilled(compiled(target, dims, dtype, features)) == {}


def test_plain_blocks_carry_no_mask():
    """The loop over plain blocks compares no tensors, the one over edges does."""
    (forward, *_) = compiled("sm_80", (64, 64), torch.bfloat16)
    loops = forward.file("ttgir").read_text().split("scf.for")[1:]
    plain, edges = (loop.split("scf.yield")[0] for loop in loops)
    assert not re.search(r"arith\.cmp[if].*tensor<", plain)
    assert re.search(r"arith\.cmpi.*tensor<", edges)


def test_numbers_are_no_reason_to_compile_again():
    with _triton.compile_only("sm_80") as kernels:
        for length, heads, causal, window in [(1, 1, 0, -1), (16, 2, 1, -1), (300, 3, 1, 16)]:
            x = torch.empty(2, heads, length, 64, dtype=torch.bfloat16)
            pattern = Pattern(causal, 0, window, -1, 0, length, length)
            for query in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
                backend.forward(query, x, x, *(None,) * 7, pattern, Scaling(0.125, 0.0, 0.0))
    assert len(kernels) == 1


def decode_kernels(target, dtype, cache, dim=128, paged=True):
    # One sequence and one key head, so that the single multiprocessor here shares out the keys.
    query = torch.empty(1, 4, 1, dim, dtype=dtype)
    keys = torch.empty(40, 1, 16, dim, dtype=cache)
    scale = torch.empty(40, 1, 16) if cache == torch.int8 else None
    lengths, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 200, dtype=torch.int32)
    if not paged:
        keys, table = torch.empty(1, 1, 3200, dim, dtype=cache), None
        scale = torch.empty(1, 1, 3200) if cache == torch.int8 else None
    pattern, scaling = Pattern(1, 1, -1, -1, 0, 1, 3200), Scaling(1.0, 0.0, 0.0)
    with _triton.compile_only(target) as kernels:
        decode.forward(
            query, keys, keys, lengths, table, scale, scale, None, None, pattern, scaling
        )
    return kernels


@pytest.mark.parametrize(("target", "cache"), DECODED, ids=str)
def test_decode_compiles_without_spills(target, cache):
    kernels = decode_kernels(target, torch.bfloat16, cache)
    assert [kernel.name for kernel in kernels] == ["_share_kernel", "_combine_kernel"]
    assert spilled(kernels) == {}


def test_refused():
    x = torch.randn(1, 1, 4, 8)
    rest = (*(None,) * 7, Pattern(0, 0, -1, -1, 0, 4, 4), Scaling(1.0, 0.0, 0.0))
    assert "not on a GPU" in backend.unsupported(x, x, x, *rest)
    with _triton.compile_only("sm_80"):
        assert "float64" in backend.unsupported(x.double(), x.double(), x.double(), *rest)
        assert backend.unsupported(x.bfloat16(), x, x, *rest) is None
        wide = torch.empty(1, 1, 4, 257)
        assert "256" in backend.unsupported(wide, wide, x, *rest)
