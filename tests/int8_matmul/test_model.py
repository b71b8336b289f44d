"""Whole models: what quantize_model_ replaces and shares, and what smooth_ folds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.gpt import FUSED, GPT, TORCH, GPTConfig
from kernels.int8_matmul import (
    Int8Embedding,
    Int8Linear,
    calibrate,
    int8_linear,
    quantize,
    quantize_model_,
    smooth_,
)
from kernels.layer_norm import LayerNorm
from tests.int8_matmul.test_linear import Conv1D

INDEX = torch.randint(0, 50, (4, 9))


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


class Model(nn.Module):
    """A language model of one sub-layer, its head tied to the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), Conv1D(32, 64))
        self.norm = LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, index):
        x = self.embedding(index)
        return self.head(self.norm(x + self.block(x)))


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "static"])
@pytest.mark.parametrize("tied", [True, False])
def test_everything_is_replaced_in_place(mode, tied):
    model = Model(tied)
    want, before = model(INDEX), copy.deepcopy(model.state_dict())
    batches = [INDEX] if mode == "static" else None
    got = quantize_model_(model, mode, batches=batches)
    assert got == ["embedding", "block.1", "block.3", "head"]
    assert type(model.embedding) is Int8Embedding
    assert {type(model.get_submodule(name)) for name in got[1:]} == {Int8Linear}
    assert model.block[1].mode == model.embedding.mode == mode
    assert relative(model(INDEX), want) < 0.03
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert (model.head.weight.data_ptr() == model.embedding.weight.data_ptr()) == tied
    other = Model(tied)
    quantize_model_(other, mode, batches=batches)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(INDEX), model(INDEX))


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["block.1"], ["block.1"]),
        (["block"], ["block.1", "block.3"]),
        (["block.*"], ["block.1", "block.3"]),
        (["*.3"], ["block.3"]),
        (["3"], ["block.3"]),
        (["head", "embedding"], ["embedding", "head"]),
        (["*"], ["embedding", "block.1", "block.3", "head"]),
    ],
)
def test_names_that_are_skipped(skip, left):
    model = Model(tied=True)
    got = quantize_model_(model, skip=skip)
    assert sorted([*got, *left]) == ["block.1", "block.3", "embedding", "head"]
    assert not any(isinstance(model.get_submodule(name), Int8Linear) for name in left)


def test_embeddings_may_stay():
    model = Model(tied=False)
    assert quantize_model_(model, embeddings=False) == ["block.1", "block.3", "head"]
    assert type(model.embedding) is nn.Embedding


def test_a_layer_under_two_names_is_replaced_once():
    linear = nn.Linear(8, 8)
    model = nn.Sequential(linear, nn.Sequential(linear), nn.Linear(8, 8))
    model[2].weight = linear.weight
    assert quantize_model_(model) == ["0", "1.0", "2"]
    assert model[0] is model[1][0]
    assert model[2].weight is model[0].weight
    assert model[2].bias is not model[0].bias


def test_a_weight_that_is_shared_in_another_form_is_quantised_twice():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), Conv1D(8, 8), nn.Linear(8, 8))
    for layer in model[1:]:
        layer.weight = model[0].weight
    got = copy.deepcopy(model)
    quantize_model_(got)
    assert got[1].weight is got[0].weight
    assert got[3].weight is got[0].weight
    assert torch.equal(got[2].weight, quantize(model[2].weight.t()).values)
    grouped = copy.deepcopy(model)
    quantize_model_(grouped, "weight_only", group_size=4)
    assert grouped[1].weight is grouped[3].weight
    assert grouped[0].weight_scale.shape == (8, 1)


def test_a_model_on_meta_takes_a_state_dict():
    model = Model(tied=False)
    quantize_model_(model)
    with torch.device("meta"):
        empty = Model(tied=False)
    quantize_model_(empty)
    assert all(buffer.is_meta for buffer in empty.buffers())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(INDEX), model(INDEX))


class ReadsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.weight = self.linear.weight


