"""The CPU backend of attention with every instruction set of this machine, against float64.

The oracle is the reference in float64, the yardstick the same formula on tensors of the same dtype;
the tolerance is the rule in tests/tolerance.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import _native
from kernels.attention import cpu, reference
from tests.attention.calls import NAMES, Arguments, arguments, run
from tests.tolerance import assert_as_exact_as_torch

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    pytest.mark.skipif(isinstance(_native.cpu, str), reason=str(_native.cpu)),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTRUCTION_SETS = [] if isinstance(_native.cpu, str) else _native.cpu.instruction_sets()


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.cpu.instruction_set()
    _native.cpu.use_instruction_set(request.param)
    yield request.param
    _native.cpu.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(dtype: torch.dtype, **options: Any) -> None:
    call = arguments(dtype, **options)
    ours = run(cpu, call)
    assert [t.dtype for t in ours if t is not None][:1] == [dtype]
    exact = run(reference, call.to(torch.float64))
    assert_as_exact_as_torch(ours, run(reference, call), exact, NAMES, cancelled(call, exact))


def cancelled(call: Arguments, exact: list[Tensor | None]) -> list[float]:
    """The sizes of the terms of gradients that are 0: where every query sees but one key, dP and
    delta are the same sum, and float64's own rounding is all there is to measure by."""
    query, key, value = call.forward[:3]
    sizes = [0.0] * len(NAMES)
    if not key.shape[2]:
        return sizes
    dp = call.dout.abs().max().item() * value.abs().max().item() * abs(call.forward[11].scale)
    for index, factor in ((2, key), (3, query)):
        size = dp * factor.abs().max().item()
        sizes[index] = size if exact[index].abs().max().item() < 1e-12 * size else 0.0
    return sizes


# (batch, heads, key heads, queries, keys, head dim, value dim): one element; lengths on both sides
# of a vector, a strip of 16, a block of 64 and of a group of 4 blocks; every residue class of head
# dims; fewer and more queries than keys; groups of heads; the largest head dims.  Small ones have a
# batch: the largest error of a few numbers, ours or PyTorch's, is a matter of luck.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 2, 2, 1, 70, 16, 16),
    (2, 1, 1, 15, 17, 3, 5),
    (8, 2, 1, 16, 16, 8, 24),
    (1, 3, 3, 33, 31, 17, 31),
    (1, 1, 1, 63, 65, 64, 64),
    (1, 2, 2, 65, 63, 80, 48),
    (2, 4, 2, 64, 128, 64, 32),
    (1, 6, 2, 130, 129, 33, 66),
    (1, 1, 1, 257, 300, 100, 128),
    (1, 1, 1, 66, 40, 256, 255),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(instruction_set, dtype, shape):
    check(dtype, shape=shape)
    check(dtype, shape=shape, causal=True)


@pytest.mark.parametrize("dim", range(1, 50, 3))
def test_head_dims(dim):
    check(torch.float32, shape=(1, 1, 1, 20, 21, dim, 50 - dim), causal=True)
    check(torch.bfloat16, shape=(1, 1, 1, 20, 21, 50 - dim, dim), causal=True)


