"""Rows as int8 by the CPU backend, with every instruction set: the rule to the bit; layer norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.int8_matmul.rows import cpu, reference
from tests.int8_matmul.cpu_cases import DTYPES, instruction_set, needs_module
from tests.tolerance import assert_as_exact_as_torch

__all__ = ["instruction_set"]  # a fixture

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), needs_module]

# Rests of 4, 8 and 16 lanes, unrolled or not; longer than what layer norm sums up in float.
COLS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 100, 129, 1000, 20_000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_scales_are_the_rules(instruction_set, dtype):
    for cols in COLS:
        x = torch.randn(9, cols + 2).to(dtype)[:, 1:-1]
        x[1], x[2, 0], x[3, -1], x[4] = 0, torch.nan, -torch.inf, x[4] * 1e-38
        x[5, cols // 2], x[6] = torch.inf, x[6].sign() * torch.finfo(dtype).max
        got, want = (f(x, False, None, None, 0.0) for f in (cpu.forward, reference.forward))
        assert torch.equal(got[0], want[0]), cols
        assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32)), cols


def test_ties_go_to_the_even_integer(instruction_set):
    x = torch.arange(-127.0, 127.5, 0.5)[None]  # the scale is 1
    values, scale = cpu.forward(x, False, None, None, 0.0)
    assert scale.item() == 1
    assert torch.equal(values, x.round().to(torch.int8))


def test_the_product_is_rounded_before_it_is_made_an_integer(instruction_set):
    # Rounded once, x * (127 / largest) may lie on the other side of a half.
    largest = torch.tensor([0.7, 1.3, 3.1, 5.7, 9.3])[:, None]
    limit = torch.full_like(largest, 127)  # by tensors: division by a number may be multiplication
    inverse = limit / largest
    near = [(torch.arange(-120, 120) + 0.5) / inverse]
    for _ in range(2):
        below = torch.nextafter(near[0], torch.tensor(-10.0))
        near = [below, *near, torch.nextafter(near[-1], torch.tensor(10.0))]
    x = torch.cat([largest, *near], 1)
    values, scale = cpu.forward(x, False, None, None, 0.0)
    assert torch.equal(values, (x * inverse).round().to(torch.int8))
    assert torch.equal(scale, (largest / limit)[:, 0])
    once = (x.double() * inverse).round().to(torch.int8)
    assert not torch.equal(values, once)  # or the values above would show nothing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ["none", "both", "weight", "bias"])
def test_layer_norm_before(instruction_set, dtype, parameters):
    for cols in COLS:
        x = (torch.randn(5, cols + 2) * 3 + 7).to(dtype)[:, 1:-1]
        weight = torch.randn(cols).to(dtype) if parameters in ("both", "weight") else None
        bias = torch.randn(cols) if parameters in ("both", "bias") else None
        values, scale = cpu.forward(x, True, weight, bias, 1e-5)
        y = F.layer_norm(
            x.double(),
            (cols,),
            None if weight is None else weight.double(),
            None if bias is None else bias.double(),
            1e-5,
        )
        if cols == 1:  # nothing but rounding is left of x - mean
            assert torch.equal(values, reference.forward(x, True, weight, bias, 1e-5)[0])
            continue
        want = y.abs().amax(1) / 127
        assert ((scale - want).abs() <= 2e-6 * want).all(), cols
        assert ((values - y / want[:, None]).abs() <= 0.5 + 1e-3).all(), cols


def test_layer_norm_of_rows_far_from_zero(instruction_set):
    x = torch.randn(4, 1000) + torch.tensor([0.0, 1e3, -1e4, 1e5])[:, None]
    values, scale = cpu.forward(x, True, None, None, 1e-5)
    y, plain = (F.layer_norm(rows, (1000,), eps=1e-5) for rows in (x.double(), x))
    for row in range(4):
        want, torchs = (largest.abs().amax() / 127 for largest in (y[row], plain[row]))
        assert_as_exact_as_torch((scale[row],), (torchs,), (want,), ("scale",))
        allowed = 0.5 + 127 * (2 * (plain[row] - y[row]).abs().max() / (127 * want) + 1e-6)
        assert ((values[row] - y[row] / want).abs() <= allowed).all()


def test_layer_norm_of_rows_that_are_not_finite(instruction_set):
    x = torch.randn(4, 70)
    x[0, 3], x[1, 69], x[2] = torch.nan, torch.inf, 5.0
    values, scale = cpu.forward(x, True, None, torch.zeros(70), 1e-5)
    assert scale[:2].isnan().all()
    assert (values[:2] == 0).all()
    assert scale[2] == 1  # a row of equal values is a row of zeros
    assert (values[2] == 0).all()
    assert scale[3] > 0


def test_the_number_of_threads_changes_nothing(instruction_set):
    x = torch.randn(100, 700)
    threads = torch.get_num_threads()
    try:
        for normalized in (False, True):
            results = []
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append(cpu.forward(x, normalized, None, None, 1e-5))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_refusals():
    x = torch.randn(2, 3)
    assert cpu.unsupported(x, True, None, None, 1e-5) is None
    assert "x is torch.float64" in str(cpu.unsupported(x.double(), False, None, None, 0.0))
    assert "weight is torch.int64" in str(cpu.unsupported(x, True, torch.ones(3).long(), None, 0.0))
    assert "x is on meta" in str(cpu.unsupported(x.to("meta"), False, None, None, 0.0))