REFUSED = {
    "tie with what stays": (
        lambda: quantize_model_(Model(), embeddings=False),
        ValueError,
        r"head.weight is embedding.weight, too, which stays as it is: skip both, or neither",
    ),
    "tie with a parameter": (
        lambda: quantize_model_(nn.Sequential(ReadsWeights())),
        ValueError,
        "0.linear.weight is 0.weight, too",
    ),
    "skip": (
        lambda: quantize_model_(Model(), skip=["haed"]),
        ValueError,
        "skip names 'haed', but no module is called so",
    ),
    "skip str": (lambda: quantize_model_(Model(), skip="head"), TypeError, "skip must be a list"),
    "mode": (lambda: quantize_model_(Model(), "int4"), ValueError, "mode is 'int4'"),
    "model": (lambda: quantize_model_(nn.Linear(2, 2)), TypeError, "model is itself a Linear"),
    "no model": (lambda: quantize_model_([]), TypeError, "model must be an nn.Module, not list"),
    "no batches": (lambda: quantize_model_(Model(), "static"), ValueError, "batches go with"),
    "batches": (lambda: quantize_model_(Model(), batches=[INDEX]), ValueError, "batches go with"),
    "empty": (lambda: quantize_model_(Model(), "static", batches=[]), ValueError, "at least one"),
    "batch": (lambda: calibrate(Model(), [3]), TypeError, "a batch must be a Tensor"),
    "smooth": (lambda: smooth_(Model(), [INDEX], 1.5), ValueError, "alpha must be between 0 and 1"),
    "smooth model": (lambda: smooth_(3, [INDEX]), TypeError, "model must be an nn.Module, not int"),
    "group_size": (
        lambda: quantize_model_(Model(), "weight_only", group_size=5),
        ValueError,
        "group_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        ("register_forward_hook", "forward hooks"),
        ("register_forward_pre_hook", "forward pre hooks"),
        ("register_full_backward_hook", "backward hooks"),
        ("register_full_backward_pre_hook", "backward pre hooks"),
    ],
)
def test_hooks_are_not_lost(register, kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = getattr(model[1], register)(lambda *_: None)
    with pytest.raises(ValueError, match=f"1 has {kind}"):
        quantize_model_(model)
    assert quantize_model_(model, skip=["1"]) == ["0"]
    handle.remove()
    assert quantize_model_(model) == ["1"]


def test_nothing_is_replaced_where_anything_is_refused():
    model = Model(tied=False)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' was given no input by `batches`"):
        quantize_model_(model, "static", batches=[INDEX])
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_encoder_layer(training):
    """Its fused path would read the weights of layers that are int8 now."""
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2
    ).train(training)
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        want = model(x)
        got = quantize_model_(model)
        assert "layers.0.linear1" in got
        assert not any("out_proj" in name for name in got)  # read by nn.MultiheadAttention
        assert relative(model(x), want) < 0.03


def test_groups_and_outliers_in_a_model():
    model, want = Model(tied=True), None
    want = model(INDEX)
    groups = copy.deepcopy(model)
    quantize_model_(groups, "weight_only", group_size=8)
    assert groups.block[1].weight_scale.shape == (64, 4)
    assert relative(groups(INDEX), want) < 0.02
    outliers = copy.deepcopy(model)
    quantize_model_(outliers, outlier_threshold=2.0, batches=[INDEX])
    assert outliers.block[1].outlier_columns is not None
    assert relative(outliers(INDEX), want) < 0.03


def test_calibrate_sees_the_largest_of_every_feature():
    model = Model().train()
    batches = [INDEX, (INDEX.flip(0),), {"index": INDEX[:1]}]
    got = calibrate(model, batches)
    assert list(got) == ["block.1", "block.3", "head"]
    x = model.embedding(INDEX)
    want = model.block[0](x).abs().flatten(0, 1).amax(0)
    torch.testing.assert_close(got["block.1"], want.detach())
    assert model.training
    assert not any(
        hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)
    )


def test_smoothing_makes_int8_more_exact():
    model, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64)), torch.randn(50, 32)
    with torch.no_grad():
        model[0].weight[3] = 100.0  # a feature that drowns the others, as large models have them
        model[1].weight[:, 3] *= 0.01
    want = model(x)
    plain = copy.deepcopy(model)
    quantize_model_(plain)
    smooth_(model, [x])
    quantize_model_(model)
    assert relative(model(x), want) < 0.2 * relative(plain(x), want)


