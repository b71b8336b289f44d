"""Int8TrainingLinear: its products, its gradients, stochastic rounding, and that a model learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernels.int8_matmul import Int8TrainingLinear, dequantize, int8_linear, quantize
from kernels.int8_matmul.training import quantize_stochastically


@pytest.fixture(autouse=True)
def _one_thread():
    """Layers this small only lose time to more threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def gradients(module, x, dy):
    x = x.detach().requires_grad_()
    y = module(x)
    return y, torch.autograd.grad(y, (x, *module.parameters()), dy)


@pytest.mark.parametrize("stochastic_rounding", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_int8_and_the_weight_gradient_is_not(bias, dtype, stochastic_rounding):
    linear = nn.Linear(64, 96, bias, dtype=dtype)
    module = Int8TrainingLinear.from_linear(linear, stochastic_rounding=stochastic_rounding)
    x, dy = torch.randn(3, 20, 64).to(dtype), torch.randn(3, 20, 96).to(dtype)
    y, got = gradients(module, x, dy)
    want_y, want = gradients(linear, x, dy)
    assert torch.equal(y, int8_linear(x, quantize(linear.weight), linear.bias))
    assert 1e-3 < relative(y, want_y) < 0.02
    assert 1e-3 < relative(got[0], want[0]) < (0.03 if stochastic_rounding else 0.02)
    for one, other in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-5
        )
    assert all(g.dtype == dtype for g in got)


def test_parameters_are_nn_linears():
    linear = nn.Linear(8, 4)
    shared = Int8TrainingLinear.from_linear(linear)
    assert shared.weight is linear.weight
    assert shared.bias is linear.bias
    torch.manual_seed(3)
    fresh = Int8TrainingLinear(8, 4, stochastic_rounding=True)
    torch.manual_seed(3)
    assert torch.equal(fresh.weight, nn.Linear(8, 4).weight)
    fresh.load_state_dict(linear.state_dict())
    assert "in_features=8, out_features=4, bias=True, stochastic_rounding=True" in repr(fresh)
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, not Bilinear"):
        Int8TrainingLinear.from_linear(nn.Bilinear(2, 2, 2))
    with pytest.raises(TypeError, match=r"input is torch\.int64"):
        fresh(torch.ones(2, 8, dtype=torch.int64))


def test_stochastic_rounding_is_right_on_average():
    x = torch.randn(4, 64)
    torch.manual_seed(5)
    draws = [dequantize(quantize_stochastically(x)) for _ in range(400)]
    assert not torch.equal(draws[0], draws[1])
    step = x.abs().amax(1, keepdim=True) / 127
    mean = torch.stack(draws).mean(0)
    assert ((draws[0] - x).abs() <= 1.001 * step).all()
    assert ((mean - x).abs() / step).max() < 5 * 0.5 / 400**0.5  # five standard deviations
    torch.manual_seed(5)
    assert torch.equal(dequantize(quantize_stochastically(x)), draws[0])
    extremes = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0], [1.0, -1.0]])
    got = quantize_stochastically(extremes)
    assert got.scale[:, 0].isnan().tolist() == [False, True, True, False]
    assert got.values[3].tolist() == [127, -127]


def test_only_what_is_asked_for_is_differentiated():
    module, x = Int8TrainingLinear(8, 4), torch.randn(3, 8)
    module(x).sum().backward()
    assert module.weight.grad is not None
    module.requires_grad_(False)
    x.requires_grad_()
    assert torch.autograd.grad(module(x).sum(), x)[0].shape == x.shape


def test_second_derivative_float64_and_transforms_are_nn_linears():
    module, linear = Int8TrainingLinear(8, 4), nn.Linear(8, 4)
    linear.load_state_dict(module.state_dict())
    x = torch.randn(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.square().sum(), x)[0].isfinite().all()
    wide = torch.randn(3, 8).double()
    assert torch.equal(module.double()(wide), linear.double()(wide))
    got = torch.func.grad(lambda x: module(x).sum())(wide)
    torch.testing.assert_close(got, linear.weight.sum(0).expand(3, 8))


def test_autocast_and_compile():
    torch._dynamo.reset()
    module, x = Int8TrainingLinear(16, 8), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == nn.Linear(16, 8)(x).dtype == torch.bfloat16
    dy = torch.randn(4, 8)
    want = gradients(module, x, dy)
    got = gradients(torch.compile(module, fullgraph=True, backend="aot_eager"), x, dy)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("stochastic_rounding", [True, False])
def test_a_model_learns_as_with_nn_linear(stochastic_rounding):
    """A small regression: the loss falls to a third as in full precision, to a few per cent."""
    torch.manual_seed(0)
    x = torch.randn(1024, 16)
    target = torch.tanh(x @ torch.randn(16, 8)) + 0.3 * torch.randn(1024, 8)
    losses = {}
    for kind in ("float", "int8"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
        if kind == "int8":
            for number in (0, 2):
                model[number] = Int8TrainingLinear.from_linear(
                    model[number], stochastic_rounding=stochastic_rounding
                )
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(60):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses["float"] < 0.3
    assert losses["int8"] < 1.03 * losses["float"]
