"""The rule itself: it must see wrong values, infinities, NaN and shapes."""

import math

import pytest
import torch

from kernels import _accuracy


def test_error_is_relative_to_the_largest_value():
    want = torch.tensor([1.0, -10.0], dtype=torch.float64)
    assert _accuracy.error(torch.tensor([1.5, -10.0]), want) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([math.nan, 1.0], [2.0, 1.0]),
        ([2.0, 1.0], [math.nan, 1.0]),
        ([math.inf, 1.0], [-math.inf, 1.0]),
        ([3.0, 1.0], [math.inf, 1.0]),
        ([math.inf, 1.0], [3.0, 1.0]),
        ([math.nan, 1.0], [math.inf, 1.0]),
    ],
)
def test_non_finite_values_must_agree(got, want):
    error = _accuracy.error(torch.tensor(got), torch.tensor(want, dtype=torch.float64))
    assert error == math.inf


def test_equal_non_finite_values_count_as_exact():
    values = torch.tensor([math.nan, math.inf, -math.inf, 2.0], dtype=torch.float64)
    assert _accuracy.error(values.float(), values) == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        _accuracy.error(torch.zeros(1, 2), torch.zeros(2, 1, dtype=torch.float64))


def test_an_empty_result_is_exact():
    assert _accuracy.error(torch.zeros(0), torch.zeros(0, dtype=torch.float64)) == 0


def test_where_terms_cancel_their_size_counts():
    want = torch.tensor([1e-14], dtype=torch.float64)
    assert _accuracy.error(torch.zeros(1), want) == 1
    assert _accuracy.error(torch.zeros(1), want, terms=2.0) == pytest.approx(5e-15)
