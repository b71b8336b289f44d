"""What the executor's tests of int8 matmul share: an oracle, calls of a backend, and bounds.

Integer sums are exact in every case.  With scales each element has a bound of its own, from
float64: a unit in the last place of the result's dtype, and float32's rounding of the terms it is
made of.
Scales, biases and rows differ from each other, so one taken from the wrong place shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ptx.conftest import spread
from tests.tolerance import assert_as_exact_as_torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("raw", "int8", "static", "dynamic", "weight_only")
QUANTISED = MODES[:4]  # those whose sums are integers
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")
FLOAT32_ERROR = 6e-7  # of a term: five roundings
# Of the terms of a sum of floats: a chain of additions as long as a lane's or a tile's.
SUM_ERROR = 2e-6


@dataclass(frozen=True)
class Options:
    mode: str = "int8"
    dtype: torch.dtype = torch.bfloat16  # of a float x
    out_dtype: torch.dtype = torch.float32
    bias: torch.dtype | None = None
    activation: str = "none"
    n_contiguous: bool = False  # the weight is the transpose of a (K, N) matrix
    per_tensor: bool = False  # one scale each
    gap: int = 0  # elements between the rows of x, and of the weight
    offset: int = 0  # elements before the first


def make_int8(rows: int, columns: int) -> Tensor:
    """Full range; -128 and 127 against each other in the first row and the last."""
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    values[0] = -128
    values[-1, ::2] = 127
    return values


def quantised_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values [M, K] as int8 and scales [M], by the rule; `scale`: the one that is given."""
    wide = x.float()
    largest = wide.abs().amax(1) if x.shape[1] else torch.zeros(len(x))
    finite = largest.isfinite()
    small = largest < 2.0**-120
    # Divided by a tensor: `127 / largest` would be 127 times the rounded 1 / largest.
    inverse, scales = torch.full_like(largest, 127) / largest, largest / 127
    if scale is not None:
        inverse, scales, small = 1 / scale.expand(len(x)), scale.repeat(len(x)), ~finite
    values = (wide * inverse[:, None]).round().clamp(-127, 127)
    values[~finite | small] = 0
    scales[small] = 1
    scales[~finite] = torch.nan
    return values.to(torch.int8), scales


def activated(x: Tensor, name: str) -> Tensor:
    if name == "relu":
        return x.relu()
    if name == "none":
        return x
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def arguments(m: int, n: int, k: int, options: Options) -> tuple:
    """Of `forward`: x, weight, x_scale, weight_scale, bias, activation, mode, out_dtype."""
    weight = make_int8(n, k)
    if options.n_contiguous:
        weight = spread(weight.t(), options.gap, options.offset).t()
    else:
        weight = spread(weight, options.gap, options.offset)
    x = make_int8(m, k)
    if options.mode not in ("raw", "int8"):
        x = (torch.randn(m, k) * torch.rand(m, 1).exp2() + torch.randn(1, k)).to(options.dtype)
    x = spread(x, options.gap, options.offset)
    if options.mode == "raw":
        return x, weight, None, None, None, "none", "raw", torch.int32
    sizes = (1, 1) if options.per_tensor else (m, n)
    x_scale, weight_scale = ((0.5 + torch.rand(size)) / 64 for size in sizes)
    if options.mode == "static":
        x_scale = torch.tensor([0.021])  # some of the numbers are beyond 127
    elif options.mode != "int8":
        x_scale = None
    bias = None if options.bias is None else (3 * torch.randn(n)).to(options.bias)
    return (
        x,
        weight,
        x_scale,
        weight_scale,
        bias,
        options.activation,
        options.mode,
        options.out_dtype,
    )


