"""Int8Linear and Int8Embedding as modules: values, state, casts, copies, outlier columns."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from kernels.int8_matmul import (
    Int8Embedding,
    Int8Linear,
    dequantize,
    int8_linear,
    layer_norm_quantize,
    quantize,
)


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils: y = x @ weight + bias, weight [K, N]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


MADE = {
    "dynamic": {},
    "weight_only": {"mode": "weight_only"},
    "static": {"mode": "static", "x_scale": 4 / 127},
    "activation": {"activation": "gelu"},
    "groups": {"mode": "weight_only", "group_size": 16},
    "outliers": {"outlier_columns": [3, 60]},
    "calibrated": {"mode": "static", "input_absmax": torch.full((64,), 4.0)},
}


@pytest.fixture(params=MADE)
def made(request):
    return Int8Linear.from_linear(nn.Linear(64, 24), **MADE[request.param])


X = torch.randn(2, 5, 64)


@pytest.mark.parametrize("name", MADE)
def test_it_is_near_the_float_layer(name):
    linear = nn.Linear(64, 24)
    got = Int8Linear.from_linear(linear, **MADE[name])(X)
    want = linear(X)
    want = F.gelu(want) if name == "activation" else want
    assert got.shape == want.shape
    assert relative(got, want) < (0.006 if "weight" in name or name == "groups" else 0.02)


@pytest.mark.parametrize("name", ["dynamic", "weight_only"])
def test_it_is_int8_linear(name):
    linear = nn.Linear(64, 24)
    want = int8_linear(X, quantize(linear.weight), linear.bias, name)
    module = Int8Linear.from_linear(linear, name)
    assert torch.equal(module(X), want)
    assert torch.equal(module.dequantized_weight(), dequantize(quantize(linear.weight)))


def test_conv1d_is_the_linear_layer_of_its_transpose():
    conv = Conv1D(24, 64)
    linear = nn.Linear(64, 24)
    linear.weight.data, linear.bias.data = conv.weight.t().clone(), conv.bias.data
    got, want = Int8Linear.from_linear(conv), Int8Linear.from_linear(linear)
    assert torch.equal(got.weight, want.weight)
    assert torch.equal(got(X), want(X))
    assert relative(got(X), conv(X)) < 0.02


def test_a_layer_norm_before_it_may_be_int8():
    module = Int8Linear.from_linear(nn.Linear(64, 24, bias=False))
    assert relative(module(layer_norm_quantize(X, 64)), module(F.layer_norm(X, (64,)))) < 0.01


def test_buffers_and_no_parameters(made):
    assert not list(made.parameters())
    assert made.weight.dtype == torch.int8
    assert made.weight.shape == (24, 64)
    assert made.weight_scale.dtype == torch.float32
    assert made.bias.shape == (24,)
    assert not made(X).requires_grad
    assert not any(buffer.is_meta for buffer in made.buffers())


def test_state_dict_round_trip(made, tmp_path):
    fresh = Int8Linear(
        *(64, 24, True, made.mode, made.activation),
        group_size=made.group_size,
        outliers=0 if made.outlier_columns is None else made.outlier_columns.numel(),
    )
    assert fresh.state_dict().keys() == made.state_dict().keys()
    save_file(made.state_dict(), tmp_path / "layer.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(fresh(X), made(X))
    other = Int8Linear(64, 24, device="meta", mode=made.mode, activation=made.activation)
    if other.state_dict().keys() == made.state_dict().keys() and made.group_size is None:
        other.load_state_dict(made.state_dict(), assign=True)
        assert torch.equal(other(X), made(X))


def test_copies(made):
    stream = io.BytesIO()
    torch.save(made, stream)
    stream.seek(0)
    copies = (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(stream, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(X), made(X))
        assert other.weight.data_ptr() != made.weight.data_ptr()
        assert repr(other) == repr(made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_leaves_weight_and_scales(made, dtype):
    want = {name: made.state_dict()[name].clone() for name in ("weight", "weight_scale")}
    y = made(X)
    assert made.to(dtype) is made
    for name, tensor in want.items():
        assert torch.equal(made.state_dict()[name], tensor)
        assert made.state_dict()[name].dtype == tensor.dtype
    assert made.x_scale is None or made.x_scale.dtype == torch.float32
    assert made.bias.dtype == dtype
    assert made(X.to(dtype)).dtype == dtype
    assert relative(made(X.to(dtype)), y) < 0.03
    made.half().float()
    assert torch.equal(made.weight_scale, want["weight_scale"])


def test_moving_moves_the_scales_too(made):
    moved = made.to("meta", torch.bfloat16)
    assert all(buffer.is_meta for buffer in moved.buffers())
    assert moved.weight_scale.dtype == torch.float32
    assert moved(X.to("meta", torch.bfloat16)).shape == (2, 5, 24)


def test_what_it_prints(made):
    text = repr(made)
    assert "in_features=64, out_features=24, bias=True" in text
    assert f"mode={made.mode!r}" in text
    assert ("outliers=2" in text) == (made.outlier_columns is not None)
    assert ("group_size=16" in text) == (made.group_size is not None)


def test_gradients_go_through_it(made):
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(made(x).square().sum(), x)
    assert dx.isfinite().all()
    assert dx.abs().amin(-1).gt(0).all()


@pytest.mark.parametrize("made", ["static", "groups", "outliers"], indirect=True)
def test_compiled(made):
    torch._dynamo.reset()
    got = torch.compile(made, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(got, made(X))


def test_outlier_columns_take_what_would_drown_the_rest():
    x, linear = torch.randn(50, 64), nn.Linear(64, 24)
    x[:, [3, 60]] *= 300
    absmax = x.abs().amax(0)
    plain = Int8Linear.from_linear(linear)
    kept = Int8Linear.from_linear(linear, outlier_threshold=20.0, input_absmax=absmax)
    assert kept.outlier_columns.tolist() == [3, 60]
    assert kept.outlier_weight.dtype == torch.bfloat16
    assert (kept.weight[:, [3, 60]] == 0).all()
    linear.weight.data[:, [3, 60]] *= 1e-3  # so that the rest shows
    plain, kept = (
        Int8Linear.from_linear(linear, outlier_columns=columns) for columns in (None, [60, 3])
    )
    assert relative(plain(x), linear(x)) > 0.3
    assert relative(kept(x), linear(x)) < 0.02
    static = Int8Linear.from_linear(linear, "static", outlier_threshold=20.0, input_absmax=absmax)
    assert static.x_scale.item() == pytest.approx(absmax[absmax < 20].max().item() / 127)
    none = Int8Linear.from_linear(linear, outlier_threshold=1e6, input_absmax=absmax)
    assert none.outlier_columns is None
    with pytest.raises(TypeError, match="not a Quantized"):
        kept(quantize(x))


LINEAR = nn.Linear(6, 4)
REFUSED = {
    "conv": (lambda: Int8Linear.from_linear(nn.Conv2d(1, 1, 1)), TypeError, "not Conv2d"),
    "mode": (lambda: Int8Linear.from_linear(LINEAR, "int4"), ValueError, "mode is 'int4'"),
    "activation": (
        lambda: Int8Linear.from_linear(LINEAR, activation="elu"),
        ValueError,
        "activation is 'elu'",
    ),
    "x_scale": (lambda: Int8Linear.from_linear(LINEAR, x_scale=1.0), ValueError, "x_scale needs"),
    "static": (lambda: Int8Linear.from_linear(LINEAR, "static"), ValueError, "needs x_scale or"),
    "x_scale NaN": (
        lambda: Int8Linear.from_linear(LINEAR, "static", x_scale=float("nan")),
        ValueError,
        "x_scale must be one value above 0",
    ),
    "x_scale two": (
        lambda: Int8Linear.from_linear(LINEAR, "static", x_scale=torch.ones(2)),
        ValueError,
        "x_scale must be one value above 0",
    ),
    "group_size": (
        lambda: Int8Linear.from_linear(LINEAR, "weight_only", group_size=4),
        ValueError,
        "must divide in_features",
    ),
    "group mode": (
        lambda: Int8Linear.from_linear(LINEAR, group_size=3),
        ValueError,
        "group_size needs mode='weight_only'",
    ),
    "columns": (
        lambda: Int8Linear.from_linear(LINEAR, outlier_columns=[1, 6]),
        ValueError,
        r"outlier_columns must be between 0 and 5, but has \[1, 6\]",
    ),
    "threshold": (
        lambda: Int8Linear.from_linear(LINEAR, outlier_threshold=6.0),
        ValueError,
        "outlier_threshold needs input_absmax",
    ),
    "both": (
        lambda: Int8Linear.from_linear(LINEAR, outlier_threshold=6.0, outlier_columns=[1]),
        ValueError,
        "not both",
    ),
    "absmax": (
        lambda: Int8Linear.from_linear(LINEAR, input_absmax=torch.ones(4)),
        ValueError,
        r"input_absmax must have shape \[6\]",
    ),
    "x": (lambda: Int8Linear.from_linear(LINEAR)(torch.ones(2, 5)), ValueError, "last size of x"),
    "embedding mode": (
        lambda: Int8Embedding.from_embedding(nn.Embedding(3, 4), "int4"),
        ValueError,
        "mode is 'int4'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


def test_embedding():
    embedding = nn.Embedding(50, 64).bfloat16()
    module = Int8Embedding.from_embedding(embedding)
    index = torch.randint(0, 50, (3, 4))
    rows = module(index)
    want = dequantize(quantize(embedding.weight), torch.bfloat16)[index]
    assert torch.equal(rows, want)
    assert relative(module.linear(X.bfloat16()), F.linear(X, embedding.weight.float())) < 0.02
    assert module.float()(index).dtype == torch.float32
    assert module.weight_scale.dtype == torch.float32
    assert "50, 64, mode='dynamic', dtype=torch.float32" in repr(module)
    other = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(index), module(index))
    with pytest.raises(IndexError):
        module(torch.tensor([50]))