def test_smoothing_leaves_the_function():
    model = Model(tied=False)
    with torch.no_grad():
        for norm in (model.block[0], model.norm):
            norm.weight.normal_()
            norm.bias.normal_()
    want = model(INDEX)
    report = smooth_(model, [INDEX])
    assert report.folded == {"block.0": ["block.1"], "norm": ["head"]}
    assert report.skipped == {"block.3": "its input does not come from one layer norm alone"}
    torch.testing.assert_close(model(INDEX), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0, 0.25, 1.0])
def test_factors_of_smoothing(alpha):
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(20, 8)
    norm, weight = model[0](x).detach(), model[1].weight.detach().clone()
    smooth_(model, [x], alpha)
    factors = norm.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(model[1].weight, weight * factors)
    torch.testing.assert_close(model[0].weight, 1 / factors)


class Branches(nn.Module):
    """One layer norm before two layers, and other uses of a layer norm's output."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=use != "no weight")
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.use = use
        if use == "tied":
            self.copy = nn.LayerNorm(8)
            self.copy.weight = self.norm.weight

    def forward(self, x):
        y = self.norm(x)
        if self.use == "view":
            return self.first(y[:1]) + self.second(y)
        if self.use == "other input":
            return self.first(y) + self.first(x) + self.second(y)
        both = self.first(F.dropout(y, 0.1, self.training)) + self.second(input=y)
        if self.use == "residual":
            return both + y
        if self.use == "in place":
            y.mul_(2)
        return (both, y) if self.use == "returned" else both


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        ("none", None),
        ("residual", "norm: its output goes to add, too"),
        ("view", "norm: its output goes to __getitem__, too"),
        ("in place", "norm: its output goes to mul_, too"),
        ("returned", "norm: its output goes to the model's caller, too"),
        ("other input", "norm: it goes to a layer with other inputs, too"),
        ("no weight", "norm: it has no weight"),
        ("tied", "norm: a parameter that would change belongs to another module, too"),
    ],
)
def test_what_smoothing_must_not_touch(use, reason):
    model, x = Branches(use), torch.randn(5, 8)
    with torch.no_grad():
        before = model.eval()(x)
    report = smooth_(model, [x])
    if reason is None:
        assert report.folded == {"norm": ["first", "second"]}
    else:
        assert report.folded == {}
        assert reason in report.skipped.values()
        assert set(report.skipped) == {"first", "second"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("layers", [TORCH, FUSED], ids=["torch", "fused"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_reference_gpt(tie_weights, norm, layers):
    config = GPTConfig(50, 32, 2, 2, 32, norm=norm, tie_weights=tie_weights)
    model = GPT(config, layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        logits, loss = model(INDEX, INDEX)
        report = smooth_(model, [INDEX])
        assert len(report.folded) == (0 if norm == "post" else 4)
        torch.testing.assert_close(model(INDEX)[0], logits, rtol=1e-3, atol=1e-3)
        names = quantize_model_(model)
        assert len(names) == 2 * 4 + 2 + (not tie_weights)
        got, got_loss = model(INDEX, INDEX)
        assert relative(got, logits) < 0.05
        assert abs(got_loss - loss) < 0.05
        none, same_loss = model(INDEX, INDEX, with_logits=False)
        assert none is None
        torch.testing.assert_close(same_loss, got_loss)
        cache = model.new_cache(4)
        parts = [model(part, cache=cache)[0] for part in (INDEX[:, :5], INDEX[:, 5:6])]
        torch.testing.assert_close(torch.cat(parts, 1), got[:, :6], rtol=0.05, atol=0.1)
        assert cache[0].key.dtype == torch.float32


def test_int8_calls_are_what_a_model_makes():
    """A converted layer, a head and the function give the same bits."""
    linear = nn.Linear(32, 50)
    x = torch.randn(3, 32)
    model = nn.Sequential(copy.deepcopy(linear))
    quantize_model_(model)
    assert torch.equal(model(x), int8_linear(x, quantize(linear.weight), linear.bias))