def exact(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    mode: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y [M, N] computed in `dtype`, and the size of the terms each element is summed from."""
    if mode == "weight_only":
        acc = x.to(dtype) @ weight.to(dtype).t()
        size = x.double().abs() @ weight.double().abs().t() * (SUM_ERROR / FLOAT32_ERROR)
        row_scale = torch.ones(1)
    else:
        if mode != "int8":
            x, x_scale = quantised_rows(x, x_scale)
        acc = (x.double() @ weight.double().t()).to(dtype)
        size = acc.double().abs()
        row_scale = x_scale
    scale = weight_scale.to(dtype) * row_scale.to(dtype)[:, None]
    shift = torch.zeros(1, dtype=dtype) if bias is None else bias.to(dtype)
    y = activated(acc * scale + shift, activation)
    return y, size * scale.double().abs() + shift.double().abs()


def check(backend: ModuleType, m: int, n: int, k: int, options: Options) -> Tensor:
    """Runs `forward` and holds every element against float64; the result."""
    given = arguments(m, n, k, options)
    check_call(backend, given)
    return given[0]


def check_call(backend: ModuleType, given: tuple) -> Tensor:
    x, weight, *_, activation, mode, out_dtype = given
    kept = [a.clone() if isinstance(a, Tensor) else a for a in given]
    assert backend.unsupported(*given) is None
    (got,) = backend.forward(*given)
    for before, after in zip(kept, given, strict=True):
        assert before is after or not isinstance(after, Tensor) or same(before, after)
    assert got.dtype == out_dtype
    assert got.is_contiguous()
    assert got.shape == (len(x), len(weight))
    if mode == "raw":
        want = (x.double() @ weight.double().t()).long()
        want = (want + 2**31) % 2**32 - 2**31  # as torch's integers
        wrong = (got.long() != want).nonzero()
        assert not len(wrong), f"{len(wrong)} sums are wrong, first at {wrong[0].tolist()}"
        return got
    want, terms = exact(*given[:-1], dtype=torch.float64)
    units = torch.finfo(out_dtype)
    allowed = units.eps * want.abs() + FLOAT32_ERROR * terms + units.smallest_normal * units.eps
    finite = want.to(out_dtype).isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.equal(got.isnan(), want.isnan())
    excess = torch.where(finite, (got.double() - want).abs() - allowed, -1.0)
    row, column = divmod(int(excess.argmax()), want.shape[1])
    assert excess.max() <= 0, (
        f"y[{row}, {column}] is {got[row, column].item():.9g}, exactly "
        f"{want[row, column].item():.9g}, {excess.max().item():.1e} too far"
    )
    if finite.all():
        torchs = exact(*given[:-1], dtype=torch.float32)[0].to(out_dtype)
        assert_as_exact_as_torch([got], [torchs], [want], ["y"], [float(terms.max())])
    return got


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def check_rows(
    backend: ModuleType,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    normalized: bool = False,
    eps: float = 1e-5,
) -> None:
    """Runs the op `int8_matmul.rows`: to the bit, or with layer norm to half a step."""
    kept = x.clone()
    given = x, normalized, weight, bias, eps
    assert backend.unsupported(*given) is None
    values, scales = backend.forward(*given)
    assert same(x, kept)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert values.shape == x.shape
    assert scales.shape == x.shape[:1]
    assert values.is_contiguous()
    if not normalized:
        want, want_scales = quantised_rows(x)
        assert torch.equal(values, want)
        torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
        return
    wide = x.double()
    y = F.layer_norm(
        wide,
        x.shape[1:],
        None if weight is None else weight.double(),
        None if bias is None else bias.double(),
        eps,
    )
    finite = y.isfinite().all(1)
    assert torch.equal(scales.isfinite(), finite)
    assert not values[~finite].any()
    y, values, scales = y[finite], values[finite].double(), scales[finite].double()
    largest = y.abs().amax(1)
    zero = largest < 2.0**-120
    assert torch.equal(scales[zero], torch.ones(int(zero.sum())).double())
    assert not values[zero].any()
    # Of the normalised number: what float32 leaves of a row whose mean is far from zero.
    far = wide[finite].abs().amax(1) * (wide[finite].var(1, correction=0) + eps).rsqrt()
    error = 2e-6 * (largest + (far if weight is None else far * weight.double().abs().max()))
    assert ((scales - largest / 127).abs() <= error / 127)[~zero].all()
    off = (values * scales[:, None] - y).abs()
    assert (off <= 0.5001 * scales[:, None] + error[:, None])[~zero].all()
    assert (values.abs().amax(1) == 127)[~zero].all()


def check_rows_of_bias(backend: ModuleType, x: Tensor, dtype: torch.dtype) -> None:
    """With weights of 0 a normalised row is its bias: to the bit, down to what counts as zeros and
    up to what is infinite."""
    rows, cols = x.shape
    biases = torch.randn(6, cols)
    biases[0, -1] = -9
    biases[1:3] *= 2.0**-126
    biases[1, 5], biases[2, 5] = 2.0**-120, 2.0**-121
    biases[3, -1], biases[4, 0] = torch.inf, torch.nan
    for bias in biases.to(dtype):
        values, scales = backend.forward(x, True, torch.zeros(cols, dtype=dtype), bias, 1e-5)
        want, want_scales = quantised_rows(bias.expand(rows, cols))
        assert torch.equal(values, want)
        torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)


def check_rows_of_equal_numbers(backend: ModuleType, rows: int, cols: int) -> None:
    """Their bias, too: what rounding took from the first mean is put right. Without that each of
    the mean's last places shows 300 times larger, here as 2e-3 of the largest."""
    x = (torch.rand(rows, 1) + 100).expand(rows, cols).contiguous()
    bias = torch.rand(cols) / 64
    values, scales = backend.forward(x, True, torch.ones(cols), bias, 1e-5)
    want = bias.double().expand(rows, cols)
    torch.testing.assert_close(scales.double(), want.amax(1) / 127, rtol=1e-3, atol=0)
    assert ((values * scales[:, None] - want).abs() <= 0.501 * scales[:, None]).all()
