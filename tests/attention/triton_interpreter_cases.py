"""Values and gradients of the Triton attention in Triton's interpreter, for TRITON_INTERPRET=1.

The interpreter must be on before the kernels are decorated, so this file runs in another process
(tests/test_triton_interpreter.py).
Blocks are of 32 queries and 32 keys, but for dk and dv of 16 keys where a head has more than 16
columns; there products come in slices of 16 columns, too.
"""

from __future__ import annotations

import pytest
import torch

from kernels.attention import triton as backend
from tests.attention.triton_calls import Call, Decode, check, check_decode

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

CALLS = {
    # One row, a block, one more than a block; plain blocks, edges, ragged ends; odd dims.
    "one of each": Call(1, 1, (1, 1)),
    "a block": Call(32, 32, (16, 32)),
    "ragged": Call(33, 65, (7, 20), heads=(2, 2)),
    "causal": Call(65, 65, (16, 24), causal=True, heads=(1, 1), heads_last=True),
    "lower right, more keys": Call(20, 70, causal=True, lower_right=True, heads=(2, 2)),
    "lower right, more queries": Call(70, 20, causal=True, lower_right=True, heads=(1, 1)),
    "upper left, more keys": Call(20, 70, causal=True, heads=(1, 1)),
    "no keys": Call(5, 0, sinks=True),
    # The window's edges fall within blocks and between them.
    "window": Call(100, 100, window=(20, 13), heads=(1, 1)),
    "window of blocks": Call(100, 100, window=(32, 31), heads=(1, 1)),
    "window short of two blocks and one": Call(100, 100, window=(62, 30), heads=(1, 1)),
    "causal window": Call(90, 100, causal=True, lower_right=True, window=(5, -1), heads=(1, 1)),
    "window of nothing but itself": Call(40, 40, window=(0, 0), heads=(1, 1)),
    "window past the keys": Call(80, 20, window=(10, 0), heads=(1, 1)),
    # Global positions: a prefix, more than a block, scattered; seen and seeing.
    "global prefix": Call(100, 90, window=(9, 4), global_tokens=5, heads=(1, 1)),
    "long global prefix": Call(80, 80, causal=True, window=(9, 4), global_tokens=40, heads=(1, 1)),
    "scattered": Call(70, 90, window=(9, 4), global_share=0.1, lower_right=True, heads=(1, 1)),
    "scattered, causal": Call(70, 70, causal=True, window=(9, 4), global_share=0.5, heads=(1, 1)),
    "both kinds of global": Call(
        50, 50, window=(3, 3), global_tokens=2, global_share=0.1, heads=(1, 1), batch=2
    ),
    "globals without a window": Call(40, 40, causal=True, global_tokens=7, heads=(1, 1)),
    # What joins the scores.
    "bool mask": Call(40, 50, mask=torch.bool, heads=(1, 1), batch=2),
    "float mask": Call(40, 50, mask=torch.float32, causal=True, heads=(1, 1)),
    "alibi, sinks": Call(40, 50, alibi=True, sinks=True, lower_right=True),
    "softcap": Call(50, 50, softcap=2.0, causal=True, heads=(1, 1)),
    "wide softcap": Call(20, 40, softcap=50.0, heads=(1, 1)),
    "negative scale": Call(20, 40, scale=-0.3, heads=(1, 1)),
    # Dropout with keys in a row and gathered.
    "dropout": Call(40, 70, dropout_p=0.3),
    "dropout for 16 keys": Call(30, 40, (16, 20), dropout_p=0.3, heads=(1, 1)),
    "dropout of everything": Call(10, 10, dropout_p=1.0),
    "dropout, globals": Call(50, 50, dropout_p=0.3, window=(5, 5), global_share=0.2, heads=(1, 1)),
    "everything": Call(
        40, 50, (9, 12), causal=True, lower_right=True, window=(9, -1), global_share=0.1,
        mask=torch.float32, alibi=True, sinks=True, softcap=3.0, dropout_p=0.2,
    ),
    # Packed sequences, of which some have no query or no key.
    "packed": Call(80, 70, lengths=((33, 0, 40, 7), (20, 10, 40, 0)), causal=True),
    "packed, all": Call(
        60, 70, lengths=((20, 40), (30, 40)), window=(5, 3), global_tokens=4, lower_right=True,
        alibi=True, sinks=True, dropout_p=0.2,
    ),
}  # fmt: skip
# What others hold as well, the executor's tests (tests/ptx) among them.
SWEPT = {
    "a block", "upper left, more keys", "lower right, more keys", "window of blocks",
    "window short of two blocks and one", "global prefix", "scattered, causal",
    "both kinds of global", "globals without a window", "wide softcap", "dropout", "packed",
    "causal", "window", "alibi, sinks", "bool mask", "dropout, globals", "ragged", "scattered",
    "long global prefix",
}  # fmt: skip


def by_name(names, swept):
    """Names as parameters; those of `swept` under `sweep`."""
    return [pytest.param(n, marks=pytest.mark.sweep if n in swept else ()) for n in names]


@pytest.mark.parametrize("name", by_name(CALLS, SWEPT))
def test_values_and_gradients(name):
    check(CALLS[name], torch.float32)


@pytest.mark.parametrize("name", by_name(["ragged", "causal window", "float mask"], ["ragged"]))
def test_float16(name):
    check(CALLS[name], torch.float16)


DECODES = {
    "shares": Decode(600, (600, 200)),
    "few keys": Decode(130, (130, 2), queries=3),
    "pages": Decode(200, (200, 0), page_size=16),
    "int8": Decode(150, (150, 70), page_size=32, cache=torch.int8),
    "window": Decode(300, (300, 100), queries=2, window=(20, 0), global_tokens=5, causal=False),
    "global queries": Decode(100, (40, 90), 3, window=(5, 1), global_tokens=50, causal=False),
    "all": Decode(600, (600, 200), 2, (7, 9), softcap=5.0, features=("alibi", "sinks")),
    "many rows": Decode(70, (70,), queries=3, heads=(40, 1)),
    "narrow cache": Decode(80, (80, 33), cache=torch.float16),
}


@pytest.mark.parametrize("name", by_name(DECODES, ["shares", "global queries", "many rows"]))
def test_decode(name):
    check_decode(DECODES[name], torch.float32)


@pytest.mark.sweep
def test_two_runs_give_the_same_bits():
    call = CALLS["dropout for 16 keys"]
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(check(call, torch.float32))
    assert all(a is b or torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_row_that_sees_nothing_gives_zeros():
    call = Call(70, 20, causal=True, lower_right=True)
    out, lse, dquery, *_ = check(call, torch.float32)
    assert not out[:, :, :50].any()
    assert not dquery[:, :, :50].any()
    assert (lse[:, :, :50] == -torch.inf).all()


def test_refused():
    call = Call(3, 3)
    query, key, value, _ = call.tensors(torch.float32)
    arguments = call.arguments(torch.float32)
    assert "bfloat16" in backend.unsupported(query.bfloat16(), key, value, *arguments)
    wide = torch.zeros(1, 1, 3, 257)
    assert "256" in backend.unsupported(wide, wide, wide, *arguments)
    mask = torch.zeros(1, 2, 3, 3, requires_grad=True)
    assert "gradient" in backend.unsupported(query, key, value, mask, *arguments[1:])
