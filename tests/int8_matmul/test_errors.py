"""What int8_matmul and int8_linear refuse: each error names its argument, before anything runs."""

from __future__ import annotations

import pytest
import torch

from kernels.int8_matmul import Quantized, int8_linear, int8_matmul, quantize

A = torch.randint(-128, 128, (3, 6), dtype=torch.int8)
B = torch.randint(-128, 128, (6, 4), dtype=torch.int8)
ONE = torch.ones(())
X = torch.randn(3, 6)
WEIGHT = quantize(torch.randn(4, 6))
LONG = torch.zeros(1, (1 << 17) + 1, dtype=torch.int8)
META = WEIGHT.values.to("meta")

MATMUL_REFUSED = {
    "a float": ((X, B), {}, TypeError, "a is torch.float32; accepted: int8"),
    "b float": ((A, X.t()), {}, TypeError, "b is torch.float32; accepted: int8"),
    "a uint8": ((A.to(torch.uint8), B), {}, TypeError, "a is torch.uint8"),
    "a list": (([1], B), {}, TypeError, "a must be a Tensor, not list"),
    "b None": ((A, None), {}, TypeError, "b must be a Tensor, not NoneType"),
    "K": ((A, B.t()), {}, ValueError, r"the last size of a must be the first of b.*\[3, 6\]"),
    "K transposed": ((A, B), {"transpose_b": True}, ValueError, "must be the last of b"),
    "b 3-dim": ((A, B[None]), {}, ValueError, r"b \[K, N\]"),
    "a 0-dim": ((A[0, 0], B), {}, ValueError, r"a must be \[\.\.\., K\]"),
    "K too large": (
        (LONG, LONG.t()),
        {},
        ValueError,
        "the last size of a is 131073; int32 sums hold at most 131072",
    ),
    "b elsewhere": ((A, B.to("meta")), {}, RuntimeError, "b is on meta"),
    "one scale": ((A, B, ONE), {}, ValueError, "go together, but scale_b is None"),
    "other scale": ((A, B, None, ONE), {}, ValueError, "go together, but scale_a is None"),
    "scale_a shape": ((A, B, torch.ones(4), ONE), {}, ValueError, r"scale_a must have shape \[3\]"),
    "scale_b shape": ((A, B, ONE, torch.ones(4, 1)), {}, ValueError, r"scale_b must have shape"),
    "scale_a int": ((A, B, torch.tensor(1), ONE), {}, TypeError, "scale_a is torch.int64"),
    "scale float": ((A, B, 1.0, ONE), {}, TypeError, "scale_a must be a Tensor, not float"),
    "scale elsewhere": ((A, B, ONE.to("meta"), ONE), {}, RuntimeError, "scale_a is on meta"),
    "bias shape": ((A, B, ONE, ONE, X[0]), {}, ValueError, r"bias must have shape \[4\]"),
    "bias int": ((A, B, ONE, ONE, B[0]), {}, TypeError, "bias is torch.int8"),
    "bias alone": ((A, B, None, None, X[0, :4]), {}, ValueError, "bias needs scale_a"),
    "activation alone": ((A, B), {"activation": "relu"}, ValueError, "activation needs scale_a"),
    "activation": (
        (A, B, ONE, ONE),
        {"activation": "silu"},
        ValueError,
        "activation is 'silu'; accepted: None, 'relu', 'gelu', 'gelu_tanh'",
    ),
    "activation list": ((A, B, ONE, ONE, None, ["relu"]), {}, ValueError, "activation is"),
    "out_dtype raw": ((A, B), {"out_dtype": torch.float32}, TypeError, "out_dtype without scales"),
    "out_dtype": ((A, B, ONE, ONE), {"out_dtype": torch.int32}, TypeError, "out_dtype is torch.in"),
    "out_dtype str": ((A, B, ONE, ONE), {"out_dtype": "half"}, TypeError, "out_dtype is half"),
}
LINEAR_REFUSED = {
    "x int8": ((A, WEIGHT), {}, TypeError, "x is torch.int8; accepted: float32"),
    "x None": ((None, WEIGHT), {}, TypeError, "x must be a Tensor"),
    "weight tensor": ((X, X), {}, TypeError, "quantized_weight must be a Quantized"),
    "weight float": ((X, Quantized(X, ONE)), {}, TypeError, "quantized_weight.values is torch.fl"),
    "weight 1-dim": ((X, Quantized(A[0], ONE)), {}, ValueError, r"values must be \[N, K\]"),
    "weight by column": (
        (X, quantize(torch.randn(4, 6), 0)),
        {},
        ValueError,
        r"quantized_weight.scale must have shape \[4, 1\] or hold one value",
    ),
    "K": ((X[:, :5], WEIGHT), {}, ValueError, "the last size of x must be 6"),
    "x 0-dim": ((ONE, WEIGHT), {}, ValueError, "the last size of x must be 6"),
    "mode": ((X, WEIGHT, None, "raw"), {}, ValueError, "mode is 'raw'; accepted: 'dynamic'"),
    "mode None": ((X, WEIGHT, None, None), {}, ValueError, "mode is None"),
    "no x_scale": ((X, WEIGHT, None, "static"), {}, ValueError, "'static' needs x_scale"),
    "x_scale": ((X, WEIGHT), {"x_scale": ONE}, ValueError, "'dynamic' takes no x_scale"),
    "x_scale 0": (
        (X, WEIGHT, None, "static"),
        {"x_scale": 0 * ONE},
        ValueError,
        "x_scale must be above 0 and finite, but is 0.0",
    ),
    "x_scale shape": (
        (X, WEIGHT, None, "static"),
        {"x_scale": torch.ones(3)},
        ValueError,
        "x_scale must hold one value, but has shape",
    ),
    "bias": ((X, WEIGHT, X[0]), {}, ValueError, r"bias must have shape \[4\]"),
    "activation": ((X, WEIGHT, None, "dynamic", "tanh"), {}, ValueError, "activation is 'tanh'"),
    "out_dtype": ((X, WEIGHT), {"out_dtype": torch.int8}, TypeError, "out_dtype is torch.int8"),
    "device": ((X, Quantized(META, WEIGHT[1].to("meta"))), {}, RuntimeError, "is on meta"),
    "groups": (
        (X, quantize(torch.randn(4, 6), group_size=3)),
        {},
        ValueError,
        "needs mode='weight_only', but mode is 'dynamic'",
    ),
    "x with zero_point": (
        (quantize(X, symmetric=False), WEIGHT),
        {},
        ValueError,
        "x must be symmetric",
    ),
    "x by column": ((quantize(X, 0), WEIGHT), {}, ValueError, r"x.scale must have shape \[3, 1\]"),
}


@pytest.mark.parametrize("name", MATMUL_REFUSED)
def test_errors_of_int8_matmul_name_the_argument(name):
    arguments, keywords, kind, message = MATMUL_REFUSED[name]
    with pytest.raises(kind, match=f"int8_matmul: .*{message}"):
        int8_matmul(*arguments, **keywords)


@pytest.mark.parametrize("name", LINEAR_REFUSED)
def test_errors_of_int8_linear_name_the_argument(name):
    arguments, keywords, kind, message = LINEAR_REFUSED[name]
    with pytest.raises(kind, match=f"int8_linear: .*{message}"):
        int8_linear(*arguments, **keywords)
