"""linear_cross_entropy against float64, and the memory it must not take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kernels.cross_entropy import (
    LinearCrossEntropyLoss,
    chunks,
    cross_entropy,
    linear_cross_entropy,
    slices,
)
from tests.tolerance import assert_as_exact_as_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 7)
    monkeypatch.setattr(chunks, "CLASSES_PER_PART", 10)
    monkeypatch.setattr(slices, "CLASSES", 10)
    monkeypatch.setattr(slices, "ROWS", 9)


def stored(input, linear_weight, target, linear_bias=None, ignore_index=None, **keywords):
    """Torch's function, for torch versions that lack it."""
    logits = F.linear(
        input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()
    )
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(logits, target, ignore_index=ignored, **keywords)


def run(function, tensors, target, dtype, **keywords):
    leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
    if target.is_floating_point():
        target = target.to(dtype)
    if keywords.get("weight") is not None:
        keywords["weight"] = keywords["weight"].to(dtype)
    bias = leaves[2] if len(leaves) > 2 else None
    loss = function(leaves[0], leaves[1], target, linear_bias=bias, **keywords)
    gradient = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keywords", [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "weight": torch.rand(33) + 0.1},
    {"weight": torch.rand(33) + 0.1, "label_smoothing": 0.2},
], ids=lambda keywords: "-".join(keywords) or "plain")  # fmt: skip
def test_values_and_gradients(dtype, probabilities, bias, keywords):
    tensors = [torch.randn(23, 5), torch.randn(33, 5), torch.randn(33)][: 3 if bias else 2]
    tensors = [x.to(dtype) for x in tensors]
    target = torch.randint(0, 33, (23,))
    target[3] = -100
    if probabilities:
        target = torch.rand(23, 33).softmax(1).to(dtype)
    want = run(stored, tensors, target, torch.float64, **keywords)
    torch_got = run(stored, tensors, target, dtype, **keywords)
    got = run(linear_cross_entropy, tensors, target, dtype, **keywords)
    assert [x.dtype for x in got] == [x.dtype for x in torch_got]
    assert_as_exact_as_torch(got, torch_got, want, ("loss", "dx", "dw", "db")[: len(got)])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("rows", [5, 23])  # one chunk, several
def test_products_of_16_bits_either_way(monkeypatch, dtype, widened, rows):
    """By PyTorch's 16-bit matmul, or in float32 where the CPU has no instructions for it."""
    monkeypatch.setattr(chunks, "WIDENED", frozenset({dtype} if widened else ()))
    tensors = [x.to(dtype) for x in (torch.randn(rows, 5), torch.randn(33, 5), torch.randn(33))]
    target = torch.randint(0, 33, (rows,))
    want = run(stored, tensors, target, torch.float64)
    torch_got = run(stored, tensors, target, dtype)
    got = run(linear_cross_entropy, tensors, target, dtype)
    assert_as_exact_as_torch(got, torch_got, want, ("loss", "dx", "dw", "db"))


@pytest.mark.parametrize(("input", "weight", "target"), [
    ((5,), (9, 5), ()),
    ((6, 4), (5, 2, 3, 4), (6, 2, 3)),
    ((0, 4), (5, 4), (0,)),
    ((7, 4), (1, 4), (7,)),
])  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_shapes(input, weight, target, reduction, probabilities):
    classes = weight[0]
    tensors = [torch.randn(input), torch.randn(weight), torch.randn(weight[:-1])]
    labels = torch.randint(0, classes, target)
    if probabilities:
        labels = torch.rand(*input[:-1], *weight[:-1])
    want = run(stored, tensors, labels, torch.float64, reduction=reduction)
    got = run(linear_cross_entropy, tensors, labels, torch.float32, reduction=reduction)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_all_ignored_is_nan_without_gradient():
    for dtype in DTYPES:
        tensors = [torch.randn(9, 4), torch.randn(6, 4)]
        loss, *gradients = run(linear_cross_entropy, tensors, torch.full((9,), -100), dtype)
        assert loss.isnan()
        assert not any(gradient.any() for gradient in gradients)


def test_rows_of_no_weight_have_torchs_gradient():
    """0 / 0, while ignored rows still receive 0."""
    weight, target = torch.tensor([0.0, 1.0]), torch.tensor([0, -100, 0])
    for dtype in DTYPES:
        tensors = [torch.randn(3, 4), torch.randn(2, 4)]
        loss, dx, dw = run(linear_cross_entropy, tensors, target, dtype, weight=weight)
        want = run(stored, tensors, target, dtype, weight=weight)
        assert loss.isnan()
        assert dw.isnan().all()
        assert torch.equal(dx.isnan(), want[1].isnan())
        assert not dx[1].any()


def test_derivatives():
    x, w, b = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((9, 4), (6, 4), (6,))
    )
    target = torch.randint(0, 6, (9,))
    for reduction in ("mean", "none"):

        def function(x, w, b, reduction=reduction):
            loss, stats = linear_cross_entropy(
                x, w, target, linear_bias=b, reduction=reduction, softcap=3.0, z_loss=0.1,
                label_smoothing=0.1, return_stats=True,
            )  # fmt: skip
            return loss, stats.lse

        assert torch.autograd.gradcheck(function, (x, w, b))
        assert torch.autograd.gradgradcheck(function, (x, w, b))