PATTERNS = {
    "lower right": {"causal": True, "lower_right": True},
    "window": {"causal": True, "left": 50},
    "window of blocks": {"causal": True, "left": 63, "lower_right": True},
    "one key": {"left": 0, "right": 0},
    "both sides": {"left": 20, "right": 70},
    "right only": {"right": 5, "lower_right": True},
    "globals": {"left": 30, "right": 10, "global_tokens": 5, "lower_right": True},
    "causal globals": {"left": 30, "causal": True, "global_tokens": 17},
    "global mask": {"left": 9, "right": 30, "global_share": 0.03},
    "causal global mask": {"left": 40, "causal": True, "global_tokens": 2, "global_share": 0.02},
    "all global": {"left": 1, "right": 1, "global_tokens": 1000},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_patterns(instruction_set, dtype, pattern):
    check(dtype, shape=(2, 2, 1, 280, 300, 32, 16), **PATTERNS[pattern])
    check(dtype, shape=(1, 1, 1, 300, 190, 16, 32), **PATTERNS[pattern])


FEATURES = {
    "bool mask": {"mask": "bool"},
    "bool mask for all heads": {"mask": "bool heads"},
    "padding mask": {"mask": "padding"},
    "float mask": {"mask": "float"},
    "float mask per query": {"mask": "query"},
    "float mask of one value": {"mask": "one"},
    "float mask in the dtype": {"mask": "same dtype"},
    "softcap": {"softcap": 2.0, "causal": True},
    "small softcap": {"softcap": 0.3},
    "alibi": {"alibi": True, "causal": True, "lower_right": True},
    "alibi both ways": {"alibi": True},
    "sinks": {"sinks": True, "causal": True},
    "dlse": {"dlse": True, "causal": True},
    "dropout": {"dropout": 0.3, "causal": True},
    "little dropout": {"dropout": 1e-5},
    "drop all": {"dropout": 1.0},
    "no scale": {"scale": 0.0},
    "negative scale": {"scale": -0.5},
    "large scores": {"scale": 5.0, "causal": True},
    "all": {
        "mask": "float",
        "softcap": 5.0,
        "alibi": True,
        "sinks": True,
        "dlse": True,
        "dropout": 0.2,
        "left": 40,
        "right": 70,
    },
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features(instruction_set, dtype, feature):
    check(dtype, shape=(2, 2, 1, 90, 130, 32, 24), **FEATURES[feature])


@pytest.mark.parametrize("lower_right", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(instruction_set, dtype, lower_right):
    # No keys, no queries, neither, one of each, more than a tile.
    lengths = ([5, 0, 0, 1, 70, 130], [0, 9, 0, 1, 90, 65])
    options = {
        "lengths": lengths,
        "alibi": True,
        "dropout": 0.2,
        "dlse": True,
        "lower_right": lower_right,
    }
    check(dtype, shape=(1, 4, 2, 206, 165, 16, 24), causal=True, **options)
    check(dtype, shape=(1, 2, 2, 206, 165, 16, 24), left=20, right=3, global_tokens=2, **options)


def test_random_combinations():
    choices = random.Random(7)
    for number in range(60):
        queries, keys = choices.randint(1, 200), choices.randint(0, 200)
        kv_heads = choices.choice((1, 2))
        check(
            choices.choice(DTYPES),
            seed=number,
            shape=(
                choices.choice((1, 2)),
                kv_heads * choices.choice((1, 3)),
                kv_heads,
                queries,
                keys,
                choices.randint(1, 70),
                choices.randint(1, 70),
            ),
            layout=choices.choice(("BHTD", "BTHD", "sliced")),
            causal=choices.random() < 0.5,
            lower_right=choices.random() < 0.5,
            left=choices.choice((-1, -1, 0, 7, 64, 100)),
            right=choices.choice((-1, -1, 0, 20)),
            global_tokens=choices.choice((0, 0, 3, 70)),
            global_share=choices.choice((0.0, 0.0, 0.05)),
            mask=choices.choice((None, None, "bool", "float")),
            softcap=choices.choice((0.0, 0.0, 3.0)),
            alibi=choices.random() < 0.3,
            sinks=choices.random() < 0.3,
            dropout=choices.choice((0.0, 0.0, 0.5)),
            dlse=choices.random() < 0.3,
        )


@pytest.mark.parametrize("layout", ["BTHD", "sliced", "expanded", "far apart", "odd offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(instruction_set, dtype, layout):
    check(dtype, shape=(2, 4, 4, 80, 90, 32, 32), layout=layout, causal=True)
    check(dtype, shape=(2, 2, 2, 80, 90, 7, 9), layout=layout)


def test_layout_of_results():
    for layout, transposed in (("BHTD", False), ("BTHD", True)):
        call = arguments(torch.float32, shape=(2, 3, 3, 5, 6, 8, 4), layout=layout)
        out, lse, *gradients = run(cpu, call)
        assert lse.is_contiguous()
        for result in (out, *gradients[:3]):
            assert (result.transpose(1, 2) if transposed else result).is_contiguous()


def copies(call: Arguments) -> list[Tensor | None]:
    return [
        x.clone() if isinstance(x, Tensor) else None for x in (call.dout, call.dlse, *call.forward)
    ]


def test_inputs_are_left_alone(instruction_set):
    options = {
        "mask": "float",
        "alibi": True,
        "sinks": True,
        "dlse": True,
        "dropout": 0.1,
        "layout": "sliced",
    }
    call = arguments(torch.float32, shape=(2, 2, 2, 70, 80, 20, 20), **options)
    before = copies(call)
    run(cpu, call)
    for old, new in zip(before, copies(call), strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)


THREADED = {
    "few heads": {"shape": (1, 3, 3, 700, 700, 32, 32), "causal": True},
    "one head": {"shape": (1, 1, 1, 1100, 900, 16, 24), "causal": True, "lower_right": True},
    "not causal": {"shape": (1, 1, 1, 600, 1000, 20, 20), "dlse": True},
    "window": {"shape": (1, 1, 1, 900, 900, 16, 16), "left": 100, "right": 70, "global_tokens": 3},
    "groups": {"shape": (1, 6, 1, 300, 520, 16, 16), "causal": True, "sinks": True, "dropout": 0.1},
    "packed": {
        "shape": (1, 2, 1, 900, 900, 16, 16),
        "lengths": ([300, 0, 600], [10, 290, 600]),
        "causal": True,
    },
}


@pytest.mark.parametrize("case", THREADED)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_number_of_threads_gives_the_same_bits(threads, dtype, case):
    call = arguments(dtype, **THREADED[case])
    torch.set_num_threads(1)
    first = run(cpu, call)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        for one, other in zip(first, run(cpu, call), strict=True):
            assert one is None or torch.equal(one, other), f"{count} threads"
    check(dtype, **THREADED[case])


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_only_the_gradients_asked_for(instruction_set, threads, wanted):
    call = arguments(torch.float32, shape=(1, 2, 1, 150, 160, 20, 30), causal=True)
    call16 = call.to(torch.bfloat16)
    for c in (call, call16):
        for count in (1, 2):
            torch.set_num_threads(count)
            full = run(cpu, c)[2:5]
            part = run(cpu, c, output_mask=(*map(bool, wanted), False, False))[2:5]
            for asked, one, other in zip(wanted, full, part, strict=True):
                assert torch.equal(one, other) if asked else other is None


def test_no_keys(instruction_set):
    for sinks in (False, True):
        call = arguments(torch.float32, shape=(2, 2, 1, 5, 0, 8, 8), sinks=sinks, dlse=True)
        out, lse, dquery, dkey, dvalue, dsinks = run(cpu, call)
        assert not out.any()
        assert not dquery.any()
        assert dkey.shape == dvalue.shape == (2, 1, 0, 8)
        if sinks:
            torch.testing.assert_close(lse, call.forward[5][:, None].expand(2, 2, 5))
            torch.testing.assert_close(dsinks, call.dlse.sum((0, 2)))
        else:
            assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing(instruction_set, dtype):
    call = arguments(dtype, shape=(1, 2, 2, 100, 100, 16, 16), mask="bool", dlse=True)
    call.forward[3][:, :, 40:75] = False
    out, lse, dquery, *_ = run(cpu, call)
    assert not out[:, :, 40:75].any()
    assert not dquery[:, :, 40:75].any()
    assert (lse[:, :, 40:75] == -torch.inf).all()
    exact, plain = run(reference, call.to(torch.float64)), run(reference, call)
    assert_as_exact_as_torch(run(cpu, call), plain, exact, NAMES)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_not_finite(instruction_set, place, value):
    """NaN reaches exactly the rows that it reaches in plain torch."""
    call = arguments(torch.float32, shape=(1, 1, 1, 150, 150, 16, 16), causal=True)
    call.forward[["query", "key", "value"].index(place)][0, 0, 100, 3] = value
    ours, plain = run(cpu, call)[:2], run(reference, call)[:2]
    # Hidden values times 0 are NaN: everywhere in plain torch, in strips of 16 keys in a kernel.
    compared = slice(100, None) if place == "value" else slice(None)
    for one, other, name in zip(ours, plain, NAMES, strict=False):
        assert torch.equal(one[0, 0, compared].isnan(), other[0, 0, compared].isnan()), name
        assert not one[0, 0, :96].isnan().any()


def test_mask_of_the_lowest_finite_number(instruction_set):
    """Rows of torch.finfo.min everywhere are averages, as in PyTorch; not 0 and not NaN."""
    call = arguments(torch.float32, shape=(1, 1, 1, 20, 70, 16, 16), mask="float")
    call.forward[3][:, :, 5:9] = torch.finfo(torch.float32).min
    call.forward[3][:, :, 12, 30:] = torch.finfo(torch.float32).min
    query, key, value, mask = call.forward[:4]
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(run(cpu, call)[0], want)


def test_what_is_refused():
    call = arguments(torch.float32, shape=(1, 1, 1, 4, 4, 8, 8), mask="float").forward
    assert cpu.unsupported(*call) is None
    assert "requires a gradient" in cpu.unsupported(*call[:3], call[3].requires_grad_(), *call[4:])
    wide = torch.zeros(1, 1, 4, 257)
    assert "257 exceeds 256" in cpu.unsupported(wide, wide, *call[2:])
    assert "257 exceeds 256" in cpu.unsupported(*call[:2], wide, *call[3:])
    assert "torch.float64" in cpu.unsupported(call[0].double(), *call[1:])
