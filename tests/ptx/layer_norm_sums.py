"""Layer norm on data in which every row sum decides the result, for a test-suite that would notice.

With independent random numbers the means that backward subtracts are near 0, the longer the row the
nearer: a kernel could add them up wrongly and dx would hardly change. Here they are 1 each, and dx
is what little remains. Rows are spiky, so that no two threads' partial sums are alike.
"""

from __future__ import annotations

import torch

from kernels import _accuracy
from kernels.layer_norm.op import choose

SHORTEST = 32  # columns: of a shorter row too little remains
REMAINS = 0.02


def check_sums(rows: int, cols: int, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    """Statistics, dx, dweight and dbias against float64, of what was rounded to the dtypes given.

    The bound is two units in the last place of the largest value, plus float32's rounding of the
    terms that cancel: stricter than the rule, for aten keeps 16-bit statistics on CPUs.
    """
    x = (torch.randn(rows, cols).pow(3) + 2).to(dtype)
    mean = x.double().mean(1, keepdim=True)
    rstd = 1 / torch.sqrt(x.double().var(1, correction=0, keepdim=True) + 1e-5)
    xhat = (x.double() - mean) * rstd
    weight = ((0.5 + torch.rand(cols)) * torch.randn(cols).sign()).to(parameter_dtype)
    bias = torch.randn(cols).to(parameter_dtype)
    dy = ((1 + xhat + REMAINS * torch.randn(rows, cols)) / weight).to(dtype)

    backend = choose(x, (cols,), weight, bias)
    y, statistics = backend.forward(x, (cols,), weight, bias, 1e-5)
    ours = backend.backward(dy, x, (cols,), weight, bias, statistics, (True, True, True))

    got_mean, got_rstd = statistics.double().view(2, rows, 1)
    torch.testing.assert_close(got_mean, mean, rtol=0, atol=1e-6 * x.abs().max().item())
    torch.testing.assert_close(got_rstd, rstd, rtol=1e-5, atol=0)
    g = dy.double() * weight.double()
    along_xhat = (g * xhat).mean(1, keepdim=True)
    dx = rstd * (g - g.mean(1, keepdim=True) - xhat * along_xhat)
    exact = dx, (dy.double() * xhat).sum(0), dy.double().sum(0)
    terms = (g.abs() * rstd).max(), (dy.double() * xhat).abs().sum(0).max(), dy.abs().sum(0).max()
    for name, result, want, size in zip(
        ("dx", "dweight", "dbias"), ours, exact, terms, strict=True
    ):
        largest = want.abs().max().item()
        cancelled = 32 * torch.finfo(torch.float32).eps * size.item() / largest
        error = _accuracy.error(result, want)
        allowed = 2 * _accuracy.floor(result.dtype) + cancelled
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