def test_backward_twice_and_partial_gradients():
    x, w = torch.randn(20, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    target = torch.randint(0, 6, (20,))
    loss = linear_cross_entropy(x, w, target)
    first = [g.clone() for g in torch.autograd.grad(loss, (x, w), retain_graph=True)]
    second = torch.autograd.grad(loss, (x, w), torch.tensor(2.0))
    torch.testing.assert_close(second, tuple(2 * g for g in first))
    (alone,) = torch.autograd.grad(linear_cross_entropy(x.detach(), w, target), w)
    torch.testing.assert_close(alone, first[1])
    (alone,) = torch.autograd.grad(linear_cross_entropy(x, w.detach(), target), x)
    torch.testing.assert_close(alone, first[0])


def test_stats_chunks_and_options():
    x, w = torch.randn(20, 4), torch.randn(6, 4)
    target = torch.randint(0, 6, (20,))
    logits = x @ w.t()
    loss, stats = linear_cross_entropy(
        x, w, target, options=SimpleNamespace(batch_chunk_size=3), return_stats=True
    )
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    torch.testing.assert_close(stats.lse, logits.logsumexp(1))
    assert torch.equal(stats.correct, logits.argmax(1) == target)
    problem = chunks.Problem(x, w, None, target, None, None, 3)
    assert [s.stop - s.start for s in chunks.slices(problem)] == [3] * 6 + [2]


def test_runs_on_the_meta_device_under_autocast_too():
    input = torch.empty(6, 3, device="meta", dtype=torch.bfloat16, requires_grad=True)
    matrix = torch.empty(5, 3, device="meta", dtype=torch.bfloat16, requires_grad=True)
    target = torch.empty(6, device="meta", dtype=torch.long)
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            loss = linear_cross_entropy(input, matrix, target)
            loss = loss + cross_entropy(input @ matrix.t(), target)
        gradients = torch.autograd.grad(loss, (input, matrix))
        assert all(x.is_meta for x in (loss, *gradients))


def test_autocast_runs_the_linear_map_in_16_bits():
    x, w = torch.randn(20, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    target = torch.randint(0, 6, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = linear_cross_entropy(x, w, target), stored(x, w, target)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)  # logits may be rounded or not
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, (x, w)), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.002)


def test_compiles_to_one_graph():
    x, w = torch.randn(20, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    target = torch.randint(0, 6, (20,))
    step = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    got = step(x, w, target)
    want = linear_cross_entropy(x, w, target)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (x, w)), torch.autograd.grad(want, (x, w)))


X, W = torch.randn(3, 4), torch.randn(5, 4)
REFUSED = {
    "input dimensions": ((torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3).long()), {}),
    "weight dimensions": ((torch.randn(3, 4), torch.randn(4), torch.zeros(3).long()), {}),
    "features": ((torch.randn(3, 4), torch.randn(5, 3), torch.zeros(3).long()), {}),
    "bias": ((X, W, torch.zeros(3).long()), {"linear_bias": torch.ones(4)}),
    "dtypes": ((X, W.double(), torch.zeros(3).long()), {}),
    "unbatched": ((torch.randn(4), torch.randn(5, 2, 4), torch.zeros(2).long()), {}),
    "ignore_index": ((X, W, torch.rand(3, 5)), {"ignore_index": -100}),
    "ignore_index text": ((X, W, torch.zeros(3).long()), {"ignore_index": "a"}),
    "target": ((X, W, torch.tensor([1, 5, 0])), {}),
    "rows": ((X, W, torch.zeros(2).long()), {}),
}  # fmt: skip


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_pytorchs(name):
    arguments, keywords = REFUSED[name]
    with pytest.raises(Exception, match=r".") as theirs:
        F.linear_cross_entropy(*arguments, **keywords)
    with pytest.raises(theirs.type):
        linear_cross_entropy(*arguments, **keywords)


def test_options_must_be_options():
    with pytest.raises(TypeError, match=r"options must be .* not int"):
        linear_cross_entropy(X, W, torch.zeros(3).long(), options=128)  # type: ignore[arg-type]


def test_module_has_torchs_parameters():
    module = LinearCrossEntropyLoss(4, 6, out_features=(2,), bias=True, label_smoothing=0.1)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "linear.weight": (12, 4),
        "linear.bias": (12,),
    }
    x, target = torch.randn(5, 4), torch.randint(0, 6, (5, 2))
    weight, bias = module.linear.weight.reshape(6, 2, 4), module.linear.bias.reshape(6, 2)
    want = stored(x, weight, target, bias, label_smoothing=0.1)
    torch.testing.assert_close(module(x, target), want)


MEMORY = """
import torch, sys
from kernels.cross_entropy import linear_cross_entropy
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
rows, features, classes = 2048, 32, 32000
x = torch.randn(rows, features, requires_grad=True)
w = torch.randn(classes, features, requires_grad=True)
target = torch.randint(0, classes, (rows,))
linear_cross_entropy(x[:8], w[:50], target[:8] % 50).backward()
x.grad = w.grad = None
before = peak()
linear_cross_entropy(x, w, target).backward()
print(peak() - before - x.grad.nbytes - w.grad.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's VmHWM")
def test_memory_is_one_chunk_and_not_the_logits():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300
    )
    eager = 3 * 2048 * 32000 * 4  # logits, log-probabilities, gradient
    assert int(done.stdout) < eager / 16


@pytest.mark.parametrize("widened", [False, True])
def test_autocast_does_not_round_logits_twice(monkeypatch, widened):
    monkeypatch.setattr(chunks, "WIDENED", frozenset({torch.bfloat16} if widened else ()))
    monkeypatch.setattr(slices, "takes", lambda problem: False)  # they do not round at all
    x, w, b = torch.randn(64, 33) * 5, torch.randn(9, 33), torch.randn(9)
    target = torch.randint(0, 9, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(x, w, target, linear_bias=b, reduction="none")
        logits = F.linear(x, w, b)
    torch.testing.assert_close(got, F.cross_entropy(logits.float(), target, reduction="none"))
